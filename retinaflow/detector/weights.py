"""Published weights into a network: ImageNet backbones and torchvision's COCO detectors.

A source is ``none`` (keep the initial values), ``imagenet`` or ``imagenet_v2`` (torchvision's two recipes for ResNet
classifiers), ``coco`` or ``coco_v2`` (its RetinaNet, and the one with GroupNorm in the heads), or the path of a .pth
file: a state dict of a torchvision ResNet classifier or RetinaNet (v1 or v2 layout, older key names too). Every tensor
of the network is either loaded, or in the report; what does not fit is an error, never a silent random start. The class
layer alone may differ (another number of classes) and then keeps its initial values. Files are read with
``weights_only=True``.
"""

from __future__ import annotations

import hashlib
import importlib
import re
import sys
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from urllib.parse import urlparse

import torch
from torch import Tensor
from torchvision.models import get_model_weights
from torchvision.models.detection import RetinaNet_ResNet50_FPN_V2_Weights, RetinaNet_ResNet50_FPN_Weights

from retinaflow.detector.network import RetinaNet
from retinaflow.detector.timm_backbones import plain_name, published_values
from retinaflow.errors import DataError, SettingError, first_line
from retinaflow.files import check_archive
from retinaflow.settings.backbone_names import TIMM
from retinaflow.settings.training_settings import NetworkSettings

CLASS_LAYER = "head.classification_head.cls_logits."
BODY = "backbone.body."
BATCH_NORM_EPS = 1e-5
COCO_V1_URL: str = RetinaNet_ResNet50_FPN_Weights.COCO_V1.url
COCO_V2_URL: str = RetinaNet_ResNet50_FPN_V2_Weights.COCO_V1.url
CLASSIFIERS: Mapping[str, str] = {"imagenet": "IMAGENET1K_V1", "imagenet_v2": "IMAGENET1K_V2"}
DETECTORS: Mapping[str, str] = {"coco": COCO_V1_URL, "coco_v2": COCO_V2_URL}


@dataclass(frozen=True)
class WeightReport:
    """What ``load_weights`` did, in names of the network's state dict (``unused``: names of the file).

    source: as asked for. file: what was read, "" for ``none``.
    loaded: tensors taken from the file. initial: tensors that a classifier's file does not hold (pyramid and heads).
    replaced: class-layer tensors in the file for another number of classes, left at their initial values.
    unused: tensors of the file that the network does not have (a classifier's last layer).
    """

    source: str
    file: str
    loaded: tuple[str, ...]
    initial: tuple[str, ...]
    replaced: tuple[str, ...]
    unused: tuple[str, ...]

    def __str__(self) -> str:
        if not self.file:
            return f"weights={self.source}: all {len(self.initial)} tensors keep their initial values"
        return (
            f"weights={self.source} ({self.file}): "
            f"{len(self.loaded)} tensors loaded, {len(self.initial)} not in the file, "
            f"{len(self.replaced)} replaced for another number of classes, {len(self.unused)} of the file unused"
        )


def load_weights(model: RetinaNet, source: str) -> WeightReport:
    """Fills ``model`` in place from ``source`` (see the top of the file) and returns what was loaded.

    Raises SettingError for a source that does not exist, does not fit the network or is not published for its backbone,
    and DataError for a file that is damaged or cannot be fetched; the messages name the next step.
    """
    if source == "none":
        return WeightReport(source, "", (), tuple(_wanted(model)), (), ())
    if model.config.backbone.startswith(TIMM) and source in CLASSIFIERS:
        state = published_values(model.config.backbone, source)
        return _load(model, _in_body(model, state), source=source, path=Path("timm"), is_detector=False)
    path = _file_of(source, model.config)
    state = _renamed(_read(path))
    is_detector = any(key.startswith(BODY) for key in state)
    if not is_detector:
        state = _in_body(model, state)
    if path.name == _name_of(COCO_V1_URL):
        _absorb_zero_eps(state)
    return _load(model, state, source=source, path=path, is_detector=is_detector)


