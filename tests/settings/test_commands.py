"""Settings: where a value comes from, what ``auto`` stands for, and what an error names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from retinaflow.cli import build_parser
from retinaflow.errors import SettingError
from retinaflow.settings.commands import COMMANDS, BinningConfig, EvaluateConfig, TrainConfig
from retinaflow.settings.data_settings import TrackingSettings
from retinaflow.settings.resolve import RENAMED, resolve
from retinaflow.settings.training_settings import LossSettings


def _yaml(folder: Path, text: str) -> str:
    path = folder / "settings.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_flag_goes_over_the_yaml_file_and_that_over_the_default(tmp_path: Path) -> None:
    config = _yaml(tmp_path, "num_bins: 5\nbalance: 0.25\n")
    settings = resolve(TrainConfig, {"config": config, "num_bins": "3"})
    assert (settings.num_bins, settings.balance, settings.max_repeats) == (3, 0.25, 100.0)
    assert resolve(TrainConfig, {}).num_bins == 7


def test_a_yaml_file_takes_lists_and_the_words_of_the_command_line(tmp_path: Path) -> None:
    text = "train_splits: [train, extra]\nbin_edges: 10,100\nfocal_alpha: none\ntrack: false\n"
    settings = resolve(TrainConfig, {"config": _yaml(tmp_path, text)})
    assert settings.train_splits == ("train", "extra")
    assert settings.bin_edges == (10.0, 100.0)
    assert settings.focal_alpha is None
    assert settings.track is False


def test_no_yaml_file_is_asked_for_by_none() -> None:
    assert resolve(TrainConfig, {"config": "none"}) == resolve(TrainConfig, {})


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("demo", {"image_size": 112, "epochs": 3, "lr": 1e-3, "balance": 0.75, "focal_gamma": 1.0}),
        ("some/folder", {"image_size": 512, "epochs": 12, "lr": 3e-4, "balance": 0.75, "focal_gamma": 2.0}),
    ],
)
def test_auto_depends_on_the_data(data: str, expected: dict[str, Any]) -> None:
    settings = resolve(TrainConfig, {"data": data}).model_dump()
    assert {name: settings[name] for name in expected} == expected


def test_a_given_value_goes_over_auto_and_auto_as_given_is_the_default() -> None:
    settings = resolve(TrainConfig, {"data": "demo", "epochs": "2", "batch_size": "auto"})
    assert (settings.epochs, settings.batch_size) == (2, 4)
    assert settings.model_fields_set == {"data", "epochs"}


def test_auto_as_a_flag_goes_over_the_yaml_file(tmp_path: Path) -> None:
    config = _yaml(tmp_path, "epochs: 5\n")
    assert resolve(TrainConfig, {"config": config, "epochs": "auto"}).epochs == 3


@pytest.mark.parametrize("kind", COMMANDS.values(), ids=COMMANDS)
def test_settings_made_without_resolve_are_complete(kind: type[TrackingSettings]) -> None:
    assert kind() == resolve(kind, {})
    # What the data folder, the store, the hardware or the files decide is found out there.
    outside = {"hierarchy", "precision", "storage", "shard_size", "calibration"}
    outside |= {"source_format", "to", "exhaustive", "orientation", "voc_first_pixel", "box_unit", "coco_bbox"}
    assert {name for name, value in kind().model_dump().items() if value == "auto"} <= outside


def test_a_command_is_every_group_that_it_is_made_of() -> None:
    config = TrainConfig(focal_gamma=1.5, data="photos")
    loss = config.part(LossSettings)
    assert (loss.focal_gamma, type(loss)) == (1.5, LossSettings)
    assert loss == LossSettings(focal_gamma=1.5)


def test_no_setting_is_declared_twice() -> None:
    """Two classes that declare a setting of one name give it different types, but for convert and download, which read
    foreign data."""
    declared: dict[str, dict[str, str]] = {}
    for command in COMMANDS.values():
        for kind in command.__mro__:
            for name, annotation in vars(kind).get("__annotations__", {}).items():
                if name in command.model_fields and kind.__name__ not in ("ConvertConfig", "DownloadConfig"):
                    declared.setdefault(name, {})[kind.__name__] = annotation.replace("AtLeastOne", "int >= 1")
    twice = {
        name: kinds for name, kinds in declared.items() if len(kinds) > len(set(kinds.values())) and len(kinds) > 1
    }
    assert not twice


@pytest.mark.parametrize(
    ("weights", "norm"), [("none", "group"), ("imagenet", "group"), ("coco", "none"), ("coco_v2", "group")]
)
def test_heads_have_a_norm_unless_they_come_from_coco(weights: str, norm: str) -> None:
    assert resolve(TrainConfig, {"weights": weights}).head_norm == norm
    assert resolve(TrainConfig, {"weights": weights, "head_norm": "none"}).head_norm == "none"


@pytest.mark.parametrize(("weights", "p6_from"), [("coco", "p5"), ("coco_v2", "c5")])
@pytest.mark.parametrize("data", ["demo", "some/folder"])
def test_a_published_detector_brings_its_own_parts_unless_others_are_given(
    data: str, weights: str, p6_from: str
) -> None:
    settings = resolve(TrainConfig, {"data": data, "weights": weights})
    found = (settings.p6_from, settings.fpn_channels, settings.head_depth, settings.anchor_scale)
    assert found == (p6_from, 256, 4, 4.0)
    assert resolve(TrainConfig, {"data": data, "weights": weights, "anchor_scale": 3}).anchor_scale == 3


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"batch_norm": "train", "trainable_layers": 5, "weight_decay": 0.01, "lr": 1e-3, "backbone_lr_factor": 1}),
        ({"weights": "imagenet"}, {"batch_norm": "frozen", "trainable_layers": 3, "backbone_lr_factor": 0.1}),
        ({"weights": "imagenet", "optimizer": "sgd"}, {"backbone_lr_factor": 1}),
        # 4 batches of 8 images: 0.01 * 32 / 16.
        ({"optimizer": "sgd", "batch_size": 8, "accumulate": 4}, {"lr": 0.02, "weight_decay": 1e-4}),
        ({"optimizer": "sgd", "data": "photos"}, {"lr": 0.005}),
        ({"optimizer": "sgd", "lr": 0.3, "weight_decay": 0}, {"lr": 0.3, "weight_decay": 0.0}),
    ],
    ids=["from scratch", "loaded weights", "loaded weights, sgd", "sgd", "sgd with the batch of the profile", "given"],
)
def test_a_recipe_fits_its_weights_and_its_optimizer(given: dict[str, Any], expected: dict[str, Any]) -> None:
    settings = resolve(TrainConfig, given).model_dump()
    assert {name: settings[name] for name in expected} == expected


def test_it_stays_known_which_settings_were_given(tmp_path: Path) -> None:
    given = {"config": _yaml(tmp_path, "num_bins: 5\n"), "lr": "0.1"}
    assert resolve(TrainConfig, given).model_fields_set == {"config", "num_bins", "lr"}


def test_settings_cannot_be_changed_once_made() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        resolve(TrainConfig, {}).num_bins = 3  # type: ignore[misc]


def test_resolved_settings_survive_json() -> None:
    """What a checkpoint keeps gives the same settings again."""
    given = {"train_splits": "a,b", "focal_alpha": "none", "image_labels": "none", "eval_ids": "ids.txt", "data": "x"}
    settings = resolve(TrainConfig, given)
    assert resolve(TrainConfig, settings.model_dump(mode="json")) == settings


WORDS: list[tuple[str, str, Any]] = [
    ("track", "false", False),
    ("track", "true", True),
    ("train_splits", "train,validation", ("train", "validation")),
    ("boxes", "a.csv,b.csv", (Path("a.csv"), Path("b.csv"))),
    ("boxes", "none", ()),
    ("image_labels", "none", "none"),
    ("image_labels", "a.csv", (Path("a.csv"),)),
    ("bin_edges", "10,100,1000", (10.0, 100.0, 1000.0)),
    ("eval_ids", "none", None),
    ("hierarchy", "none", None),
    ("focal_alpha", "none", None),
    ("focal_alpha", "0.5", 0.5),
    ("focal_alpha", "0.5,0.25", (0.5, 0.25)),
    ("focal_gamma", "1.5", 1.5),
    ("focal_gamma", "1,1.5,2", (1.0, 1.5, 2.0)),
    ("image_size", "64", 64),
    ("lr", "1e-3", 0.001),
    ("resume", "none", None),
]


@pytest.mark.parametrize(("name", "word", "value"), WORDS, ids=[f"{name}={word}" for name, word, _ in WORDS])
def test_a_word_of_the_command_line_means(name: str, word: str, value: Any) -> None:
    assert getattr(resolve(TrainConfig, {name: word}), name) == value


BAD: list[tuple[str, str, str]] = [
    ("num_bins", "0", "num_bins >= 1 must hold, but got num_bins=0"),
    ("num_bins", "x", "num_bins must be a whole number, but got num_bins=x"),
    ("num_bins", "2.5", "num_bins must be a whole number, but got num_bins=2.5"),
    ("focal_gamma", "-1", "focal_gamma >= 0 must hold, but got focal_gamma=-1"),
    ("focal_alpha", "2", "focal_alpha <= 1 must hold, but got focal_alpha=2"),
    ("focal_alpha", "x", "focal_alpha must be a number, but got focal_alpha=x"),
    ("focal_alpha", "0.5,3", "focal_alpha <= 1 must hold, but got focal_alpha=3"),
    ("focal_gamma", "1,x", "focal_gamma must be a number or 'auto', but got focal_gamma=x"),
    ("focal_gamma", "none", "focal_gamma must be a number or 'auto', but got focal_gamma=none"),
    ("loss", "equalised", "loss must be 'focal' or 'equalized-focal', but got loss=equalised"),
    ("equalized_scale", "0", "equalized_scale > 0 must hold, but got equalized_scale=0"),
    ("class_prior", "0", "class_prior > 0 must hold, but got class_prior=0"),
    ("class_prior", "1", "class_prior < 1 must hold, but got class_prior=1"),
    ("nms", "hard", "nms must be 'nms' or 'soft-nms', but got nms=hard"),
    ("nms", "rest:nms:0.6", "nms must be 'nms' or 'soft-nms', but got nms=rest:nms:0.6"),
    ("batch_norm", "frozen", "batch_norm=frozen needs weights that bring statistics"),
    ("fpn_channels", "48", "fpn_channels must be a multiple of 64 with head_norm=group, but got fpn_channels=48"),
    ("max_boxes_per_class", "-1", "max_boxes_per_class >= 0 must hold, but got max_boxes_per_class=-1"),
    ("balance", "1.5", "balance <= 1 must hold, but got balance=1.5"),
    ("balance_start", "1", "balance_start < 1 must hold, but got balance_start=1"),
    ("empty_image_rate", "0", "empty_image_rate > 0 must hold, but got empty_image_rate=0"),
    (
        "backbone",
        "convnet_tiny",
        "backbone must be a classifier of torchvision or timm:NAME, but got backbone=convnet_tiny; did you mean "
        "convnext_tiny?",
    ),
    ("backbone", "timm:resnt50", "backbone must be a classifier of timm, but got backbone=timm:resnt50; did you mean "),
    ("score_threshold", "1", "score_threshold < 1 must hold, but got score_threshold=1"),
    ("sampling", "fair", "but got sampling=fair"),
    ("sampling", "bined", "but got sampling=bined; did you mean binned?"),
    ("epochs", "x", "epochs must be a whole number or 'auto', but got epochs=x"),
    ("epochs", "0", "epochs >= 1 must hold, but got epochs=0"),
    ("image_size", "16", "image_size >= 32 must hold, but got image_size=16"),
    ("lr", "fast", "lr must be a number or 'auto', but got lr=fast"),
    ("lr", "inf", "lr must be a finite number or 'auto', but got lr=inf"),
    ("focal_gamma", "nan", "but got focal_gamma=nan"),
    ("track", "maybe", "track must be true or false, but got track=maybe"),
    ("train_splits", "none", "train_splits must hold at least one value, but got train_splits=none"),
    ("train_splits", "", "train_splits must hold at least one value, but got train_splits=(empty)"),
    ("bin_edges", "10,x", "bin_edges must be a number, but got bin_edges=x"),
    ("seed", str(1 << 32), "a whole number must be at most 4,294,967,295, but got seed=4294967296"),
    ("batch_size", "1" + "0" * 400, "a whole number must be at most 4,294,967,295, but got batch_size=1000"),
    ("image_size", "16384", "image_size <= 8192 must hold, but got image_size=16384"),
    ("group_of_weight", "2", "group_of_weight <= 1 must hold, but got group_of_weight=2"),
    ("anchor_scale", "0.4", "anchor_scale >= 0.5 must hold, but got anchor_scale=0.4"),
    ("anchor_scale", "1e300", "anchor_scale <= 256 must hold, but got anchor_scale=1e300"),
    ("seed", "-1", "seed >= 0 must hold, but got seed=-1"),
    ("focal_gama", "2", "there is no setting focal_gama, but got focal_gama=2; did you mean focal_gamma?"),
    ("xyzzy", "2", "there is no setting xyzzy, but got xyzzy=2; the command's --help lists the settings"),
]


@pytest.mark.parametrize(
    ("name", "word", "message"), BAD, ids=[f"{name}={word[:40] or 'empty'}" for name, word, _ in BAD]
)
def test_an_error_names_rule_and_value(name: str, word: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        resolve(TrainConfig, {name: word})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("gamma", ["0.0", "1.0,0.0,2.0"])
def test_the_equalized_loss_needs_an_exponent_above_0(gamma: str) -> None:
    assert resolve(TrainConfig, {"focal_gamma": gamma}).loss == "focal"
    words = f"focal_gamma > 0 must hold with loss=equalized-focal, but got focal_gamma={gamma}"
    with pytest.raises(SettingError, match=words):
        resolve(TrainConfig, {"loss": "equalized-focal", "focal_gamma": gamma})


def test_all_bad_values_are_named_at_once_one_a_line() -> None:
    with pytest.raises(ValueError) as caught:
        resolve(TrainConfig, {"num_bins": "0", "epochs": "x"})
    assert [line.split()[0] for line in str(caught.value).splitlines()] == ["num_bins", "epochs"]


def test_of_very_many_bad_values_the_first_are_named_and_the_others_counted(tmp_path: Path) -> None:
    path = tmp_path / "other_program.yaml"
    path.write_text("".join(f"key{number}: 1\n" for number in range(1000)))
    with pytest.raises(SettingError) as caught:
        resolve(BinningConfig, {"config": str(path)})
    lines = str(caught.value).splitlines()
    assert len(lines) == 21
    assert "there is no setting key0" in lines[0]
    assert lines[-1] == "and 980 more"


BAD_FILES = [
    pytest.param(b"num_bins: 0\n", "num_bins >= 1 must hold, but got num_bins=0", id="a bad value"),
    pytest.param(b"data: 2018\n", "data must be text, but got data=2018", id="a number for a text"),
    pytest.param(b"sampling: [a\n", "settings.yaml line 2: not a readable YAML file", id="broken"),
    pytest.param(b"\xff\xfe\x00", "settings.yaml: the file must be text in UTF-8", id="not text"),
    pytest.param(b"- a\n", "settings.yaml: the file must map setting names to values, but holds list", id="a list"),
    pytest.param(b"nms_io: 1\n", "there is no setting nms_io", id="unknown setting"),
]


@pytest.mark.parametrize(("content", "message"), BAD_FILES)
def test_an_error_names_what_is_wrong_with_a_yaml_file(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "settings.yaml").write_bytes(content)
    with pytest.raises(ValueError) as caught:
        resolve(TrainConfig, {"config": str(tmp_path / "settings.yaml")})
    assert message in str(caught.value)


def test_a_missing_yaml_file_is_named() -> None:
    with pytest.raises(SettingError, match=r"config=nowhere\.yaml: no such file"):
        resolve(BinningConfig, {"config": "nowhere.yaml"})


@pytest.mark.parametrize("kind", COMMANDS.values(), ids=COMMANDS)
def test_every_default_as_written_is_that_default(kind: type[TrackingSettings]) -> None:
    """What --help and MLproject show can be given and changes nothing."""
    words = {name: kind.default_text(name) for name, field in kind.model_fields.items() if not field.exclude}
    # () stands for "look up" in image_labels, none for "there are none": there is no word for the former.
    words.pop("image_labels", None)
    assert kind.model_validate(words) == kind()


def test_evaluate_has_only_what_the_training_had_or_evaluating_needs() -> None:
    own = {
        "from_run",
        "predictions",
        "prediction_ids",
        "expand_predictions",
        "bootstrap",
        "iou_thresholds",
        "report_score",
        "error_analysis",
        "samples",
    }
    assert set(EvaluateConfig.model_fields) - set(TrainConfig.model_fields) == own


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_every_setting_with_its_default(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        build_parser().parse_args([command, "--help"])
    assert ended.value.code == 0
    # argparse breaks lines at the hyphens of a default too.
    text = "".join(capsys.readouterr().out.split())
    for name, field in COMMANDS[command].model_fields.items():
        assert field.exclude or f"--{name}" in text


def test_only_flags_that_are_given_reach_the_settings() -> None:
    given = vars(build_parser().parse_args(["train", "--num_bins", "3"]))
    assert given == {"command": "train", "num_bins": "3"}


@pytest.mark.parametrize("old", RENAMED)
def test_a_setting_by_its_earlier_name_is_accepted_with_a_message(old: str, capsys: pytest.CaptureFixture[str]) -> None:
    new = RENAMED[old]
    kind = next(kind for kind in COMMANDS.values() if new in kind.model_fields)
    values = {"size_table": "sizes.csv", "ground_truth": "false", "validation_fraction": "0.5", "difficult": "keep"}
    value = values.get(new, "3")
    assert getattr(resolve(kind, {old: value}), new) == getattr(kind.model_validate({new: value}), new)
    assert f"{old} is now called {new}" in capsys.readouterr().out
    with pytest.raises(SettingError, match=f"{old} is the earlier name of {new}, but both are given"):
        resolve(kind, {old: value, new: value})


def test_every_strategy_of_the_setting_has_its_weights() -> None:
    from retinaflow.data.sampling import _WEIGHTS, STRATEGIES

    assert set(_WEIGHTS) == set(STRATEGIES)


def test_the_task_of_mlperf_is_stated_by_a_file_of_settings() -> None:
    path = Path(__file__).parents[2] / "docs" / "mlperf-retinanet.yaml"
    config = resolve(TrainConfig, {"config": str(path)})
    assert (config.backbone, config.image_size, config.num_buckets) == ("resnext50_32x4d", 800, 1)
    assert (config.augment, config.rare_augment, config.horizontal_flip, config.copy_paste) == (0, 0, True, 0)
    assert (config.batch_size, config.schedule, config.epochs) == (256, "constant", 8)
    assert (config.lr, config.backbone_lr_factor) == (1e-4, 1)
    assert (config.head_norm, config.batch_norm, config.trainable_layers) == ("none", "frozen", 3)
    assert str(config.target) == "val/coco_AP:0.34"
