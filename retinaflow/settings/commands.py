"""Settings of every command: one class per command, made of groups.

A setting has one name everywhere: flag ``--focal_gamma``, ``-P focal_gamma=``, MLflow parameter, YAML key, field.

Pydantic takes the fields of the last base first, and the rule behind ``auto`` sees the fields before its own: so the
data come last among the bases.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from retinaflow.errors import SettingError
from retinaflow.settings.conversion_settings import ConvertConfig, DownloadConfig
from retinaflow.settings.data_settings import (
    BinSettings,
    DataSettings,
    EvalSplitSettings,
    SampledDataSettings,
    SplitSettings,
    TrackingSettings,
    TrainSplitSettings,
    with_defaults,
)
from retinaflow.settings.model_settings import (
    CocoIdSettings,
    ComparisonSettings,
    DetectingSettings,
    DetectorSettings,
    EvaluationSettings,
    ExpansionSettings,
    FromRunSettings,
    IntervalSettings,
    MergeSettings,
    ModelSettings,
    OverlapSettings,
    PredictionFileSettings,
    RunsSettings,
)
from retinaflow.settings.search_settings import SearchSettings
from retinaflow.settings.training_settings import (
    AnchorSettings,
    AugmentSettings,
    CheckpointSettings,
    InputSettings,
    LossSettings,
    NetworkSettings,
    OptimizationSettings,
    RankSettings,
    RegistrationSettings,
    TrainingMachineSettings,
)
from retinaflow.settings.value_types import (
    AtLeastOne,
    Count,
    Fraction,
    Names,
    OnResume,
    OptionalPath,
    OptionalText,
    Searched,
    as_text,
    split_list,
)

Thresholds = Annotated[
    tuple[Annotated[float, Field(gt=0, le=1)], ...] | Literal["coco"],
    BeforeValidator(lambda value: value if value == "coco" else split_list(value)),
]


class BinningConfig(SampledDataSettings, TrackingSettings):
    """``binning``: frequency bins and the exposure of every sampling strategy."""


@with_defaults(texts={"output": "Folder for checkpoints and, with track=false, for everything a run would log."})
class TrainConfig(
    TrainingMachineSettings,
    RegistrationSettings,
    CheckpointSettings,
    EvaluationSettings,
    AugmentSettings,
    LossSettings,
    OptimizationSettings,
    NetworkSettings,
    InputSettings,
    SampledDataSettings,
    TrackingSettings,
):
    """``train``: train a detector and evaluate it."""

    @model_validator(mode="after")
    def _statistics_are_there(self) -> TrainConfig:
        if self.batch_norm == "frozen" and self.weights == "none":
            raise SettingError(
                "batch_norm=frozen needs weights that bring statistics, but got weights=none; leave it at auto"
            )
        return self


@with_defaults(
    output=Path("outputs/evaluate"),
    data="trained",
    texts={
        "data": "Folder in the Open Images layout, demo, or trained: what the model was evaluated on in training.",
        "expand_predictions": "Copy each detection to the ancestors of its class before evaluating.",
    },
)
class EvaluateConfig(
    DetectorSettings,
    EvaluationSettings,
    ExpansionSettings,
    PredictionFileSettings,
    FromRunSettings,
    EvalSplitSettings,
    DataSettings,
    TrackingSettings,
):
    """``evaluate``: evaluate a trained model, or a file of predictions. For a model, score_threshold, nms and the other
    settings of detections, group_of_weight and precision are those of its training unless given."""

    title = "Evaluation"

    iou_thresholds: Thresholds = ()
    """Further IoU thresholds for AP, and their mean: a list, or coco (0.5 to 0.95); none: 0.5 only."""
    report_score: Fraction = 0.5
    """Score at which per_class_details.csv reports precision and recall."""
    bootstrap: Count = 200
    """Resamples of the images for intervals; 0: no intervals."""
    error_analysis: bool = True
    """Also analyse what each kind of error costs: about 4 s per million detections."""
    samples: Annotated[int, Field(ge=0, le=200)] = 24
    """Images on the page detections.html, first those with missed boxes of the rarest classes; 0: no page."""


@with_defaults(
    output=Path("outputs/explore"),
    texts={
        "train_splits": "Splits to look at.",
        "image_size": "Square root of the area that a training would resize images to, pixels.",
        "num_buckets": "Aspect buckets that a training would use.",
        "anchor_scale": "Anchors that boxes are compared with: base side over the stride of their level.",
    },
)
class ExploreConfig(AnchorSettings, InputSettings, BinSettings, TrainSplitSettings, DataSettings, TrackingSettings):
    """``explore``: one HTML page about the data: classes, bins, boxes, shapes, labels, suspicious rows."""

    title = "Page"

    samples: Count = 12
    """Rarest classes shown with an image; 0: none, and no image file is opened."""


@with_defaults(
    output=Path("outputs/predict"),
    texts={
        "output": "Folder of the predictions, and of the shards that an interrupted run resumes from.",
        "prediction_ids": "file_format=json: COCO file whose ids of images and categories are written "
        "(instances_val.json); none: ids are those of the data, categories count the class list from 1.",
    },
)
class PredictConfig(CocoIdSettings, RankSettings, DetectingSettings, TrackingSettings):
    """``predict``: detections of a trained model on a folder, a list or a split of images, in files; an interrupted run
    is resumed by the same command."""

    title = "Files"

    file_format: Literal["csv", "parquet", "json"] = "csv"
    """Format of the file of all predictions, which evaluate reads; json: COCO results."""
    submission: OptionalPath = None
    """Also write a Kaggle submission of the Challenge (ImageId,PredictionString) to this file."""
    shard_size: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Images of one shard, the most that an interruption loses; auto: 1,000, or fewer for four shards per process."""
    overwrite: bool = False
    """Start anew in an output folder that holds predictions of another model, other settings or other images."""

    @model_validator(mode="after")
    def _ids_are_written(self) -> PredictConfig:
        if self.prediction_ids is not None and self.file_format != "json":
            raise SettingError(
                f"prediction_ids applies to file_format=json, but got file_format={self.file_format}, "
                f"prediction_ids={self.prediction_ids}"
            )
        return self