def digest_of_file(source: str) -> str | None:
    """sha256 of the file that a source is the path of, which may be replaced by another of its name; None for any other
    source."""
    if source == "none" or source in CLASSIFIERS or source in DETECTORS or not Path(source).is_file():
        return None
    with Path(source).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _in_body(model: RetinaNet, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A classifier's tensors by the names they have in the network; what follows its last map keeps its name."""
    # timm's networks of maps join names that its classifiers separate: stages.0 is stages_0.
    names = {plain_name(key): key for key in model.backbone.body.state_dict()}
    stages = tuple({f"{plain_name(name)}_" for name, _ in model.backbone.body.named_children()})
    renamed = {}
    for key, value in state.items():
        if name := names.get(plain_name(key)):
            renamed[BODY + name] = value
        else:
            # A stage of another depth is no classifier.
            renamed[BODY + key if plain_name(key).startswith(stages) else key] = value
    return renamed


def _wanted(model: RetinaNet) -> dict[str, Tensor]:
    """The tensors a file must fill; batch counters carry nothing and are in some files only."""
    return {key: value for key, value in model.state_dict().items() if not key.endswith("num_batches_tracked")}


def _load(model: RetinaNet, state: dict[str, Tensor], *, source: str, path: Path, is_detector: bool) -> WeightReport:
    wanted = _wanted(model)
    replaced = {key for key in state if key.startswith(CLASS_LAYER) and key in wanted and not _fits(state, wanted, key)}
    missing = [key for key in wanted if key not in state and (is_detector or key.startswith(BODY))]
    misfits = [key for key in wanted if key in state and key not in replaced and not _fits(state, wanted, key)]
    unused = [key for key in state if key not in wanted and not key.endswith("num_batches_tracked")]
    if missing or misfits or (unused if is_detector else [key for key in unused if key.startswith(BODY)]):
        raise SettingError(_misfit_message(model.config, state, wanted, path, missing, misfits, unused))
    loaded = [key for key in wanted if key in state and key not in replaced]
    _check_values(state, wanted, loaded, path)
    model.load_state_dict({key: state[key] for key in loaded}, strict=False)
    initial = tuple(key for key in wanted if key not in state)
    return WeightReport(source, str(path), tuple(loaded), initial, tuple(sorted(replaced)), tuple(unused))


def _fits(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], key: str) -> bool:
    return state[key].shape == wanted[key].shape


def _misfit_message(
    config: NetworkSettings,
    state: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    path: Path,
    missing: list[str],
    misfits: list[str],
    unused: list[str],
) -> str:
    found = [f"{len(missing)} tensors are not in the file (first: {missing[0]})"] if missing else []
    if misfits:
        key = misfits[0]
        shapes = f"{tuple(state[key].shape)} in the file, {tuple(wanted[key].shape)} in the network"
        found.append(f"{len(misfits)} have another shape (first: {key}, {shapes})")
    if unused:
        found.append(f"{len(unused)} are not in the network (first: {unused[0]})")
    return (
        f"The weights in {path} must fit the network, but {'; '.join(found)}. "
        f"The network has backbone={config.backbone}, "
        f"head_norm={config.head_norm}, p6_from={config.p6_from}, head_depth={config.head_depth}, "
        f"fpn_channels={config.fpn_channels}; torchvision's retinanet_resnet50_fpn (weights=coco) has resnet50, none, "
        "p5, 4, 256 and its v2 (weights=coco_v2) has resnet50, group, c5, 4, 256. Change these settings, or use "
        "weights=imagenet or weights=none."
    )


def _file_of(source: str, config: NetworkSettings) -> Path:
    if source in CLASSIFIERS:
        published = get_model_weights(config.backbone).__members__
        if CLASSIFIERS[source] not in published:
            others = [name for name, recipe in CLASSIFIERS.items() if recipe in published] or ["none"]
            raise SettingError(
                f"weights={source} is not published for backbone={config.backbone}; use weights={others[0]}, "
                "or the path of a .pth file, or another backbone (resnet50 has both)."
            )
        return _published(published[CLASSIFIERS[source]].url)
    if source in DETECTORS:
        if config.backbone != "resnet50":
            raise SettingError(
                f"weights={source} is published for backbone=resnet50 only, but got backbone={config.backbone}; "
                "use weights=imagenet, or the path of a .pth file."
            )
        return _published(DETECTORS[source])
    path = Path(source)
    if not path.is_file():
        names = ", ".join(("none", *CLASSIFIERS, *DETECTORS))
        raise SettingError(
            f"weights must be one of {names}, or the path of a .pth file, but got {source!r}: no such file."
        )
    return path


def _name_of(url: str) -> str:
    return PurePosixPath(urlparse(url).path).name


