from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet18
from torchvision.models.detection import retinanet_resnet50_fpn, retinanet_resnet50_fpn_v2
from torchvision.models.detection._utils import overwrite_eps
from torchvision.ops import FrozenBatchNorm2d

from retinaflow.detector.network import HeadNorm, RetinaNet
from retinaflow.detector.pyramid import CoarseConv
from retinaflow.detector.weights import COCO_V1_URL, COCO_V2_URL, load_weights
from retinaflow.settings.training_settings import NetworkSettings

TINY: dict[str, Any] = {"backbone": "resnet18", "head_norm": "none", "fpn_channels": 32, "head_depth": 1}
V1: dict[str, Any] = {"backbone": "resnet50", "head_norm": "none", "batch_norm": "frozen"}
V2: dict[str, Any] = {"backbone": "resnet50", "head_norm": "group", "p6_from": "c5"}


@pytest.fixture
def images(generator: torch.Generator) -> Tensor:
    return torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8, generator=generator)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty torch hub folder, and nothing to fetch from. Yields the checkpoint folder."""

    def refuse(*_: object, **__: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "urlopen", refuse)
    return tmp_path / "checkpoints"


def peer(build: Callable[..., nn.Module], num_classes: int, generator: torch.Generator) -> nn.Module:
    """A torchvision RetinaNet, its heads and norms made uneven so that equality means something."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build(weights=None, weights_backbone=None, num_classes=num_classes).eval()
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Conv2d) and name.startswith("head"):
                module.weight.normal_(std=0.03, generator=generator)
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
    return model


def outputs_of(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    # In float64: the activations of a network with random norms grow over the layers, and the rounding with them.
    model = model.double()
    with torch.no_grad():
        batch, _ = model.transform([image.double() / 255 for image in images])
        heads = model.head(list(model.backbone(batch.tensors).values()))
    return heads["cls_logits"], heads["bbox_regression"]


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    # What is left is the rounding of the mean, the deviation and the weights, which are kept in float32.
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


def sizeless(model: nn.Module, images: Tensor) -> nn.Module:
    """Torchvision's own resizing switched off: the shortest and longest sides are those of the images."""
    model.transform.min_size, model.transform.max_size = (min(images.shape[-2:]),), max(images.shape[-2:])
    return model


@pytest.mark.parametrize(
    ("build", "parts"), [(retinanet_resnet50_fpn, V1), (retinanet_resnet50_fpn_v2, V2)], ids=["v1", "v2"]
)
def test_torchvisions_weights_give_torchvisions_outputs(
    build: Callable[..., nn.Module], parts: dict[str, Any], images: Tensor, generator: torch.Generator, tmp_path: Path
) -> None:
    theirs = sizeless(peer(build, 5, generator), images)
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    ours = RetinaNet(NetworkSettings(**parts), 5).eval()
    report = load_weights(ours, str(tmp_path / "theirs.pth"))
    assert (report.initial, report.replaced, report.unused) == ((), (), ())
    logits, deltas = outputs_of(theirs, images)
    with torch.no_grad():
        got = ours.double()(images)
    assert_same(got.class_logits, logits)
    assert_same(got.box_deltas, deltas)


def test_coco_weights_trained_without_epsilon_give_torchvisions_outputs(
    images: Tensor, generator: torch.Generator, no_network: Path
) -> None:
    theirs = sizeless(peer(retinanet_resnet50_fpn, 5, generator), images)
    # Small variances, as the published file has: there the epsilon matters.
    for name, buffer in theirs.named_buffers():
        if name.endswith("running_var"):
            buffer.mul_(1e-4)
        if name.endswith("running_mean"):
            buffer.mul_(1e-2)
    for name, parameter in theirs.named_parameters():
        if ".bn" in name and name.endswith("weight"):
            parameter.data.mul_(1e-2)
    frozen = retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=5)
    frozen.backbone = _frozen(theirs.backbone)
    frozen.head, frozen.transform = theirs.head, theirs.transform
    overwrite_eps(frozen, 0.0)
    no_network.mkdir()
    torch.save(theirs.state_dict(), no_network / COCO_V1_URL.rsplit("/", 1)[1])
    ours = RetinaNet(NetworkSettings(**V1), 5).eval()
    load_weights(ours, "coco")
    logits, _ = outputs_of(frozen.eval(), images)
    with torch.no_grad():
        got = ours.double()(images).class_logits
    assert_same(got, logits)


