"""A small detector and the tiny data set, ready to train."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from retinaflow.data.augmentation import Augmentation
from retinaflow.data.batching import AspectBuckets
from retinaflow.data.cache import load_index
from retinaflow.data.copy_paste import CopyPaste
from retinaflow.data.dataset import DetectionDataset
from retinaflow.data.frequency_bins import ClassBins, make_bins
from retinaflow.data.image_class_pairs import image_class_pairs
from retinaflow.data.index import AnnotationIndex
from retinaflow.data.openimages import find_files
from retinaflow.data.sampling import epoch_plan
from retinaflow.detector.detection_loss import LossConfig
from retinaflow.detector.device import Precision
from retinaflow.detector.network import RetinaNet
from retinaflow.inference.checkpoint import on_device
from retinaflow.settings.training_settings import NetworkSettings, OptimizationSettings
from retinaflow.training.distributed import ALONE, World
from retinaflow.training.loop import Trainer

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Lab:
    """Twelve images, their bins and buckets; trainers of one small detector."""

    index: AnnotationIndex
    bins: ClassBins
    buckets: AspectBuckets

    @property
    def dataset(self) -> DetectionDataset:
        """Augmented, as in training."""
        return DetectionDataset(
            self.index,
            Augmentation.by_rarity(self.bins, base=0.3, rare=0.8, balance=0.75),
            copy_paste=CopyPaste.by_rarity(self.index, self.bins, probability=0.5, balance=0.75),
        )

    @property
    def plans(self) -> Callable[[int], NDArray[np.int64]]:
        """Every image once an epoch."""
        return lambda epoch: epoch_plan(np.ones(len(self.index)), seed=0, epoch=epoch)

    @property
    def network(self) -> NetworkSettings:
        """The smallest detector there is."""
        return NetworkSettings(backbone="resnet18", head_norm="group", head_depth=1, fpn_channels=64)

    def model(self, *, seed: int = 0, frozen: bool = False) -> RetinaNet:
        """The network with initial values."""
        network = self.network.model_copy(update={"batch_norm": "frozen"}) if frozen else self.network
        return RetinaNet(network, self.index.num_classes, seed=seed)

    def trainer(
        self,
        *,
        epochs: int,
        seed: int = 0,
        lr: float = 1e-3,
        frozen: bool = False,
        world: World = ALONE,
        precision: Precision = "float32",
        equalized_scale: float | None = None,
        deferred: bool | None = None,
        **more: Any,
    ) -> Trainer:
        """A new detector that nothing was done to."""
        settings = OptimizationSettings(epochs=epochs, lr=lr, seed=seed, **{"batch_size": 4, **more})
        return Trainer(
            on_device(self.model(seed=seed, frozen=frozen), CPU),
            settings,
            loss=LossConfig(learn_ancestors=True, box_loss="l1", equalized_scale=equalized_scale),
            precision=precision,
            device=CPU,
            ancestors=torch.from_numpy(self.index.taxonomy.is_ancestor),
            world=world,
            deferred=deferred,
        )

    @staticmethod
    def on(data: Path) -> Lab:
        """A data set at 64 pixels, in three buckets."""
        index = load_index(find_files(data, ["train"]), [data / "images"], report=lambda text: None).index
        buckets = AspectBuckets.fit(index.sizes, image_size=64, num_buckets=3)
        return Lab(index, make_bins(image_class_pairs(index, expand=True), num_bins=3), buckets)
