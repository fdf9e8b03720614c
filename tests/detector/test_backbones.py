"""One network of each family under the feature pyramid, against what its own library makes of the same image."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision.models import get_model, get_model_weights
from torchvision.models.feature_extraction import create_feature_extractor

from retinaflow.detector.backbones import FrozenNorm
from retinaflow.detector.network import RetinaNet
from retinaflow.detector.onnx import onnx_detector
from retinaflow.detector.postprocess import detect
from retinaflow.detector.timm_backbones import published_values
from retinaflow.detector.weights import load_weights
from retinaflow.errors import DataError, SettingError
from retinaflow.settings.model_settings import PostprocessSettings
from retinaflow.settings.resolve import resolve
from retinaflow.settings.training_settings import NetworkSettings
from retinaflow.training.distributed import World
from retinaflow.training.synced_norm import SyncedBatchNorm2d, sync_batch_norms

slow = pytest.mark.slow

STAGES: Mapping[str, tuple[str, str, str]] = {
    "resnext50_32x4d": ("layer2", "layer3", "layer4"),
    "mobilenet_v3_small": ("features.3", "features.8", "features.12"),
    "efficientnet_b0": ("features.3", "features.5", "features.8"),
    "convnext_tiny": ("features.3", "features.5", "features.7"),
    "regnet_y_400mf": ("trunk_output.block2", "trunk_output.block3", "trunk_output.block4"),
    "swin_t": ("features.3", "features.5", "permute"),
    "densenet121": ("features.denseblock2", "features.denseblock3", "features.norm5"),
    "shufflenet_v2_x0_5": ("stage2", "stage3", "conv5"),
    "mnasnet0_5": ("layers.9", "layers.11", "layers.16"),
    "googlenet": ("inception3b", "inception4e", "inception5b"),
}
"""The modules of torchvision's networks at strides 8, 16 and 32, written down by hand."""

LONG = ("resnext50_32x4d", "convnext_tiny", "swin_t", "densenet121")
TORCHVISION = [pytest.param(name, marks=[slow] if name in LONG else [], id=name) for name in STAGES]
TIMM = ("timm:tf_efficientnet_lite0", "timm:convnext_atto", "timm:pvt_v2_b0", "timm:test_resnet")
SMALL = ("mobilenet_v3_small", "timm:tf_efficientnet_lite0")


def network(name: str, *, seed: int = 0, **more: Any) -> RetinaNet:
    """A detector of 64 channels for three classes."""
    settings = {"backbone": name, "fpn_channels": 64, "head_depth": 1, **more}
    return RetinaNet(resolve(NetworkSettings, settings), 3, seed=seed)


def uneven(model: nn.Module) -> nn.Module:
    """The model with batch statistics that are not 0 and 1, in evaluation."""
    generator = torch.Generator().manual_seed(3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


@pytest.fixture
def image(generator: torch.Generator) -> Tensor:
    return torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8, generator=generator)


def maps_of(model: RetinaNet, image: Tensor) -> list[Tensor]:
    """What the pyramid gets from the backbone, and the normalised image."""
    taken: list[Tensor] = []
    blocks = model.backbone.fpn.inner_blocks
    hooks = [block.register_forward_hook(lambda _, inputs, __: taken.append(inputs[0])) for block in blocks]
    with torch.no_grad():
        model(image)
    for hook in hooks:
        hook.remove()
    # The pyramid starts at the coarsest map.
    return sorted(taken, key=lambda one: -one.shape[2])


# Stages and values