@with_defaults(output=Path("outputs/visualize"))
class VisualizeConfig(PredictionFileSettings, DetectingSettings, TrackingSettings):
    """``visualize``: images with detections of a model or of a file of predictions, and ground truth where there is
    any."""

    title = "Figures"

    samples: AtLeastOne = 12
    """Images, a random sample by seed."""
    ids: Names = ()
    """Ids of the images; none: a random sample."""
    min_score: Fraction = 0.3
    """Minimum score of the detections that are shown."""
    ground_truth: bool = True
    """Show the annotated boxes beside the detections, if there are any."""
    longest_side: Annotated[int, Field(ge=64)] = 1024
    """Maximum side of a figure, pixels; small images are enlarged up to four times."""


@with_defaults(output=Path("outputs/model.onnx"), texts={"output": "File to write."})
class ExportConfig(ModelSettings, TrackingSettings):
    """``export``: a trained model as an ONNX file."""


@with_defaults(output=Path("outputs/compare"))
class CompareConfig(ComparisonSettings):
    """``compare``: which setting is better, for which classes, and is that chance? One HTML report."""

    title = "Page"

    samples: Annotated[int, Field(ge=0, le=50)] = 6
    """Images of objects that one run finds and the other misses, each way; 0: none."""


class PromoteConfig(ComparisonSettings):
    """``promote``: register the best run's model as champion if it beats the present one."""

    title = "Registry"

    register_as: str = "retinaflow"
    """Name of the registered model."""
    alias: str = "champion"
    """Alias that the promoted version gets."""
    force: bool = False
    """Promote without a test."""


@with_defaults(
    output=Path("outputs/merge"),
    texts={
        "runs": "Runs of train, evaluate or merge by id or name (with track=false: folders), evaluated on the same "
        "images; none: the parts of the last split.",
        "nms_iou": "expand_predictions: IoU above which the lower of two detections of a class is dropped.",
        "max_detections": "Maximum detections per image, over all classes of all models.",
    },
)
class MergeConfig(RegistrationSettings, OverlapSettings, MergeSettings, RunsSettings, TrackingSettings):
    """``merge``: several models, of different classes or of the same, as one: calibrated, joined, fused, evaluated."""

    title = "Merging"

    calibrators: OptionalText = None
    """Run (or folder) of an earlier merge of the same models, evaluated on other images, whose calibrators are used;
    none: fit them here."""


