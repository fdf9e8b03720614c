"""The loss of a training: settings given by frequency bin become values of each class."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from retinaflow.data.frequency_bins import ClassBins
from retinaflow.detector.detection_loss import LossConfig
from retinaflow.errors import SettingError
from retinaflow.settings.training_settings import LossSettings

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