def _frozen(module: nn.Module) -> nn.Module:
    """The module with its batch norms replaced by frozen ones of the same values."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(child.num_features)
            frozen.load_state_dict({k: v for k, v in child.state_dict().items() if k != "num_batches_tracked"})
            setattr(module, name, frozen)
        else:
            _frozen(child)
    return module


def test_older_key_names_of_torchvision_load(tmp_path: Path) -> None:
    source = RetinaNet(NetworkSettings(**TINY), 2, seed=1)
    older = {}
    for key, value in source.state_dict().items():
        name = key.replace(".conv.0.0.", ".conv.0.")
        older[name.replace(".0.weight", ".weight").replace(".0.bias", ".bias") if "_blocks." in key else name] = value
    assert older.keys() != source.state_dict().keys()
    torch.save({"model": older}, tmp_path / "older.pth")
    loaded = RetinaNet(NetworkSettings(**TINY), 2, seed=2)
    load_weights(loaded, str(tmp_path / "older.pth"))
    assert all(
        torch.equal(a, b) for a, b in zip(source.state_dict().values(), loaded.state_dict().values(), strict=True)
    )


def test_only_the_class_layer_is_replaced_when_the_number_of_classes_differs(tmp_path: Path) -> None:
    torch.save(RetinaNet(NetworkSettings(**TINY), 7, seed=1).state_dict(), tmp_path / "seven.pth")
    model = RetinaNet(NetworkSettings(**TINY), 3, seed=2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    report = load_weights(model, str(tmp_path / "seven.pth"))
    layer = "head.classification_head.cls_logits."
    assert report.replaced == (layer + "bias", layer + "weight")
    assert torch.equal(model.state_dict()[layer + "weight"], before[layer + "weight"])
    assert not torch.equal(
        model.state_dict()["head.regression_head.bbox_reg.weight"], before["head.regression_head.bbox_reg.weight"]
    )
    assert "2 replaced for another number of classes" in str(report)


@pytest.mark.parametrize("norm", ["train", "frozen"])
def test_a_classifiers_weights_fill_the_backbone_and_nothing_else(norm: Any, tmp_path: Path) -> None:
    classifier = resnet18(weights=None)
    torch.save(classifier.state_dict(), tmp_path / "classifier.pth")
    model = RetinaNet(NetworkSettings(batch_norm=norm, **TINY), 3)
    report = load_weights(model, str(tmp_path / "classifier.pth"))
    assert torch.equal(model.backbone.body.layer3[0].conv1.weight, classifier.layer3[0].conv1.weight)
    assert report.unused == ("fc.weight", "fc.bias")
    assert {name.split(".")[0] + name.split(".")[1] for name in report.initial} == {
        "backbonefpn", "headclassification_head", "headregression_head",
    }  # fmt: skip


def test_no_weights_keeps_the_initial_values_and_says_so() -> None:
    model = RetinaNet(NetworkSettings(**TINY), 2)
    report = load_weights(model, "none")
    assert report.loaded == ()
    assert "initial values" in str(report)


@pytest.mark.parametrize(
    ("source", "parts", "file"),
    [
        ("imagenet", {"backbone": "resnet18"}, "resnet18-f37072fd.pth"),
        ("imagenet", {"backbone": "resnet101"}, "resnet101-63fe2227.pth"),
        ("coco", {"backbone": "resnet50"}, "retinanet_resnet50_fpn_coco-eeacb38b.pth"),
        ("coco_v2", V2, "retinanet_resnet50_fpn_v2_coco-5905b1c5.pth"),
        ("imagenet_v2", {"backbone": "resnet50"}, "resnet50-11ad3fa6.pth"),
    ],
    ids=["resnet18", "resnet101", "coco-v1", "coco-v2", "imagenet-v2"],
)
def test_weights_that_cannot_be_had_say_which_file_from_where_and_the_way_out(
    source: str, parts: dict[str, Any], file: str, no_network: Path
) -> None:
    model = RetinaNet(NetworkSettings(**parts), 2)
    with pytest.raises(ValueError) as caught:
        load_weights(model, source)
    message = str(caught.value)
    assert f"https://download.pytorch.org/models/{file}" in message
    assert str(no_network / file) in message
    assert "weights=none" in message


def test_published_weights_already_on_the_machine_are_not_fetched(no_network: Path) -> None:
    no_network.mkdir()
    torch.save(resnet18(weights=None).state_dict(), no_network / "resnet18-f37072fd.pth")
    report = load_weights(RetinaNet(NetworkSettings(**TINY), 2), "imagenet")
    assert report.file == str(no_network / "resnet18-f37072fd.pth")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("coco", "weights=coco is published for backbone=resnet50 only"),
        ("coco_v2", "weights=coco_v2 is published for backbone=resnet50 only"),
        ("imagenet_v2", "weights=imagenet_v2 is not published for backbone=resnet18; use weights=imagenet"),
    ],
)
def test_weights_that_are_not_published_for_a_backbone_are_an_error(source: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        load_weights(RetinaNet(NetworkSettings(**TINY), 2), source)


@pytest.mark.parametrize("prior", [0.01, 0.001])
def test_the_published_detectors_by_name_fill_all_but_the_class_layer(prior: float, no_network: Path) -> None:
    """With torchvision's own models of 91 classes in the place where the published files belong."""
    no_network.mkdir()
    for build, url, source, parts in (
        (retinanet_resnet50_fpn, COCO_V1_URL, "coco", V1),
        (retinanet_resnet50_fpn_v2, COCO_V2_URL, "coco_v2", {**V2, "batch_norm": "frozen"}),
    ):
        torch.save(build(weights=None, weights_backbone=None).state_dict(), no_network / url.rsplit("/", 1)[1])
        model = RetinaNet(NetworkSettings(**parts, class_prior=prior), 5)
        report = load_weights(model, source)
        bias = model.state_dict()["head.classification_head.cls_logits.bias"]
        torch.testing.assert_close(bias.sigmoid(), torch.full((45,), prior))
        assert {name.rsplit(".", 1)[0] for name in report.replaced} == {"head.classification_head.cls_logits"}
        assert (report.initial, report.unused) == ((), ())