@with_defaults(texts={"from_run": "Run of one model for all classes to compare with, evaluated on the same images."})
class SplitConfig(FromRunSettings, IntervalSettings, MergeSettings, TrainConfig):
    """``split``: train a model for each group of classes, merge them, and compare with one model for all classes."""

    title = "Class groups"

    groups: str = "people-clothing+rest"
    """Class groups joined by +, each written as class_group is (Car,Bus+Tree, bin:1+bin:2, bin:1..3 for three)."""
    with_all: bool = False
    """Train one model for all classes too, by the same settings, to compare with."""
    reuse: bool = True
    """Reuse a model that an earlier split has trained by the same settings on the same data."""


class MainConfig(TrainConfig):
    """``main``: bin, train with uniform and with ``sampling``, compare AP per bin."""

    side_by_side: bool = True
    """Without a GPU, train both at the same time, each on half of the cores; false: one after the other, in half of the
    memory."""


@with_defaults(eval_every=1, texts={"dry_run": "Only print how many images the search will see and how long it takes."})
class SearchConfig(SearchSettings, TrainConfig):
    """``search``: find settings that are better for rare classes than the defaults, with Optuna. Searchable settings
    take a range low..high (low..high:log), choices a,b,c, or one value, which fixes them."""

    space: Annotated[Mapping[str, str], Field(exclude=True)] = {}
    """Searched settings and their range or choices, from what is given for them; no setting itself."""

    @model_validator(mode="before")
    @classmethod
    def _space_of_given(cls, values: Any) -> Any:
        """Ranges and choices move to ``space``; a single value fixes its setting, in the space or not."""
        if not isinstance(values, Mapping) or "space" in values:
            return values
        own, space = dict(values), {}
        for name, searched in searchable().items():
            text = searched.space if own.get(name, "auto") == "auto" else as_text(own[name])
            if text is not None and (".." in text or "," in text):
                space[name] = text
                own.pop(name, None)
            elif text is not None:
                own[name] = text
        return {**own, "space": space}

    @classmethod
    def default_text(cls, name: str) -> str:
        """The default of a setting as it is written: a range where it is searched."""
        searched = searchable().get(name)
        return searched.space if searched and searched.space else super().default_text(name)


def searchable() -> Mapping[str, Searched]:
    """The settings that a search may vary, and how, by the metadata of their fields; those that others depend on come
    first, which is the order in which a trial asks for them."""
    found = {
        name: item
        for name, field in TrainConfig.model_fields.items()
        for item in field.metadata
        if isinstance(item, Searched)
    }
    return dict(sorted(found.items(), key=lambda pair: bool(pair[1].when)))


def _may_change(kind: OnResume) -> frozenset[str]:
    """The settings of a training with this metadata: what may change when it is resumed."""
    return frozenset(name for name, field in TrainConfig.model_fields.items() if kind in field.metadata)


WITHOUT_EFFECT, STEERING = _may_change(OnResume.FREE), _may_change(OnResume.STEERS)
"""Settings of a training that change nothing of its result, and those that steer the rest when it is resumed. Which
data it is on is without effect, as its digest is compared."""
ABOUT_DATA = frozenset({*DataSettings.model_fields, *SplitSettings.model_fields})
"""Settings that choose and read the data."""


COMMANDS: Mapping[str, type[TrackingSettings]] = {
    "main": MainConfig,
    "binning": BinningConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "predict": PredictConfig,
    "visualize": VisualizeConfig,
    "export": ExportConfig,
    "explore": ExploreConfig,
    "compare": CompareConfig,
    "promote": PromoteConfig,
    "search": SearchConfig,
    "convert": ConvertConfig,
    "download": DownloadConfig,
    "merge": MergeConfig,
    "split": SplitConfig,
}
