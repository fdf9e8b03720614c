"""Groups of settings of a training: the network, the loss, the optimisation, augmentation, checkpoints, the machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from retinaflow.errors import SettingError
from retinaflow.settings.backbone_names import DEFAULT_BACKBONE, Backbone
from retinaflow.settings.data_settings import SeedSettings, Settings
from retinaflow.settings.value_types import (
    FREE,
    STEERS,
    AlphaByBin,
    AtLeastOne,
    Count,
    Fraction,
    GammaByBin,
    MetricTarget,
    NonNegative,
    Numbers,
    OptionalText,
    Positive,
    Searched,
    WeightedMetrics,
    as_text,
    auto,
    by_data,
    by_length,
    is_pretrained,
)

HeadNorm = Literal["none", "group"]
P6Source = Literal["p5", "c5"]
BatchNorm = Literal["train", "frozen"]
ClassLoss = Literal["focal", "equalized-focal"]
BoxLoss = Literal["l1", "smooth_l1", "giou"]
OptimizerName = Literal["adamw", "sgd"]
Schedule = Literal["cosine", "steps", "constant"]

DETECTORS = ("coco", "coco_v2")
"""Weights of a whole detector."""
LARGEST_SIZE = 512
"""Largest ``image_size`` that is chosen: beyond it, time and memory are the user's decision."""
FEWEST_EPOCHS, LEAST_SEEN = 12, 24_000
"""Epochs of a training, unless it would see fewer images than this."""
EVALUATIONS = 12
"""Most evaluations of a training."""
SHORT_TRAINING = 100_000
"""A training that sees fewer images than this is short."""
BALANCED_AND_PRETRAINED = "from pretrained weights beside balanced sampling"
PRETRAINED_FACTOR = 0.1
"""``backbone_lr_factor`` from pretrained weights with AdamW, whose steps do not shrink with the gradient."""
GROUPS = 32
"""Groups of a group norm in the heads."""


def may_be_detector(values: Mapping[str, Any]) -> bool:
    """Whether the weights may be those of a whole detector, which has torchvision's heads and anchors."""
    weights = values.get("weights", "none")
    if weights in ("none", "imagenet", "imagenet_v2"):
        return False
    return weights in DETECTORS or values.get("backbone") == "resnet50"


def _own_parts(values: Mapping[str, Any]) -> bool:
    return not may_be_detector(values)


def _balanced_and_pretrained(values: Mapping[str, Any]) -> bool:
    return is_pretrained(values) and values.get("sampling") != "uniform"


def _equalizes(values: Mapping[str, Any]) -> bool:
    gamma = values.get("focal_gamma", 1.0)
    return _balanced_and_pretrained(values) and all(one > 0 for one in (gamma if isinstance(gamma, tuple) else [gamma]))


class WeightSettings(Settings):
    """Where training starts."""

    title = "Network"

    weights: str = "none"
    """Initial weights: none (random), imagenet or imagenet_v2 (backbone), coco or coco_v2 (torchvision's detector), or
    a file of either kind."""
    class_prior: Annotated[float, Field(gt=0, lt=1), Searched()] = 0.01
    """Score of every class before training, in a class layer that is not loaded (Lin et al. 2017); hundreds of classes:
    0.001."""


class AnchorSettings(Settings):
    """The anchors."""

    title = "Network"

    anchor_scale: Annotated[float, Field(ge=0.5, le=256)] = auto(
        "by the boxes; 4 with the weights of a detector; demo 3",
        lambda values: 3.0 if values.get("data") == "demo" and values.get("weights") not in DETECTORS else 4.0,
    )
    """Side of the smallest anchor of a level over the level's stride; torchvision has 4."""


class NetworkSettings(AnchorSettings, WeightSettings):
    """What a RetinaNet is made of: :class:`retinaflow.detector.network.RetinaNet`."""

    backbone: Backbone = DEFAULT_BACKBONE
    """Network under the feature pyramid: a classifier of torchvision (resnet50, convnext_tiny, ...), or timm:NAME."""
    head_norm: HeadNorm = auto("group; none with weights=coco", lambda v: "none" if v["weights"] == "coco" else "group")
    """Norm after each layer of the heads: group (trains better from scratch) or none."""
    fpn_channels: Annotated[int, Field(ge=1, le=8192)] = by_length(128, 256, demo=64, when=_own_parts)
    """Channels of the feature pyramid and the heads, a multiple of 64 with head_norm=group."""
    head_depth: Annotated[int, Field(ge=0, le=100)] = by_length(2, 4, when=_own_parts)
    """Convolutions in each head before its output layer."""
    p6_from: P6Source = auto("p5; c5 with weights=coco_v2", lambda v: "c5" if v["weights"] == "coco_v2" else "p5")
    """What level P6 is computed from: the pyramid's P5 or the backbone's C5."""
    batch_norm: BatchNorm = auto("train from scratch, else frozen", lambda v: _scratch(v, "train", "frozen"))
    """Batch norms of the backbone: train, or frozen at loaded statistics."""
    trainable_layers: Annotated[int, Field(ge=0, le=5)] = auto("5 from scratch, else 3", lambda v: _scratch(v, 5, 3))
    """Backbone stages that are trained, from the last one back; 5: all, 0: none."""

    @model_validator(mode="after")
    def _channels_have_groups(self) -> NetworkSettings:
        # One channel per group would have nothing to normalise over on the 1 x 1 maps of small images.
        if self.head_norm == "group" and self.fpn_channels % (2 * GROUPS):
            raise SettingError(
                f"fpn_channels must be a multiple of {2 * GROUPS} with head_norm=group, but got "
                f"fpn_channels={self.fpn_channels}"
            )
        return self


