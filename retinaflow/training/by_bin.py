"""Settings given by frequency bin -> the value of each class, as the focal loss takes them."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from retinaflow.data.bins import ClassBins

Number = TypeVar("Number", float, float | None)


def by_class(name: str, value: Number | tuple[float, ...], bins: ClassBins) -> Number | Tensor:
    """A number as it is; a value for each bin, rarest first, as ``[K]`` float32.

    A class without a training image takes the rarest bin's. Raises ValueError when there are more or fewer values than
    bins.
    """
    if not isinstance(value, tuple):
        return value
    if len(value) != bins.num_bins:
        merged = f" of {bins.asked} asked for" if bins.num_bins != bins.asked else ""
        raise ValueError(
            f"{name} must be one number, or one for each of the {bins.num_bins} frequency bins{merged}, rarest first, "
            f"but got {len(value)}: {name}={','.join(f'{number:g}' for number in value)}"
        )
    return torch.tensor(value, dtype=torch.float32)[torch.from_numpy(bins.bin_of_class).long().clamp(min=0)]
