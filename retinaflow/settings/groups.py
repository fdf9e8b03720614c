"""Settings that several commands have: where results go, which data, how it is split and drawn, what is a detection."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from retinaflow.data.bins import BinStrategy
from retinaflow.data.images import OnBadImage
from retinaflow.data.sampling import BinRates, Strategy
from retinaflow.data.tables import OnBadRow
from retinaflow.settings.fields import (
    Auto,
    Fraction,
    Names,
    Numbers,
    OptionalPath,
    OptionalText,
    Paths,
    SuppressionRules,
    split_list,
)


class Settings(BaseModel):
    """Behaviour of all settings classes."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class TrackingSettings(Settings):
    """Where the results go; part of every command."""

    track: bool = True
    """Log to MLflow; false writes the same files under ``output`` only."""
    experiment: str = "retinaflow"
    """MLflow experiment of a run started without ``mlflow run``."""
    output: Path = Path("outputs")
    """Folder for checkpoints and, with track=false, for everything a run would log."""
    config: OptionalText = None
    """YAML file of settings (a path, or runs:/RUN_ID/best.yaml), or none; a flag overrides what it says."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of everything random."""


class DataSettings(TrackingSettings):
    """Which files are read, and which of their classes."""

    data: str = "demo"
    """Folder in the published Open Images layout, or demo for the generated set."""
    boxes: Paths = ()
    """CSV files of boxes, instead of those looked up by split; none: look up."""
    image_labels: Annotated[
        tuple[Path, ...] | Literal["none"], BeforeValidator(lambda v: v if v == "none" else split_list(v))
    ] = ()
    """CSV files of image-level labels, instead of those looked up by split; none: there are none."""
    classes: OptionalPath = None
    """Class list (id,name), instead of the one looked up."""
    hierarchy: OptionalText = "auto"
    """Hierarchy JSON; auto: looked up in the data folder; none: no hierarchy."""
    images: Paths = ()
    """Image folders, instead of images/, images/SPLIT and SPLIT/ in the data folder."""
    image_sizes: OptionalPath = None
    """Table of image sizes (ImageID,Width,Height) to believe instead of every file's header; none: headers."""
    class_group: str = "all"
    """Classes to train and evaluate: all, people-clothing, rest, bin:K, names or ids, or a file of them."""
    background_ratio: Annotated[float, Field(ge=0)] = 1.0
    """class_group other than all: training images without its boxes, verified absent first, per image with."""
    exhaustive: bool = False
    """Every object of every class is boxed, so a class without label on an image counts as verified absent."""
    on_bad_row: OnBadRow = "stop"
    """A row that breaks a rule stops the reading, or is dropped and listed in dropped.csv."""
    on_bad_image: OnBadImage = "stop"
    """An image without a readable file stops the run, or is skipped and listed in dropped.csv; so does one that can be
    read no more later: another stands in for it in training, and it has no detections in an evaluation."""


class ImagesFields(Settings):
    """Which images a model looks at. No annotation is needed."""

    data: str = "trained"
    """Folder in the published layout, demo, or trained: the data of the training."""
    split: str = "validation"
    """Split of data to look at: the images that its annotations name, or those of the folder of its name. With
    data=trained the default stands for what the model was evaluated on."""
    images: Paths = ()
    """Folders of images to look at instead of a split, with their subfolders."""
    image_list: OptionalPath = None
    """File of image ids, found in images or in the split's folders, or of paths relative to it; none: all images."""
    image_sizes: OptionalPath = None
    """Table of image sizes (ImageID,Width,Height) to believe instead of every file's header; none: headers."""
    on_bad_image: OnBadImage = "stop"
    """An image that cannot be read stops the run, or is skipped, listed in dropped.csv and has no detections."""


class SplitSettings(DataSettings):
    """What is trained on and what is evaluated on."""

    train_splits: Annotated[Names, Field(min_length=1)] = ("train",)
    """Splits to train on."""
    eval_split: str = "validation"
    """Split to evaluate on."""
    eval_ids: OptionalPath = None
    """File of image ids to evaluate on, taken out of the training splits; none: use eval_split."""
    eval_boxes: Paths = ()
    """CSV files of boxes to evaluate on, instead of those of eval_split."""
    eval_image_labels: Paths = ()
    """CSV files of image-level labels to evaluate on, instead of those of eval_split."""


FOLDER_SETTINGS: tuple[str, ...] = ("exhaustive", "image_labels", "hierarchy", "train_splits", "eval_split")
"""Settings that ``retinaflow.yaml`` in a data folder may give: what is true of the data whoever uses it. Paths are not
among them, so a folder from elsewhere cannot point out of itself."""