def test_weights_of_the_other_published_detector_are_an_error_that_names_it(no_network: Path) -> None:
    no_network.mkdir()
    state = retinanet_resnet50_fpn(weights=None, weights_backbone=None).state_dict()
    torch.save(state, no_network / COCO_V1_URL.rsplit("/", 1)[1])
    with pytest.raises(ValueError, match=r"not in the file.*its v2 \(weights=coco_v2\) has resnet50, group, c5"):
        load_weights(RetinaNet(NetworkSettings(**{**V2, "batch_norm": "frozen"}), 5), "coco")


def test_a_path_that_is_no_file_is_an_error() -> None:
    with pytest.raises(ValueError, match="'imagnet': no such file"):
        load_weights(RetinaNet(NetworkSettings(**TINY), 2), "imagnet")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"head_depth": 2}, "not in the file"),
        ({"fpn_channels": 64}, "another shape"),
        ({"backbone": "resnet34"}, "resnet34"),
    ],
    ids=["depth", "width", "backbone"],
)
def test_weights_of_another_network_are_an_error_that_names_the_settings(
    change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    torch.save(RetinaNet(NetworkSettings(**TINY), 2).state_dict(), tmp_path / "net.pth")
    model = RetinaNet(NetworkSettings(**{**TINY, **change}), 2)
    with pytest.raises(ValueError, match=words) as caught:
        load_weights(model, str(tmp_path / "net.pth"))
    assert "head_depth=" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint"], ids=["empty", "text"])
def test_a_damaged_file_is_an_error_with_the_next_step(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "bad.pth").write_bytes(content)
    with pytest.raises(ValueError, match="delete it and fetch it again"):
        load_weights(RetinaNet(NetworkSettings(**TINY), 2), str(tmp_path / "bad.pth"))


def test_a_file_without_a_state_dict_is_an_error(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="holds list"):
        load_weights(RetinaNet(NetworkSettings(**TINY), 2), str(tmp_path / "list.pth"))


@pytest.mark.parametrize("norm", ["train", "frozen"])
def test_every_tensor_is_initialised_by_the_seed_and_a_foreign_global_seed_has_no_effect(norm: Any) -> None:
    config = NetworkSettings(batch_norm=norm, **{**TINY, "head_norm": "group", "fpn_channels": 64})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        state = torch.get_rng_state()
        first = RetinaNet(config, 2, seed=3).state_dict()
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(2)
        second = RetinaNet(config, 2, seed=torch.Generator().manual_seed(3)).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    other = RetinaNet(config, 2, seed=4).state_dict()
    differing = {key for key in first if not torch.equal(first[key], other[key])}
    weights = {key for key in first if key.endswith("weight") and first[key].dim() == 4}
    assert differing == weights


def test_the_norm_of_the_heads_in_bfloat16_is_that_in_float32_within_its_rounding() -> None:
    norm = HeadNorm(16, 64)
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(2, 64, 9, 7, generator=generator).bfloat16().requires_grad_()
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5, generator=generator)
        norm.bias.uniform_(-0.5, 0.5, generator=generator)
    exact = norm(maps.float())
    weight = torch.randn(exact.shape, generator=generator)
    expected = torch.autograd.grad((exact * weight).sum(), [maps, norm.weight, norm.bias])
    got = norm.as_input(maps)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), exact, rtol=2**-7, atol=2**-7)
    found = torch.autograd.grad((got.float() * weight).sum(), [maps, norm.weight, norm.bias])
    for one, other in zip(found, expected, strict=True):
        assert float((one.float() - other.float()).norm() / other.float().norm()) < 0.01