@pytest.mark.parametrize("name", TORCHVISION)
def test_a_classifier_of_torchvision_is_cut_into_its_stages(name: str, image: Tensor, tmp_path: Path) -> None:
    more = {"init_weights": False, "transform_input": True} if name == "googlenet" else {}
    source = uneven(get_model(name, weights=None, **more))
    torch.save(source.state_dict(), tmp_path / "classifier.pth")
    model = network(name).eval()
    report = load_weights(model, str(tmp_path / "classifier.pth"))
    assert not report.replaced
    assert all(not key.startswith("backbone.body.") for key in (*report.initial, *report.unused))
    extractor = create_feature_extractor(source, list(STAGES[name]), suppress_diff_warning=True)
    with torch.no_grad():
        pixels = get_model_weights(name).DEFAULT.transforms()
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (pixels.mean, pixels.std))
        expected = list(extractor((image / 255 - mean) / std).values())
    for own, other, stride in zip(maps_of(model, image), expected, (8, 16, 32), strict=True):
        assert own.shape[2:] == (64 // stride, 96 // stride)
        other = other.permute(0, 3, 1, 2) if other.shape[1:3] == own.shape[2:] else other
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", TIMM)
def test_a_network_of_timm_gives_the_maps_that_timm_publishes(name: str, image: Tensor, tmp_path: Path) -> None:
    own_name = name.removeprefix("timm:")
    classifier = uneven(timm.create_model(own_name))
    torch.save(classifier.state_dict(), tmp_path / "classifier.pth")
    model = network(name).eval()
    report = load_weights(model, str(tmp_path / "classifier.pth"))
    assert all(not key.startswith("backbone.body.") for key in (*report.initial, *report.unused))
    configuration = timm.get_pretrained_cfg(own_name)
    assert model.mean.flatten().tolist() == pytest.approx(configuration.mean)
    with torch.no_grad():
        expected = classifier.forward_intermediates(
            (image / 255 - model.mean) / model.std, intermediates_only=True, output_fmt="NCHW"
        )
    by_size = {one.shape[2]: one for one in expected}
    for own, stride in zip(maps_of(model, image), (8, 16, 32), strict=True):
        torch.testing.assert_close(own, by_size[64 // stride], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [*TORCHVISION, *TIMM])
@pytest.mark.parametrize("size", [(64, 96), (75, 101)], ids=str)
def test_outputs_line_up_with_the_anchors_of_any_size(name: str, size: tuple[int, int]) -> None:
    model = network(name).eval()
    with torch.no_grad():
        output = model(torch.zeros(1, 3, *size, dtype=torch.uint8))
    assert output.class_logits.shape[1] == len(model.anchors(size).boxes)


def test_initial_values_follow_the_seed_and_no_global_one() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, other = network("mobilenet_v3_small", seed=1), network("mobilenet_v3_small", seed=2)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(5)
    same = network("mobilenet_v3_small", seed=1)
    for key, value in first.state_dict().items():
        assert torch.equal(value, same.state_dict()[key]), key
    key = "backbone.body.features.4.block.0.0.weight"
    assert not torch.equal(first.state_dict()[key], other.state_dict()[key])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        pytest.param("vit_b_16", "it takes images of certain sizes only", marks=slow),
        ("squeezenet1_1", "no side of its maps divides the image's"),
        ("alexnet", "no side of its maps divides the image's"),
        ("timm:vit_tiny_patch16_224", "its maps have strides 16"),
        ("timm:test_vit", "its maps have strides 16"),
    ],
)
def test_a_network_without_the_stages_is_refused_with_the_reason(name: str, reason: str) -> None:
    with pytest.raises(SettingError, match="needs stages at strides 8, 16 and 32") as caught:
        network(name)
    assert reason in str(caught.value)
    assert "mobilenet_v3_large" in str(caught.value)


# Frozen parts


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "efficientnet_b0", "timm:tf_efficientnet_lite0"])
def test_frozen_batch_norms_keep_their_epsilon_and_activation(name: str, image: Tensor) -> None:
    trained, frozen = network(name), network(name, batch_norm="frozen")
    epsilons = {module.eps for module in trained.backbone.body.modules() if isinstance(module, nn.BatchNorm2d)}
    assert epsilons == {module.eps for module in frozen.modules() if type(module).__name__ == "FrozenNorm"}
    assert not [module for module in frozen.modules() if isinstance(module, nn.BatchNorm2d)]
    assert name == "efficientnet_b0" or epsilons == {1e-3}
    uneven(trained)
    state = {key: value for key, value in trained.state_dict().items() if not key.endswith("num_batches_tracked")}
    frozen.load_state_dict(state)
    for own, other in zip(maps_of(frozen.train(), image), maps_of(trained, image), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [*TORCHVISION, *TIMM])