def _scratch(values: Mapping[str, Any], scratch: Any, loaded: Any) -> Any:
    return scratch if values["weights"] == "none" else loaded


class InputSettings(Settings):
    """The shapes that images are resized to."""

    title = "Network"

    image_size: Annotated[int, Field(ge=32, le=8192)] = by_data(
        LARGEST_SIZE, demo=112, text=f"median image, at most {LARGEST_SIZE}"
    )
    """Square root of the area that images are resized to, pixels."""
    num_buckets: Annotated[int, Field(ge=1, le=1000)] = by_data(7, demo=5)
    """Aspect buckets; 1: one fixed shape."""


class LossSettings(Settings):
    """What is learned from each box, and how strongly."""

    title = "Loss"

    loss: Annotated[ClassLoss, STEERS, Searched("focal,equalized-focal")] = by_length(
        "equalized-focal", "focal", demo="focal", when=_equalizes, condition=BALANCED_AND_PRETRAINED
    )
    """Class loss; equalized-focal: with a larger focal_gamma for classes whose positives have small gradients (Li et
    al. 2022)."""
    equalized_scale: Annotated[Positive, STEERS, Searched("2..12", when={"loss": ("equalized-focal",)})] = 8.0
    """equalized-focal: largest addition to focal_gamma, which must be above 0."""
    focal_gamma: Annotated[GammaByBin, STEERS, Searched("0.5..4")] = by_length(1.0, 2.0)
    """Focal loss exponent (Lin et al. 2017); 0: cross-entropy; a list (1,1.5,2): per frequency bin, rarest first."""
    focal_alpha: Annotated[AlphaByBin, STEERS, Searched("0.1..0.75")] = 0.25
    """Focal loss weight of positives; none: unweighted; a list: per frequency bin, rarest first."""
    box_loss: Annotated[BoxLoss, STEERS] = "l1"
    """Regression loss."""
    max_boxes_per_class: Count = 0
    """Boxes of a class learned in a pass over all images, on average; the others are ignored regions; 0: all."""

    @model_validator(mode="after")
    def _has_an_exponent_to_raise(self) -> LossSettings:
        gammas = self.focal_gamma if isinstance(self.focal_gamma, tuple) else (self.focal_gamma,)
        if self.loss == "equalized-focal" and not all(gamma > 0 for gamma in gammas):
            raise SettingError(
                f"focal_gamma > 0 must hold with loss=equalized-focal, but got focal_gamma={as_text(self.focal_gamma)}"
            )
        return self


class AugmentSettings(Settings):
    """How strongly training images are changed."""

    title = "Augmentation"

    augment: Annotated[Fraction, STEERS, Searched("0.1..0.9")] = by_length(0.2, 0.5)
    """Augmentation strength for images of the most frequent bin; 0: none."""
    rare_augment: Annotated[Fraction, STEERS, Searched("0.1..1")] = by_length(0.4, 0.8)
    """Augmentation strength for images of the rarest bin; interpolated in between."""
    copy_paste: Annotated[Fraction, STEERS, Searched("0..1")] = by_length(
        0.5, 0.0, demo=0.0, when=_balanced_and_pretrained, condition=BALANCED_AND_PRETRAINED
    )
    """Probability that a sampled image gets a pasted crop of a rare class, the rarest most often; 0: none."""
    horizontal_flip: Annotated[bool, STEERS] = False
    """Flip half of the images left to right with augment=0 too; augmented images are flipped anyway."""
    vertical_flip: Annotated[bool, STEERS] = False
    """Flip upside down too (microscopy, aerial images)."""


class BatchSettings(Settings):
    """How many images at a time."""

    title = "Optimisation"

    batch_size: AtLeastOne = by_length(4, 8)
    """Images per batch, over all ranks."""