def _published(url: str) -> Path:
    """The file of ``url`` in torch hub's checkpoint folder, fetched (with its hash checked) if it is not there."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / _name_of(url)
    if path.is_file():
        return path
    digest = re.search(r"-([0-9a-f]{8,})\.", path.name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        prefix = digest.group(1) if digest else None
        torch.hub.download_url_to_file(url, str(path), hash_prefix=prefix, progress=sys.stderr.isatty())
    except (OSError, HTTPException, RuntimeError) as error:
        raise DataError(
            f"The published weights {path.name} are not on this machine and could not be fetched ({error}). "
            f"Fetch {url} elsewhere and put it at {path}, or give the path of a .pth file, "
            "or use weights=none (training from nothing)."
        ) from error
    return path


def _read(path: Path) -> dict[str, Tensor]:
    try:
        content = _content(path)
    except ModuleNotFoundError as error:
        raise SettingError(f"weights={path} needs {error.name}: pip install {error.name}") from None
    # A damaged or foreign file makes the readers raise whatever their parsing meets.
    except Exception as error:
        raise DataError(
            f"{path} must be a state dict that torch.load(weights_only=True) reads, but it is not "
            f"({first_line(error)[:_SHOWN]}). If it is a published file, delete it and fetch it again."
        ) from error
    # Torchvision's reference scripts keep the state dict beside the optimizer under "model".
    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        content = content["model"]
    # A checkpoint of this program, or a merged model.
    elif isinstance(content, Mapping) and "members" in content:
        raise DataError(
            f"{path} must hold the weights of one network, but it is a merged model of several; give the checkpoint of "
            "one of its members."
        )
    elif isinstance(content, Mapping) and isinstance(content.get("state"), Mapping):
        content = content["state"]
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise DataError(f"{path} must hold a state dict (names -> tensors), but it holds {type(content).__name__}.")
    return {str(key): value for key, value in content.items()}


def _content(path: Path) -> object:
    if path.suffix == ".safetensors":
        return importlib.import_module("safetensors.torch").load_file(path)
    if zipfile.is_zipfile(path):
        # torch reads a damaged tensor without an error; the archive has checksums.
        check_archive(path)
    return torch.load(path, map_location="cpu", weights_only=True)


_SHOWN = 200
"""Letters of an error of a file that a message shows."""


def _check_values(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], loaded: Iterable[str], path: Path) -> None:
    """Raise DataError for tensors that hold no weights."""
    for key in loaded:
        value = state[key]
        # Some networks have tables of positions, which are whole numbers, beside their weights.
        other_kind = value.is_floating_point() != wanted[key].is_floating_point() or value.is_complex()
        if value.layout != torch.strided or other_kind or not bool(torch.isfinite(value).all()):
            raise DataError(
                f"{path}: weights must be finite numbers, but those of {key} are not ({value.dtype}); did their "
                "training diverge, or is the file damaged?"
            )


def _renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Older torchvision names -> those in use since 0.13.

    Heads: ``conv.{2 i}.weight`` -> ``conv.{i}.0.weight``; pyramid:
    ``inner_blocks.{i}.weight`` -> ``inner_blocks.{i}.0.weight``.
    """
    renamed = {}
    for key, value in state.items():
        name = re.sub(r"^(head\.\w+\.conv)\.(\d+)\.(weight|bias)$", lambda m: f"{m[1]}.{int(m[2]) // 2}.0.{m[3]}", key)
        name = re.sub(r"^(backbone\.fpn\.(?:inner|layer)_blocks\.\d+)\.(weight|bias)$", r"\1.0.\2", name)
        renamed[name] = value
    return renamed


def _absorb_zero_eps(state: dict[str, Tensor]) -> None:
    """Moves the missing epsilon of the COCO v1 file into its batch-norm weights.

    That file was trained with eps = 0 (pytorch/vision pull 2933), where the norms of every other file have 1e-5. The
    scale w / sqrt(var) equals w' / sqrt(var + eps) for w' = w * sqrt((var + eps) / var), so no setting has to travel
    along.
    """
    for key in [key for key in state if key.endswith(".running_var")]:
        name = key.removesuffix("running_var") + "weight"
        variance = state[key].double()
        ratio = torch.where(variance > 0, (variance + BATCH_NORM_EPS) / variance, torch.ones_like(variance))
        state[name] = (state[name].double() * ratio.sqrt()).to(state[name].dtype)