def test_the_last_stages_learn_and_all_that_learns_has_a_gradient(name: str, image: Tensor) -> None:
    counts = []
    for layers in range(6):
        model = network(name, trainable_layers=layers, batch_norm="frozen")
        learning = [parameter for parameter in model.backbone.body.parameters() if parameter.requires_grad]
        counts.append(len(learning))
        if layers in (0, 3):
            output = model.train()(image)
            (output.class_logits.sum() + output.box_deltas.sum()).backward()
            assert all(parameter.grad is not None for parameter in learning)
    assert counts[0] == 0 < counts[1] < counts[2] < counts[3] <= counts[4] <= counts[5]
    assert counts[5] == len(list(model.backbone.body.parameters()))


def test_a_stage_is_what_makes_the_map_of_its_stride() -> None:
    model = network("mobilenet_v3_small", trainable_layers=2, batch_norm="frozen")
    body = dict(model.backbone.body.named_parameters())
    assert {key.split(".")[1] for key, value in body.items() if value.requires_grad} == set("456789") | {
        "10",
        "11",
        "12",
    }
    model = network("timm:tf_efficientnet_lite0", trainable_layers=2, batch_norm="frozen")
    body = dict(model.backbone.body.named_parameters())
    learning = {".".join(key.split(".")[:2]) for key, value in body.items() if value.requires_grad}
    assert learning == {"blocks.3", "blocks.4", "blocks.5", "blocks.6"}


def test_a_norm_of_layers_has_nothing_to_freeze() -> None:
    trained, frozen = network("timm:convnext_atto"), network("timm:convnext_atto", batch_norm="frozen")
    assert trained.state_dict().keys() == frozen.state_dict().keys()


def test_a_batch_norm_with_its_activation_is_synced_with_it() -> None:
    plain, synced = network("timm:tf_efficientnet_lite0"), network("timm:tf_efficientnet_lite0")
    sync_batch_norms(synced, World(0, 2, 0))
    norms = [module for module in synced.modules() if isinstance(module, SyncedBatchNorm2d)]
    assert len(norms) == len([m for m in plain.modules() if isinstance(m, nn.BatchNorm2d)]) > 0
    assert {norm.eps for norm in norms} == {1e-3}
    assert plain.state_dict().keys() == synced.state_dict().keys()
    # One rank alone has the statistics of its batch.
    norm = timm.layers.BatchNormAct2d(3, eps=1e-3)
    values = torch.randn(4, 3, 5, 6, generator=torch.Generator().manual_seed(0))
    expected = norm(values)
    assert float(expected.detach().min()) == 0
    fresh = timm.layers.BatchNormAct2d(3, eps=1e-3)
    torch.testing.assert_close(SyncedBatchNorm2d(fresh, World()).train()(values), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fresh.running_var, norm.running_var)


def test_nothing_is_dropped_at_random(image: Tensor) -> None:
    model = network("efficientnet_b0").train()
    first, again = model(image), model(image)
    assert torch.equal(first.class_logits, again.class_logits)


# Published weights


def test_published_weights_of_another_family_are_read_from_their_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    url = get_model_weights("mobilenet_v3_small")["IMAGENET1K_V1"].url
    (tmp_path / "checkpoints").mkdir()
    source = uneven(get_model("mobilenet_v3_small", weights=None))
    torch.save(source.state_dict(), tmp_path / "checkpoints" / Path(urlparse(url).path).name)
    model = network("mobilenet_v3_small")
    report = load_weights(model, "imagenet")
    assert all(key.startswith("classifier.") for key in report.unused)
    expected = source.state_dict()["features.12.0.weight"]
    assert torch.equal(model.state_dict()["backbone.body.features.12.0.weight"], expected)
    with pytest.raises(
        SettingError, match="imagenet_v2 is not published for backbone=mobilenet_v3_small; use weights=im"
    ):
        load_weights(model, "imagenet_v2")


