"""What is trained, built from the settings: the trainer with its detector and loss, and the augmented images."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from retinaflow.data.augmentation import Augmentation
from retinaflow.data.batching import AspectBuckets
from retinaflow.data.copy_paste import CopyPaste
from retinaflow.data.dataset import MAX_REPLACEMENTS, DetectionDataset, keep_rates
from retinaflow.data.frequency_bins import ClassBins
from retinaflow.data.training_data import TrainingData
from retinaflow.detector.detection_loss import LossConfig
from retinaflow.detector.device import device_of, loader_workers, precision_on
from retinaflow.detector.network import RetinaNet
from retinaflow.detector.weights import load_weights
from retinaflow.errors import SettingError
from retinaflow.inference.checkpoint import on_device
from retinaflow.progress import report
from retinaflow.settings.commands import TrainConfig
from retinaflow.settings.training_settings import LossSettings, NetworkSettings, may_be_detector
from retinaflow.training.anchor_fit import SCALES, BoxSample, advice, class_reach
from retinaflow.training.compilation import compile_network
from retinaflow.training.distributed import World
from retinaflow.training.loop import Trainer


def build_trainer(config: TrainConfig, data: TrainingData, world: World, *, load: bool) -> Trainer:
    """The network on its device with its optimizer. ``load``: with the weights of the settings.

    Raises SettingError for settings that do not fit the data or the machine.
    """
    device = device_of(world.local_rank)
    precision = precision_on(device, config.precision)
    model = RetinaNet(config.part(NetworkSettings), data.train.num_classes, seed=config.seed)
    if load:
        with world.first_on_machine():
            report(str(load_weights(model, config.weights)))
    model = on_device(model, device)
    if config.compile:
        compile_network(model, device, batch_size=config.batch_size // world.size)
    ancestors = torch.from_numpy(data.train.taxonomy.is_ancestor)
    return Trainer(
        model,
        config,
        loss=loss_config(config, data.bins, learn_ancestors=config.parents == "learn"),
        precision=precision,
        device=device,
        workers=loader_workers(config.workers, device),
        ancestors=None if config.parents == "ignore" else ancestors,
        world=world,
    )


def build_dataset(config: TrainConfig, data: TrainingData) -> DetectionDataset:
    """The training images, augmented by the rarity of their classes."""
    augmentation = Augmentation.by_rarity(
        data.bins,
        base=config.augment,
        rare=config.rare_augment,
        balance=config.balance,
        horizontal_flip=config.horizontal_flip,
        vertical_flip=config.vertical_flip,
    )
    return DetectionDataset(
        data.train,
        augmentation,
        replacements=MAX_REPLACEMENTS if config.on_bad_image == "skip" else 0,
        keep_rate=keep_rates(data.train, most=config.max_boxes_per_class),
        copy_paste=CopyPaste.by_rarity(data.train, data.bins, probability=config.copy_paste, balance=config.balance),
    )


def report_missed_boxes(config: TrainConfig, data: TrainingData, buckets: AspectBuckets) -> None:
    """Print a line when most boxes of a class match no anchor."""
    # The heads of a published detector were trained with its anchors.
    scales = () if may_be_detector(dict(config)) else SCALES
    sample = BoxSample.draw(data.train)
    reach = class_reach(sample, buckets, config.anchor_scale)
    line = advice(reach, sample, buckets, config.anchor_scale, scales=scales)
    if line:
        report(line)


Number = TypeVar("Number", float, float | None)


def loss_config(settings: LossSettings, bins: ClassBins, *, learn_ancestors: bool) -> LossConfig:
    """The loss for the classes of ``bins``. Raises SettingError for lists of another length than there are bins."""
    return LossConfig(
        gamma=by_class("focal_gamma", settings.focal_gamma, bins),
        alpha=by_class("focal_alpha", settings.focal_alpha, bins),
        equalized_scale=settings.equalized_scale if settings.loss == "equalized-focal" else None,
        learn_ancestors=learn_ancestors,
        box_loss=settings.box_loss,
    )


def by_class(name: str, value: Number | tuple[float, ...], bins: ClassBins) -> Number | Tensor:
    """A number as it is; a value for each bin, rarest first, as ``[K]`` float32.

    A class without a training image takes the rarest bin's. Raises SettingError when there are more or fewer values
    than bins.
    """
    if not isinstance(value, tuple):
        return value
    if len(value) != bins.num_bins:
        merged = f" of {bins.asked} asked for" if bins.num_bins != bins.asked else ""
        raise SettingError(
            f"{name} must be one number, or one for each of the {bins.num_bins} frequency bins{merged}, rarest first, "
            f"but got {len(value)}: {name}={','.join(f'{number:g}' for number in value)}"
        )
    return torch.tensor(value, dtype=torch.float32)[torch.from_numpy(bins.bin_of_class).long().clamp(min=0)]
