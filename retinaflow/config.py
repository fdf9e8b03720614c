"""Settings of every command: frozen, typed, checked; one class per command.

A setting has one name everywhere: flag ``--focal_gamma``, ``-P focal_gamma=``, MLflow parameter, YAML key, field. The
docstring of a field is its help text and says meaning, unit and special values. Lists are comma-separated; ``none``
is a written value.

``auto`` stands for a value that depends on the data; :mod:`retinaflow.resolving` fills it in.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from retinaflow.data.bins import BinStrategy
from retinaflow.data.image_files import OnBadImage
from retinaflow.data.sampling import Strategy
from retinaflow.data.tables import OnBadRow


def _split(value: Any) -> Any:
    if isinstance(value, str):
        return () if value == "none" else tuple(part.strip() for part in value.split(",") if part.strip())
    return value


def _none(value: Any) -> Any:
    return None if value == "none" else value


Auto = Literal["auto"]
Names = Annotated[tuple[str, ...], BeforeValidator(_split)]
Numbers = Annotated[tuple[float, ...], BeforeValidator(_split)]
Paths = Annotated[tuple[Path, ...], BeforeValidator(_split)]
OptionalPath = Annotated[Path | None, BeforeValidator(_none)]
OptionalText = Annotated[str | None, BeforeValidator(_none)]
Share = Annotated[float, Field(ge=0, le=1)]


def _dial(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(_dial, value))
    return str(value).lower() if isinstance(value, bool) else "none" if value is None else str(value)


Dial = Annotated[Any, BeforeValidator(_dial)]
"""A setting that may be searched, as text: ``low..high`` (``low..high:log``), choices ``a,b,c``, or one value, which is
not searched. The values keep to the rules that the setting has in training."""


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
        tuple[Path, ...] | Literal["none"], BeforeValidator(lambda v: v if v == "none" else _split(v))
    ] = ()
    """CSV files of image-level labels, instead of those looked up by split; none: there are none."""
    classes: OptionalPath = None
    """Class list (id,name), instead of the one looked up."""
    hierarchy: OptionalText = "auto"
    """Hierarchy JSON; auto: looked up in the data folder; none: no hierarchy."""
    images: Paths = ()
    """Image folders, instead of images/, images/SPLIT and SPLIT/ in the data folder."""
    class_group: str = "all"
    """Classes to train and judge: all, people-clothing, rest, bin:K, names or ids, or a file of them."""
    background_ratio: Annotated[float, Field(ge=0)] = 1.0
    """class_group other than all: training images without its boxes, verified absent first, per image with."""
    exhaustive: bool = False
    """Every object of every class is boxed, so a class without label on an image counts as verified absent."""
    on_bad_row: OnBadRow = "stop"
    """A row that breaks a rule stops the reading, or is dropped and listed in dropped.csv."""
    on_bad_image: OnBadImage = "stop"
    """An image without a readable file stops the run, or is skipped and listed in dropped.csv."""


class SplitSettings(DataSettings):
    """What is trained on and what is judged on."""

    train_splits: Annotated[Names, Field(min_length=1)] = ("train",)
    """Splits to train on."""
    eval_split: str = "validation"
    """Split to judge on."""
    eval_ids: OptionalPath = None
    """File of image ids to judge on, taken out of the training splits; none: use eval_split."""
    eval_boxes: Paths = ()
    """CSV files of boxes to judge on, instead of those of eval_split."""
    eval_image_labels: Paths = ()
    """CSV files of image-level labels to judge on, instead of those of eval_split."""


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
    balance: Share | Auto = "auto"
    """binned: quantile of images per class that rarer bins are lifted to; 0 lifts nothing; auto: 0.75, demo 0.3."""
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


class BinningConfig(SamplingFields):
    """``binning``: frequency bins and the exposure of every sampling strategy."""


class DetectionFields(Settings):
    """From the network's output to detections and their score."""

    score_threshold: Annotated[float, Field(ge=0, lt=1)] = 0.02
    """Detections below this score are dropped."""
    nms: Literal["nms", "soft-nms"] = "nms"
    """How overlapping detections of one class are thinned out."""
    nms_iou: Annotated[float, Field(gt=0, le=1)] = 0.5
    """IoU above which the lower of two detections of a class is dropped (nms)."""
    max_detections: Annotated[int, Field(ge=1)] = 300
    """Most detections per image."""
    group_of_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of a found group-of box: 1 is the Challenge rule, 0 the older V2 rule."""


class TrainConfig(SamplingFields, DetectionFields):
    """``train``: train a detector and judge it."""

    backbone: Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"] = "resnet18"
    """ResNet under the feature pyramid."""
    weights: str = "none"
    """Start: none (random), imagenet, coco, or a file."""
    image_size: Annotated[int, Field(ge=32)] | Auto = "auto"
    """Square root of the area that images are resized to, pixels."""
    num_buckets: Annotated[int, Field(ge=1)] | Auto = "auto"
    """Aspect buckets; 1: one fixed shape."""
    fpn_channels: Annotated[int, Field(ge=8)] | Auto = "auto"
    """Channels of the feature pyramid and the heads, a multiple of 64 with head_norm=group; torchvision has 256."""
    head_norm: Literal["none", "group"] | Auto = "auto"
    """Norm in the heads: group (trains better from scratch), none; auto: none with weights=coco, else group."""
    head_depth: Annotated[int, Field(ge=1)] | Auto = "auto"
    """Convolutions in each head; torchvision has 4."""
    anchor_scale: Annotated[float, Field(gt=0)] | Auto = "auto"
    """Side of the smallest anchor of a level over the level's stride; torchvision has 4."""
    batch_size: Annotated[int, Field(ge=1)] | Auto = "auto"
    """Images per step."""
    epochs: Annotated[int, Field(ge=1)] | Auto = "auto"
    """Epochs."""
    lr: Annotated[float, Field(gt=0)] | Auto = "auto"
    """Highest learning rate (AdamW; warm-up, then cosine to 0)."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Weight decay of AdamW, not on biases and norms."""
    warmup: Share = 0.1
    """Share of all steps in which the learning rate rises."""
    clip: Annotated[float, Field(gt=0)] = 5.0
    """Largest norm of the gradient."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic; auto: bfloat16 where the machine has it in hardware."""
    workers: Annotated[int, Field(ge=-1)] = -1
    """Loader processes; 0: none; -1: by the machine (none without a GPU)."""
    balance_start: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Share of the epochs drawn uniformly before the sampling strategy takes over."""
    augment: Share = 0.5
    """Augmentation strength for images of the most frequent bin; 0: none."""
    rare_augment: Share = 0.8
    """Augmentation strength for images of the rarest bin; bins between lie between."""
    vertical_flip: bool = False
    """Flip upside down too (microscopy, aerial pictures)."""
    focal_gamma: Annotated[float, Field(ge=0)] = 2.0
    """Focal loss exponent; 0: cross-entropy."""
    focal_alpha: Annotated[Share | None, BeforeValidator(_none)] = 0.25
    """Focal loss weight of positives; none: no weighting."""
    box_loss: Literal["l1", "smooth_l1", "giou"] = "l1"
    """Regression loss."""
    eval_every: Annotated[int, Field(ge=1)] | Auto = "auto"
    """Epochs between evaluations; the last epoch is always evaluated."""
    resume: OptionalText = None
    """Run id or checkpoint file to go on from; none: start anew."""
    register_as: OptionalText = None
    """Name under which the best model is registered; none: not registered."""


class EvaluateConfig(DataSettings, DetectionFields):
    """``evaluate``: judge a trained model, or a file of predictions."""

    data: str = "trained"
    """Folder in the published layout, demo, or trained: what the model was judged on in training."""
    output: Path = Path("outputs/evaluate")
    """Folder that the tables and pictures are written to, tracked or not."""
    eval_split: str = "validation"
    """Split to judge on."""
    eval_ids: OptionalPath = None
    """File of image ids to judge on; none: all images of the split."""
    from_run: OptionalText = None
    """What to judge: run id, models:/NAME@ALIAS or models:/NAME/VERSION, or a checkpoint file; none: the last
    training run."""
    predictions: OptionalPath = None
    """CSV or Parquet of predictions to judge instead of a model."""
    image_size: Annotated[int, Field(ge=32)] | Literal["trained"] = "trained"
    """Square root of the area that images are resized to; trained: as in training."""
    batch_size: Annotated[int, Field(ge=1)] = 16
    """Images per step."""
    workers: Annotated[int, Field(ge=-1)] = -1
    """Loader processes; 0: none; -1: by the machine (none without a GPU)."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic; auto: bfloat16 where the machine has it in hardware."""
    expand_predictions: bool = False
    """Copy each detection to its class's ancestors before judging."""
    bootstrap: Annotated[int, Field(ge=0)] = 200
    """Resamples of the images for intervals; 0: no intervals."""


