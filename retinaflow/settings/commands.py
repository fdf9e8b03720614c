"""Settings of every command: frozen, typed, checked; one class per command.

A setting has one name everywhere: flag ``--focal_gamma``, ``-P focal_gamma=``, MLflow parameter, YAML key, field. The
docstring of a field is its help text and says meaning, unit and special values. Lists are comma-separated; ``none``
is a written value.

``auto`` stands for a value that depends on the data; :mod:`retinaflow.settings.resolve` fills it in.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from retinaflow.data.bins import BinStrategy
from retinaflow.settings.comparison_commands import CompareConfig, PromoteConfig
from retinaflow.settings.data_commands import ConvertConfig, DownloadConfig
from retinaflow.settings.fields import (
    AlphaByBin,
    Auto,
    Fraction,
    GammaByBin,
    Names,
    Numbers,
    OptionalPath,
    OptionalText,
    Searchable,
    Thresholds,
    none_of,
)
from retinaflow.settings.groups import (
    DataSettings,
    DetectionFields,
    DetectorSettings,
    MergeFields,
    SamplingFields,
    TrackingSettings,
)
from retinaflow.settings.model_commands import ExportConfig, PredictConfig, VisualizeConfig


class BinningConfig(SamplingFields):
    """``binning``: frequency bins and the exposure of every sampling strategy."""


class TrainConfig(SamplingFields, DetectionFields):
    """``train``: train a detector and evaluate it."""

    backbone: Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"] = "resnet18"
    """ResNet under the feature pyramid."""
    weights: str = "none"
    """Start: none (random), imagenet or imagenet_v2 (backbone), coco or coco_v2 (torchvision's whole detector), or a
    file of either kind."""
    image_size: Annotated[int, Field(ge=32)] | Auto = "auto"
    """Square root of the area that images are resized to, pixels."""
    num_buckets: Annotated[int, Field(ge=1)] | Auto = "auto"
    """Aspect buckets; 1: one fixed shape."""
    fpn_channels: Annotated[int, Field(ge=8)] | Auto = "auto"
    """Channels of the feature pyramid and the heads, a multiple of 64 with head_norm=group; torchvision has 256."""
    head_norm: Literal["none", "group"] | Auto = "auto"
    """Norm in the heads: group (trains better from scratch), none; auto: none with weights=coco, else group."""
    p6_from: Literal["p5", "c5"] | Auto = "auto"
    """What level P6 is computed from: the pyramid's P5 or the backbone's C5; auto: c5 with weights=coco_v2, else p5."""
    head_depth: Annotated[int, Field(ge=1)] | Auto = "auto"
    """Convolutions in each head; torchvision has 4."""
    anchor_scale: Annotated[float, Field(gt=0)] | Auto = "auto"
    """Side of the smallest anchor of a level over the level's stride; torchvision has 4."""
    batch_norm: Literal["train", "frozen"] | Auto = "auto"
    """Batch norms of the backbone: train, or frozen at loaded statistics; auto: train from scratch, else frozen."""
    trainable_layers: Annotated[int, Field(ge=0, le=5)] | Auto = "auto"
    """Backbone stages that learn, from the last one back; 5: all, 0: none; auto: 5 from scratch, else 3."""
    batch_size: Annotated[int, Field(ge=1)] | Auto = "auto"
    """Images per batch, over all processes."""
    accumulate: Annotated[int, Field(ge=1)] = 1
    """Batches whose gradients make one step of the optimizer."""
    epochs: Annotated[int, Field(ge=1)] | Auto = "auto"
    """Epochs."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or SGD with momentum."""
    lr: Annotated[float, Field(gt=0)] | Auto = "auto"
    """Highest learning rate; auto: 0.0003 (demo 0.001) for adamw, 0.01 per 16 images of a step for sgd."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """sgd: momentum."""
    weight_decay: Annotated[float, Field(ge=0)] | Auto = "auto"
    """Weight decay, not on biases and norms; auto: 0.01 for adamw, 0.0001 for sgd."""
    warmup: Fraction = 0.1
    """Share of all steps in which the learning rate rises."""
    schedule: Literal["cosine", "steps", "constant"] = "cosine"
    """Learning rate after the warm-up: half a cosine to 0, dropping at milestones, or constant."""
    milestones: Numbers = (0.667, 0.889)
    """schedule=steps: shares of the training after which the learning rate drops."""
    lr_drop: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """schedule=steps: factor of the learning rate at each milestone."""
    clip: Annotated[float, Field(ge=0)] = 5.0
    """Largest norm of the gradient; 0: any."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay of the moving average of the weights, which is evaluated and kept; 0: none. Rises with the steps taken, so
    0.9998 suits short trainings too."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic; auto: bfloat16 where the machine has it in hardware."""
    compile: bool = False
    """Build kernels for the network with torch.compile: minutes at the start, for long trainings of few shapes."""
    workers: Annotated[int, Field(ge=-1)] = -1
    """Loader processes of each process; 0: none; -1: by the machine (none without a GPU)."""
    nproc: Annotated[int, Field(ge=1)] = 1
    """Processes that train together on this machine, one per GPU. Several machines: start it with torchrun."""
    balance_start: Annotated[float, Field(ge=0, lt=1)] | Auto = "auto"
    """Share of the epochs drawn and augmented alike before the sampling strategy and rare_augment take over; auto: 0.5,
    demo 0."""
    augment: Fraction | Auto = "auto"
    """Augmentation strength for images of the most frequent bin; 0: none; auto: 0.5, demo 0.2."""
    rare_augment: Fraction | Auto = "auto"
    """Augmentation strength for images of the rarest bin; less for those nearer to what balance lifts bins to; auto:
    0.8, demo 0.4."""
    vertical_flip: bool = False
    """Flip upside down too (microscopy, aerial pictures)."""
    focal_gamma: GammaByBin | Auto = "auto"
    """Focal loss exponent; 0: cross-entropy; a list (1,1.5,2): one for each frequency bin, rarest first; auto: 2 (Lin
    et al. 2017), demo 1."""
    focal_alpha: AlphaByBin = 0.25
    """Focal loss weight of positives; none: no weighting; a list: one for each frequency bin, rarest first."""
    max_boxes_per_class: Annotated[int, Field(ge=0)] = 0
    """Boxes of a class that are learned in a pass over all images, on average; the others, drawn anew each time, are
    regions to ignore; 0: all are learned."""
    box_loss: Literal["l1", "smooth_l1", "giou"] = "l1"
    """Regression loss."""
    eval_every: Annotated[int, Field(ge=1)] | Auto = "auto"
    """Epochs between evaluations; the last epoch is always evaluated."""
    keep_best: Literal["val/mAP", "val/mAP_rare", "val/mAP_common", "val/mAP_frequent"] = "val/mAP"
    """Metric by which the best epoch is kept, and which early stopping watches."""
    patience: Annotated[int, Field(ge=0)] = 0
    """Early stopping: evaluations in a row without a better keep_best after which training ends; 0: never."""
    save_minutes: Annotated[float, Field(ge=0)] = 10.0
    """Minutes between checkpoints within an epoch, the first after the first step; 0: after epochs only."""
    resume: OptionalText = None
    """Run id or checkpoint file to resume from, by its settings; none: start anew."""
    register_as: OptionalText = None
    """Name under which the best model is registered; none: not registered."""


class EvaluateConfig(DetectorSettings, DetectionFields, DataSettings):
    """``evaluate``: evaluate a trained model, or a file of predictions. For a model, score_threshold, nms and the other
    settings of detections, group_of_weight and precision are those of its training unless given."""

    data: str = "trained"
    """Folder in the published layout, demo, or trained: what the model was evaluated on in training."""
    output: Path = Path("outputs/evaluate")
    """Folder that the tables and pictures are written to, tracked or not."""
    eval_split: str = "validation"
    """Split to evaluate on."""
    eval_ids: OptionalPath = None
    """File of image ids to evaluate on; none: all images of the split."""
    from_run: OptionalText = None
    """What to evaluate: run id, models:/NAME@ALIAS or models:/NAME/VERSION, or a checkpoint file; none: the last
    training run."""
    predictions: OptionalPath = None
    """CSV, Parquet or Kaggle submission of predictions to evaluate instead of a model."""
    expand_predictions: bool = False
    """Copy each detection to its class's ancestors before evaluating."""
    iou_thresholds: Thresholds = ()
    """Further IoU thresholds to give AP at, with their mean: a list, or coco (0.5 to 0.95); none: 0.5 only."""
    report_score: Fraction = 0.5
    """Score at which per_class_details.csv tells precision and recall."""
    bootstrap: Annotated[int, Field(ge=0)] = 200
    """Resamples of the images for intervals; 0: no intervals."""
    error_analysis: bool = True
    """Also analyse what each kind of error costs: about 4 s per million detections."""


class ExploreConfig(DataSettings):
    """``explore``: one HTML page about the data: classes, bins, boxes, shapes, labels, suspicious rows."""

    output: Path = Path("outputs/explore")
    """Folder that the page and its pictures are written to, tracked or not."""
    train_splits: Annotated[Names, Field(min_length=1)] = ("train",)
    """Splits to look at."""
    bin_strategy: BinStrategy = "log"
    """How the axis of log10(training images) is cut into bins."""
    num_bins: Annotated[int, Field(ge=1)] = 7
    """Number of frequency bins; fewer result when one would be empty."""
    image_size: Annotated[int, Field(ge=32)] | Auto = "auto"
    """Square root of the area that a training would resize images to, pixels: box sizes are shown in it."""
    num_buckets: Annotated[int, Field(ge=1)] | Auto = "auto"
    """Aspect buckets that a training would use."""
    anchor_scale: Annotated[float, Field(gt=0)] | Auto = "auto"
    """Anchors of a training, which are compared with the boxes: base side / stride of their level."""
    samples: Annotated[int, Field(ge=0)] = 12
    """Rarest classes shown with an image; 0: none, and no image file is opened."""


class MergeConfig(TrackingSettings, MergeFields):
    """``merge``: several models, of different classes or of the same, as one: calibrated, joined, fused, evaluated."""

    output: Path = Path("outputs/merge")
    """Folder that the merged predictions and the tables are written to, tracked or not."""
    runs: Names = ()
    """Runs of train, evaluate or merge by id or name (with track=false: folders), comma-separated; all evaluated on the
    same images. none: the parts of the last split."""
    calibrators: OptionalText = None
    """Run (or folder) of an earlier merge of the same models whose calibrators are used, instead of fitting them on the
    images that are evaluated; it must have been evaluated on other images. none: fit them here."""
    nms_iou: Annotated[float, Field(gt=0, le=1)] = 0.5
    """expand_predictions: IoU above which the lower of two detections of a class is dropped."""
    max_detections: Annotated[int, Field(ge=1)] = 300
    """Most detections per image, over all classes of all models."""


class SplitConfig(TrainConfig, MergeFields):
    """``split``: train a model for each group of classes, merge them, and compare with one model for all classes."""

    groups: str = "people-clothing+rest"
    """Class groups joined by +, each written as class_group is: people-clothing+rest, Car,Bus+Tree, bin:1+bin:2;
    bin:1..3 stands for three of them. Groups may share classes, which are fused."""
    from_run: OptionalText = None
    """One model for all classes to compare with: a run evaluated on the same images; none: see with_all."""
    with_all: bool = False
    """Train one model for all classes too, by the same settings, to compare with."""
    reuse: bool = True
    """Take a model that an earlier split has trained by the same settings on the same data, instead of training it
    again."""
    bootstrap: Annotated[int, Field(ge=100)] = 1000
    """Resamples of the images for intervals of the comparison."""


class MainConfig(TrainConfig):
    """``main``: bin, train with uniform and with ``sampling``, compare AP per bin."""


class SearchConfig(TrainConfig):
    """``search``: find settings that are better for rare classes than the defaults, with Optuna."""

    sampling: Searchable = "uniform,repeat-factor,class-aware,binned"
    """Space: how images are drawn. A range low..high (low..high:log), choices a,b,c, or one value, which fixes it."""
    num_bins: Searchable = "2..12"
    """Space, with sampling=binned: number of frequency bins."""
    bin_strategy: Searchable = "log,quantile,jenks"
    """Space, with sampling=binned: how the bins are cut."""
    balance: Searchable = "0.1..0.9"
    """Space, with sampling=binned: quantile of images per class that rarer bins are lifted to."""
    repeat_threshold: Searchable = "0.003..0.3:log"
    """Space, with sampling=repeat-factor or instance-repeat-factor: share of images below which a class is repeated."""
    balance_start: Searchable = "0..0.8"
    """Space: share of the epochs drawn and augmented alike before the strategy and rare_augment take over."""
    augment: Searchable = "0.1..0.9"
    """Space: augmentation strength for images of the most frequent bin."""
    rare_augment: Searchable = "0.1..1"
    """Space: augmentation strength for images of the rarest bin."""
    focal_gamma: Searchable = "0.5..4"
    """Space: focal loss exponent."""
    focal_alpha: Searchable = "0.1..0.75"
    """Space: focal loss weight of positives."""
    lr: Searchable = "auto"
    """Highest learning rate; auto: that of train. Not searched unless given as a range (3e-4..3e-3:log)."""
    background_rate: Searchable = "1.0"
    """Draws of an image without boxes, relative to the least drawn one with boxes. Not searched unless a range."""
    nms: Searchable = "nms"
    """How overlapping detections are suppressed. Not searched unless given as choices (nms,soft-nms)."""
    nms_iou: Searchable = "0.5"
    """IoU above which the lower of two detections is dropped, with nms=nms. Not searched unless given as a range."""
    eval_every: Annotated[int, Field(ge=1)] | Auto = 1
    """Epochs between evaluations, after each of which a trial may be pruned."""
    study: str = "search"
    """Name of the study; the same command with the same name resumes it."""
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
    floor: Annotated[Fraction | None, BeforeValidator(none_of)] = None
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