class SamplingFields(SplitSettings):
    """Frequency bins and how images are drawn."""

    bin_strategy: BinStrategy = "log"
    """How the axis of log10(training images) is cut into bins."""
    num_bins: Annotated[int, Field(ge=1)] = 7
    """Number of frequency bins; fewer result when one would be empty. 1: sampling=binned is uniform."""
    bin_edges: Numbers = ()
    """Explicit cuts between bins, in training images (10,100,1000); none: by bin_strategy and num_bins."""
    sampling: Strategy = "binned"
    """How often images are drawn."""
    balance: Fraction | Auto = "auto"
    """binned: quantile of images per class that rarer bins are lifted to; 0 lifts nothing; auto: 0.75, demo 0.5."""
    bin_rates: BinRates | Auto = "auto"
    """binned: one rate for all classes of a bin (step), or rates that change smoothly from bin to bin (smooth); auto:
    smooth, demo step."""
    class_power: Fraction = 0.0
    """class-aware: draws of a class go by its images to this power; 0: all classes alike."""
    background_rate: Annotated[float, Field(gt=0)] = 1.0
    """binned: draws of an image without boxes, relative to the least drawn image with boxes."""
    correction_steps: Annotated[int, Field(ge=0)] = 0
    """binned: steps that correct the rates for classes that occur together."""
    repeat_threshold: Annotated[float, Field(gt=0, le=1)] = 0.001
    """repeat-factor: share of images below which a class is repeated."""
    max_repeats: Annotated[float, Field(ge=1)] = 100.0
    """Most draws of one image in an epoch."""
    epoch_length: Annotated[int, Field(ge=0)] = 0
    """Images per epoch; 0: as many as there are."""
    parents: Literal["learn", "expand", "ignore"] = "learn"
    """Parent classes of the hierarchy: learn them from their children's boxes, expand detections to them, or ignore
    them."""


class PostprocessFields(Settings):
    """From the network's output to detections."""

    score_threshold: Annotated[float, Field(ge=0, lt=1)] = 0.02
    """Detections below this score are dropped."""
    nms: SuppressionRules = "nms"
    """How overlapping detections of one class are suppressed: nms, soft-nms, or support-nms (score is
    lost by how few raw boxes speak for a box), with a number if wanted (nms:0.6, soft-nms:0.3), for all classes or by
    class group (people-clothing:soft-nms,rest:nms)."""
    nms_iou: Annotated[float, Field(gt=0, le=1)] = 0.5
    """IoU above which the lower of two detections of a class is dropped (nms, support-nms)."""
    max_detections: Annotated[int, Field(ge=1)] = 300
    """Most detections per image."""


class DetectorSettings(PostprocessFields):
    """From a checkpoint and images to detections. Those of :class:`PostprocessFields` and precision are those of the
    training unless given."""

    image_size: Annotated[int, Field(ge=32)] | Literal["trained"] = "trained"
    """Square root of the area that images are resized to, pixels; trained: as in training."""
    batch_size: Annotated[int, Field(ge=1)] = 16
    """Images per batch of each process."""
    workers: Annotated[int, Field(ge=-1)] = -1
    """Loader processes of each process; 0: none; -1: by the machine (none without a GPU)."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic; auto: bfloat16 where the machine has it in hardware."""


class DetectionFields(PostprocessFields):
    """From the network's output to detections and their score."""

    group_of_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of a found group-of box: 1 is the Challenge rule, 0 the older V2 rule."""


class MergeFields(Settings):
    """How the detections of several models become those of one."""

    calibration: Literal["auto", "platt", "isotonic", "none"] = "auto"
    """Scores made comparable class by class, by the images that are evaluated (cross-fitted); auto: the method of highest
    held-out likelihood for each class; none: scores as they are."""
    min_truths: Annotated[int, Field(ge=1)] = 20
    """Ground-truth boxes of a class on the evaluated images below which its scores stay as they are."""
    folds: Annotated[int, Field(ge=2)] = 5
    """Parts of the images: those of one part get calibrators that were fitted on the other parts."""
    fusion_iou: Annotated[float, Field(gt=0, lt=1)] = 0.55
    """Classes that several models have: IoU above which their boxes are fused into one (weighted boxes fusion)."""
    expand_predictions: bool = False
    """Copy each merged detection to its class's ancestors; of overlapping ones of a class the best stays."""