class MainConfig(TrainConfig):
    """``main``: bin, train with uniform and with ``sampling``, compare AP per bin."""


class SearchConfig(TrainConfig):
    """``search``: find settings that are better for rare classes than the defaults, with Optuna."""

    sampling: Dial = "uniform,repeat-factor,class-aware,binned"
    """Space: how images are drawn. A range low..high (low..high:log), choices a,b,c, or one value, which fixes it."""
    num_bins: Dial = "2..12"
    """Space, with sampling=binned: number of frequency bins."""
    bin_strategy: Dial = "log,quantile,jenks"
    """Space, with sampling=binned: how the bins are cut."""
    balance: Dial = "0.1..0.9"
    """Space, with sampling=binned: quantile of images per class that rarer bins are lifted to."""
    repeat_threshold: Dial = "0.003..0.3:log"
    """Space, with sampling=repeat-factor or instance-repeat-factor: share of images below which a class is repeated."""
    balance_start: Dial = "0..0.8"
    """Space, but for sampling=uniform: share of the epochs drawn uniformly before the strategy takes over."""
    augment: Dial = "0.1..0.9"
    """Space: augmentation strength for images of the most frequent bin."""
    rare_augment: Dial = "0.1..1"
    """Space: augmentation strength for images of the rarest bin."""
    focal_gamma: Dial = "0.5..4"
    """Space: focal loss exponent."""
    focal_alpha: Dial = "0.1..0.75"
    """Space: focal loss weight of positives."""
    lr: Dial = "auto"
    """Highest learning rate; auto: that of train. Not searched unless given as a range (3e-4..3e-3:log)."""
    background_rate: Dial = "1.0"
    """Draws of an image without boxes, relative to the least drawn one with boxes. Not searched unless a range."""
    nms: Dial = "nms"
    """How overlapping detections are thinned out. Not searched unless given as choices (nms,soft-nms)."""
    nms_iou: Dial = "0.5"
    """IoU above which the lower of two detections is dropped, with nms=nms. Not searched unless given as a range."""
    eval_every: Annotated[int, Field(ge=1)] | Auto = 1
    """Epochs between evaluations, after each of which a trial may be pruned."""
    study: str = "search"
    """Name of the study; the same command with the same name goes on with it."""
    trials: Annotated[int, Field(ge=1)] = 40
    """Trials of the study in all, those of earlier commands and other machines counted."""
    seeds: Annotated[int, Field(ge=1)] = 1
    """Trainings of a trial (seed, seed + 1, ...), whose mean counts. Pruning looks at the first."""
    confirm_seeds: Annotated[int, Field(ge=0)] = 5
    """Fresh seeds on which the best trial and the defaults are trained again to compare them; 0: not compared."""
    objective: Annotated[Names, Field(min_length=1, max_length=2)] = ("val/mAP_rare",)
    """What is maximised: val/mAP, val/mAP_rare, any other val/ metric, or bins (see bin_weights); two names
    (val/mAP,val/mAP_rare) give a Pareto front."""
    bin_weights: Numbers = ()
    """objective=bins: weights of the mean over the bins of bin_strategy=log and num_bins=7 (or what these are fixed
    to), rarest first; bins without a weight count 0."""
    floor: Annotated[Share | None, BeforeValidator(_none)] = None
    """Least value of floor_metric that a trial must reach to be chosen; none: no floor."""
    floor_metric: str = "val/mAP_frequent"
    """What the floor is about."""
    sampler: Literal["tpe", "random", "gp", "cmaes", "nsgaii"] = "tpe"
    """Optuna's sampler."""
    pruner: Literal["median", "hyperband", "none"] | Auto = "auto"
    """Which trials are ended early; auto: median, and none with two objectives."""
    storage: str = "auto"
    """Where the study is kept: a file or sqlite:/// for one machine, postgresql:// for many; auto: optuna.db beside the
    MLflow store. Passwords belong in PGPASSFILE or PGPASSWORD."""
    search_workers: Annotated[int, Field(ge=1)] = 1
    """Processes that run trials on this machine, the cores divided among them (workers is the number of loader
    processes of each training)."""
    heartbeat: Annotated[int, Field(ge=1)] = 15
    """Seconds between signs of life of a trial; after four times that in silence its worker counts as dead, and the
    trial is run again."""
    dry_run: bool = False
    """Only say how many images the search will see and about how long it will take."""


COMMANDS: Mapping[str, type[TrackingSettings]] = {
    "main": MainConfig,
    "binning": BinningConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "search": SearchConfig,
}