@pytest.mark.parametrize(("settings", "prior"), [({}, 0.01), ({"class_prior": 0.001}, 0.001)])
def test_a_new_network_gives_every_class_its_prior(settings: dict[str, Any], prior: float, images: Tensor) -> None:
    model = RetinaNet(NetworkSettings(**TINY, **settings), 3).eval()
    with torch.no_grad():
        score = model(images).class_logits.sigmoid()
    assert prior / 2 < float(score.min()) <= float(score.max()) < prior * 2


@pytest.mark.parametrize("size", [(64, 96), (96, 64), (50, 71)])
@pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels-last"]
)
def test_outputs_line_up_with_the_anchors_of_the_image_shape(
    size: tuple[int, int], memory_format: torch.memory_format
) -> None:
    model = RetinaNet(NetworkSettings(**TINY), 4).eval().to(memory_format=memory_format)
    with torch.no_grad():
        output = model(torch.zeros(1, 3, *size, dtype=torch.uint8))
    count = len(model.anchors(size).boxes)
    assert output.class_logits.shape == (1, count, 4)
    assert output.box_deltas.shape == (1, count, 4)


def test_bytes_and_floats_of_the_same_image_give_the_same_outputs(images: Tensor) -> None:
    model = RetinaNet(NetworkSettings(**TINY), 2).eval()
    with torch.no_grad():
        assert torch.equal(model(images).class_logits, model(images.float()).class_logits)


def test_p6_comes_from_c5_when_asked_even_if_its_width_is_that_of_p5() -> None:
    model = RetinaNet(
        NetworkSettings(backbone="resnet18", head_norm="none", fpn_channels=512, head_depth=0, p6_from="c5"), 1
    )
    assert model.backbone.fpn.extra_blocks.use_P5 is False


@pytest.mark.parametrize(
    ("layers", "learning"),
    [(0, set()), (3, {"layer2", "layer3", "layer4"}), (5, {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4"})],
)
def test_the_last_backbone_stages_learn(layers: int, learning: set[str]) -> None:
    model = RetinaNet(NetworkSettings(trainable_layers=layers, **TINY), 1)
    assert {name.split(".")[0] for name, p in model.backbone.body.named_parameters() if p.requires_grad} == learning


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"trainable_layers": 6}, "trainable_layers\n.*less than or equal to 5"),
        ({"head_norm": "group", "fpn_channels": 48}, "multiple of 64"),
    ],
)
def test_settings_that_cannot_be_are_an_error_that_names_the_rule(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        NetworkSettings(**settings)


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (5, 1), (1, 2), (3, 3)], ids=str)
def test_coarse_levels_have_the_gradients_of_float32_also_in_bfloat16_on_a_cpu(shape: tuple[int, int]) -> None:
    """Maps one pixel wide were uninitialised memory (oneDNN), other values at each call."""
    generator = torch.Generator().manual_seed(0)
    conv = CoarseConv(64, 64).to(memory_format=torch.channels_last)
    with torch.no_grad():
        for parameter in conv.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    maps = torch.randn(2, 64, *shape, generator=generator).contiguous(memory_format=torch.channels_last)
    gradients = []
    for enabled in (False, True, True):
        # What the memory held before must not matter.
        del [torch.full((size,), float("nan")) for size in (64 * 64 * 9, 64 * 64 * 18, 65536)][:]
        conv.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            out = conv(maps)
        out.float().sum().backward()
        assert conv.weight.grad is not None
        gradients.append(conv.weight.grad.clone())
    exact, once, again = gradients
    assert torch.equal(once, again)
    # bfloat16 has 8 bits: each of the few terms of a sum is off by at most 2^-8 of its size.
    torch.testing.assert_close(once, exact, rtol=2**-6, atol=2**-6 * float(exact.abs().max()))


def test_published_levels_p6_and_p7_are_coarse_convolutions_with_their_names() -> None:
    model = RetinaNet(NetworkSettings(**TINY), 1)
    blocks = model.backbone.fpn.extra_blocks
    assert isinstance(blocks.p6, CoarseConv)
    assert isinstance(blocks.p7, CoarseConv)
    assert {"backbone.fpn.extra_blocks.p6.weight", "backbone.fpn.extra_blocks.p7.bias"} <= set(model.state_dict())