class OptimizationSettings(BatchSettings, SeedSettings):
    """From gradients to weights: :class:`retinaflow.training.loop.Trainer`."""

    accumulate: AtLeastOne = 1
    """Batches whose gradients make one step of the optimizer."""
    epochs: Annotated[AtLeastOne, STEERS] = by_data(
        FEWEST_EPOCHS, demo=3, text=f"{FEWEST_EPOCHS}, or more to see {LEAST_SEEN:,} images"
    )
    """Epochs."""
    optimizer: OptimizerName = "adamw"
    """AdamW, or SGD with momentum."""
    lr: Annotated[Positive, STEERS, Searched()] = auto(
        "adamw 0.001 in short trainings, else 0.0003; sgd 0.01 per 16 images of a step",
        lambda values: learning_rate(values, short=values.get("data") == "demo"),
    )
    """Maximum learning rate."""
    backbone_lr_factor: Annotated[Positive, Searched()] = auto(
        f"adamw from pretrained weights {PRETRAINED_FACTOR}, else 1",
        lambda values: PRETRAINED_FACTOR if values["optimizer"] == "adamw" and is_pretrained(values) else 1.0,
    )
    """Learning rate of the backbone's layers, as a factor of lr."""
    momentum: Annotated[float, Field(ge=0, lt=1), STEERS] = 0.9
    """sgd: momentum."""
    weight_decay: Annotated[NonNegative, STEERS] = auto(
        "adamw 0.01, sgd 0.0001", lambda values: 1e-4 if values["optimizer"] == "sgd" else 0.01
    )
    """Weight decay, not on biases and norms."""
    warmup: Annotated[Fraction, STEERS] = 0.1
    """Fraction of all steps in which the learning rate rises."""
    schedule: Annotated[Schedule, STEERS] = "cosine"
    """Learning rate after the warm-up: half a cosine to 0, drops at milestones, or constant."""
    milestones: Annotated[Numbers, STEERS] = (0.667, 0.889)
    """steps: fractions of the training after which the learning rate drops."""
    lr_drop: Annotated[float, Field(gt=0, lt=1), STEERS] = 0.1
    """steps: factor of the learning rate at each milestone."""
    clip: Annotated[NonNegative, STEERS] = 5.0
    """Maximum gradient norm; 0 disables clipping."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay of the moving average of the weights, which is then evaluated and saved; 0: none."""
    balance_start: Annotated[float, Field(ge=0, lt=1), STEERS, Searched("0..0.8")] = by_length(0.0, 0.5)
    """Fraction of the epochs sampled and augmented uniformly, before sampling, rare_augment and copy_paste start."""


def learning_rate(values: Mapping[str, Any], *, short: bool) -> float:
    """The default learning rate with these values of the other settings, in a ``short`` training or a long one."""
    if values["optimizer"] == "sgd":
        # The published RetinaNets' 0.01 for 16 images, scaled with the images of a step (Goyal et al. 2017).
        return float(0.01 * values["batch_size"] * values["accumulate"] / 16)
    return 1e-3 if short else 3e-4


class CheckpointSettings(Settings):
    """Evaluation within a training, and what is saved of it."""

    title = "Evaluation and checkpoints"

    eval_every: Annotated[AtLeastOne, STEERS] = by_data(1, demo=3, text=f"at most {EVALUATIONS} evaluations")
    """Epochs between evaluations; the last epoch is always evaluated."""
    keep_best: Annotated[WeightedMetrics, STEERS] = ("val/mAP",)
    """Metric of the best epoch, which is saved as best.pt, and of early stopping: an aggregate (val/mAP_rare,
    val/mAP_bin_1, val/coco_AP), a class (val/AP/Car), or several with weights (val/mAP_rare:2,val/mAP:1)."""
    patience: Annotated[Count, STEERS] = 0
    """Early stopping: evaluations in a row without a better keep_best; 0: never."""
    target: Annotated[MetricTarget, STEERS] = None
    """METRIC:VALUE (val/mAP:0.34) at which the training ends and logs time_to_target, in seconds; none: it trains all
    epochs."""
    save_minutes: Annotated[NonNegative, FREE] = 10.0
    """Minutes between checkpoints within an epoch, the first after the first step; 0: after epochs only."""
    resume: Annotated[OptionalText, FREE] = None
    """Run id or checkpoint file to resume, by its settings; auto: the unfinished training of these settings and data,
    else a new one; none: start anew. Not given: none, and auto after a restart by torchrun or Slurm."""


class RegistrationSettings(Settings):
    """The model registry."""

    title = "Registry"

    register_as: Annotated[OptionalText, FREE] = None
    """Name under which the model is registered; none: not registered."""


class ComputeSettings(Settings):
    """What the machine does at a time."""

    title = "Machine"

    precision: Annotated[Literal["auto", "float32", "bfloat16"], STEERS] = "auto"
    """Arithmetic; auto: bfloat16 where the hardware has it."""
    workers: Annotated[int, Field(ge=-1), FREE] = -1
    """Loader processes of each rank; 0: none; -1: by the machine (none without a GPU)."""


class RankSettings(Settings):
    """Processes of one command."""

    title = "Machine"

    nproc: Annotated[int, Field(ge=1, le=1024), FREE] = 1
    """Processes that share the work on this machine, one per GPU; train on several machines: start it with torchrun."""


class TrainingMachineSettings(RankSettings, ComputeSettings):
    """The machine as a training uses it."""

    compile: Annotated[bool, FREE] = False
    """Build kernels with torch.compile: minutes at the start, for long trainings of few shapes."""