@pytest.mark.parametrize(
    ("name", "other", "words"),
    [
        ("mobilenet_v3_small", lambda: get_model("resnet18", weights=None), "tensors are not in the file"),
        ("efficientnet_b0", lambda: get_model("efficientnet_b1", weights=None), "are not in the network"),
        ("timm:convnext_atto", lambda: timm.create_model("convnext_nano"), "have another shape"),
        ("timm:test_resnet", lambda: timm.create_model("resnet10t"), "not in the"),
    ],
)
def test_weights_of_another_network_are_refused(
    name: str, other: Callable[[], nn.Module], words: str, tmp_path: Path
) -> None:
    torch.save(other().state_dict(), tmp_path / "other.pth")
    with pytest.raises(SettingError, match=f"must fit the network, but .*{words}"):
        load_weights(network(name), str(tmp_path / "other.pth"))


def test_safetensors_are_read(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    source = timm.create_model("test_resnet")
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    model = network("timm:test_resnet")
    load_weights(model, str(tmp_path / "model.safetensors"))
    for key, value in model.backbone.body.state_dict().items():
        assert torch.equal(value, source.state_dict()[key.replace("stem_", "stem.")]), key


def test_timms_weights_that_cannot_be_had_name_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", refuse)
    with pytest.raises(DataError, match=r"no route to host.*huggingface.co/timm/resnet18.*weights=PATH"):
        published_values("timm:resnet18", "imagenet")
    with pytest.raises(SettingError, match="choose a recipe by a tag"):
        published_values("timm:resnet18", "imagenet_v2")


def test_without_timm_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(SettingError, match=r"pip install 'retinaflow\[timm\]'"):
        resolve(NetworkSettings, {"backbone": "timm:resnet18"})


# Use


@pytest.mark.parametrize("name", [pytest.param(name, marks=slow) for name in (*SMALL, "convnext_tiny")])
def test_the_onnx_graph_gives_the_detections_of_the_detector(name: str) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model = network(name)
    with torch.no_grad():
        for part, spread in (("classification_head.cls_logits", 12.0), ("regression_head.bbox_reg", 2.0)):
            model.head.get_submodule(part).weight.mul_(spread)
    uneven(model)
    config = PostprocessSettings(max_detections=50)
    graph = onnx_detector(model, config, notes={"class_ids": json.dumps(["a", "b", "c"])})
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    for shape in ((2, 64, 160), (1, 75, 101)):
        images = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
        scores = session.run(["scores"], {"images": images})[0]
        with torch.no_grad():
            output = model(torch.from_numpy(images).permute(0, 3, 1, 2))
        expected = detect(output, model.anchors(shape[1:]), config=config)
        found = scores[scores > 0]
        assert len(found) == len(expected) > 10
        np.testing.assert_allclose(found, expected.score, atol=1e-3)


@slow
def test_a_graph_that_would_be_right_for_one_size_only_is_refused() -> None:
    pytest.importorskip("onnxruntime")
    with pytest.raises(SettingError, match="right for images of any size, but that of backbone=swin_t"):
        onnx_detector(network("swin_t"), PostprocessSettings(), notes={})


def test_a_frozen_norm_in_bfloat16_keeps_the_type_and_the_values_within_its_rounding() -> None:
    generator = torch.Generator().manual_seed(0)
    norm = torch.nn.BatchNorm2d(4)
    for part in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
        assert part is not None
        part.copy_(0.5 + torch.rand(4, generator=generator))
    frozen = FrozenNorm(norm)
    x = torch.randn(2, 4, 3, 3, generator=generator).bfloat16()
    made = frozen.in_its_type(x)
    assert made.dtype == torch.bfloat16
    # Three roundings of 2^-9, of values up to about 5.
    torch.testing.assert_close(made.float(), frozen(x.float()), rtol=0, atol=5 * 3 * 2**-9)
