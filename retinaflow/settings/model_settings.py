"""Groups of settings of detections and models: postprocessing, evaluating, using a model, comparing, merging."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from retinaflow.settings.data_settings import ImageFileSettings, Settings, TrackingSettings, with_defaults
from retinaflow.settings.resolve import refuse_without_effect
from retinaflow.settings.training_settings import BatchSettings, ComputeSettings
from retinaflow.settings.value_types import (
    STEERS,
    AtLeastOne,
    Count,
    Fraction,
    Names,
    OptionalPath,
    OptionalText,
    Searched,
    as_text,
)


class OverlapSettings(Settings):
    """How many detections are left of overlapping ones."""

    title = "Detections"

    nms_iou: Annotated[float, Field(gt=0, le=1), STEERS, Searched(when={"nms": ("nms",)})] = 0.5
    """nms: IoU above which the lower of two detections of a class is dropped."""
    max_detections: Annotated[AtLeastOne, STEERS] = 300
    """Maximum detections per image, over all classes."""
    max_detections_per_class: Annotated[Count, STEERS] = 0
    """Maximum detections per image and class; 0: only max_detections limits them."""


class PostprocessSettings(OverlapSettings):
    """From the network's output to detections: :func:`retinaflow.detector.postprocess.detect`."""

    candidates_per: Annotated[Literal["level", "class"], STEERS] = "level"
    """The best 1,000 candidates before suppression are those of each pyramid level, or of each class of it."""
    score_threshold: Annotated[float, Field(ge=0, lt=1), STEERS] = 0.02
    """Detections below this score are dropped."""
    nms: Annotated[Literal["nms", "soft-nms"], STEERS, Searched()] = "nms"
    """Of overlapping detections of a class the lower one is dropped, or loses score (Bodla et al. 2017)."""


class EvaluationSettings(PostprocessSettings):
    """From the network's output to detections and their score."""

    group_of_weight: Annotated[Fraction, STEERS] = 1.0
    """Weight of a found group-of box in the metric: 1 is the Challenge rule, 0 the older V2 rule."""


class ExpansionSettings(Settings):
    """Detections of parent classes."""

    title = "Detections"

    expand_predictions: bool = False
    """Copy each detection to the ancestors of its class; of overlapping ones of a class the best stays."""


class CocoIdSettings(Settings):
    """What ids of COCO results stand for."""

    title = "Files"

    prediction_ids: OptionalPath = None
    """predictions=*.json: COCO file that lists its images and categories (instances_val.json); none: ids are those of
    the data, categories count the class list from 1."""


class PredictionFileSettings(CocoIdSettings):
    """Detections from a file."""

    title = "Model"

    predictions: OptionalPath = None
    """Detections to use instead of a model: CSV, Parquet, a Kaggle submission, or COCO results in JSON."""


def refuse_settings_of_model(config: PredictionFileSettings, *more: str) -> None:
    """Raise SettingError for a setting that only a model reads, beside a file of predictions; and for the ids of a JSON
    file without one. ``more``: further settings that only a model reads."""
    if config.predictions is not None:
        of_model = [*PostprocessSettings.model_fields, "image_size", "precision", *more]
        refuse_without_effect(config, of_model, beside=f"predictions={config.predictions}")
    if config.predictions is None or config.predictions.suffix.lower() != ".json":
        refuse_without_effect(config, ["prediction_ids"], beside=f"predictions={as_text(config.predictions)}")


class FromRunSettings(Settings):
    """A trained model."""

    title = "Model"

    from_run: OptionalText = None
    """Run id, models:/NAME@ALIAS, models:/NAME/VERSION or a checkpoint file; none: the last training."""


class ModelSettings(FromRunSettings, PostprocessSettings):
    """A trained model. Settings of detections that are not given are those of its training."""


@with_defaults(batch_size=16, texts={"batch_size": "Images per batch of a process."})
class DetectorSettings(BatchSettings, ComputeSettings, PostprocessSettings):
    """From a checkpoint and images to detections. Settings of detections and ``precision`` are those of the training
    unless given."""

    title = "Machine"

    image_size: Annotated[int, Field(ge=32, le=8192)] | Literal["trained"] = "trained"
    """Square root of the area that images are resized to, pixels; trained: as in training."""


@with_defaults(
    data="trained",
    texts={
        "data": "Folder in the Open Images layout, demo, or trained: the data of the training.",
        "images": "Folders of images to look at instead of a split, with their subfolders.",
    },
)
class ImagesSettings(ImageFileSettings):
    """Which images a model looks at. No annotation is needed."""

    split: str = "validation"
    """Split of data; with data=trained the default is what the model was evaluated on."""
    image_list: OptionalPath = None
    """File of image ids, found in images or in the split's folders, or of paths relative to it; none: all images."""


class DetectingSettings(DetectorSettings, ModelSettings, ImagesSettings):
    """A trained model that looks at images."""

    parents: Literal["trained", "expand"] = "trained"
    """Detections of parent classes: as in training, or expand: each detection also counts for the ancestors of its
    class."""


class RunsSettings(Settings):
    """Several runs."""

    title = "Runs"

    runs: Names = ()
    """Runs by id or name (with track=false: folders), comma-separated."""


class IntervalSettings(Settings):
    """How sure a difference must be."""

    title = "Intervals"

    bootstrap: Annotated[int, Field(ge=100)] = 1000
    """Resamples of the images for intervals."""


@with_defaults(
    texts={
        "runs": "Runs of train or evaluate by id or name (with track=false: folders), the first is compared with; runs "
        "with other seeds are joined by + (a1+a2,b1+b2); none: those that filter finds."
    }
)
class ComparisonSettings(RunsSettings, IntervalSettings, TrackingSettings):
    """Which evaluated runs are compared, and how."""

    filter: OptionalText = None
    """MLflow filter (params.num_bins = '7'); runs that differ by seed only are pooled; none: the last two trainings."""
    from_experiment: OptionalText = None
    """MLflow experiment that filter looks in; none: all."""
    confidence: Annotated[float, Field(ge=0.5, lt=1)] = 0.95
    """Confidence of the intervals; 1 - confidence is the false discovery rate of classes marked as sure."""


class FusionSettings(ExpansionSettings):
    """How the detections of several models become those of one."""

    title = "Merging"

    fusion_iou: Annotated[float, Field(gt=0, lt=1)] = 0.55
    """IoU above which boxes of a class from several models are fused (weighted boxes fusion)."""


class JoinSettings(OverlapSettings, FusionSettings):
    """All that decides which detections of several models remain."""


class MergeSettings(FusionSettings):
    """How several models become one."""

    title = "Merging"

    calibration: Literal["auto", "platt", "isotonic", "none"] = "auto"
    """How scores are calibrated class by class (cross-fitted); auto: by held-out likelihood; none: not at all."""
    min_ground_truth: AtLeastOne = 20
    """Ground-truth boxes of a class below which its scores are not calibrated."""
    folds: Annotated[int, Field(ge=2)] = 5
    """Parts of the images for cross-fitting of calibrators."""
