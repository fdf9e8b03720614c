"""Defaults that fit the data: what nobody set is chosen from the images, their boxes and the length of the training.

Each rule gives a value and its reason, which is printed. A setting that the user gave is never changed, and what is
chosen here counts as given from then on, so that a search, a comparison or a resumed training uses it as it is.
What of them was measured, and what is a choice: docs/training.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from retinaflow.data.batching import MULTIPLE, AspectBuckets
from retinaflow.data.index import AnnotationIndex
from retinaflow.progress import report
from retinaflow.settings.data_settings import Settings
from retinaflow.settings.resolve import changed
from retinaflow.settings.training_settings import (
    EVALUATIONS,
    FEWEST_EPOCHS,
    LARGEST_SIZE,
    LEAST_SEEN,
    SHORT_TRAINING,
    AnchorSettings,
    learning_rate,
    may_be_detector,
)
from retinaflow.settings.value_types import ByLength, as_text
from retinaflow.training.anchor_fit import SCALES, BoxSample, mean_reach

WORTH = 0.03
"""A smaller anchor than torchvision's is chosen when it lets this much more of the boxes of a class, in the mean over
classes, match an anchor."""
MOST_EPOCHS = 100
"""More are not chosen, however few images there are."""

Chosen = tuple[Any, str]
ConfigType = TypeVar("ConfigType", bound=AnchorSettings)


def fit_to_data(config: ConfigType, index: AnnotationIndex) -> ConfigType:
    """``config`` with the settings that were not given chosen for ``index``, the training images.

    Prints one line per choice by the images, and one for all that follow from the length of the training. A setting
    that ``config`` does not have, or has another default for, is left out, so ``explore`` and ``search`` take the same
    rules as ``train``. The generated set has defaults of its own, which train in minutes.
    """
    if getattr(config, "data", None) == "demo" or not np.asarray(index.sizes).any():
        return config
    kind = type(config)
    wanted = [name for name in kind.model_fields if kind.auto_of(name) and name not in config.model_fields_set]
    chosen: dict[str, Any] = {}
    for name in [name for name in RULES if name in wanted]:
        chosen[name], reason = RULES[name]({**dict(config), **chosen}, index)
        report(f"{name}={as_text(chosen[name])}: {reason}")
    if "epochs" in kind.model_fields:
        chosen |= _by_length({**dict(config), **chosen}, index, kind, wanted)
    if not chosen:
        return config
    fitted = changed(config, chosen)
    fitted.model_fields_set.update(chosen)
    return fitted


def _by_length(
    values: dict[str, Any], index: AnnotationIndex, kind: type[Settings], wanted: Sequence[str]
) -> dict[str, Any]:
    """The settings that depend on how many images the training sees."""
    seen = values["epochs"] * (values["epoch_length"] or len(index))
    short = seen < SHORT_TRAINING
    chosen: dict[str, Any] = {}
    for name in wanted:
        rule = kind.auto_of(name)
        if isinstance(rule, ByLength):
            chosen[name] = rule.short if short and rule.when(values) else rule.long
    if "lr" in wanted:
        chosen["lr"] = learning_rate({**values, **chosen}, short=short)
    if chosen:
        shown = " ".join(f"{name}={as_text(value)}" for name, value in chosen.items())
        limit = f"less than {SHORT_TRAINING:,}, a short training" if short else f"{SHORT_TRAINING:,} or more"
        report(f"{shown}: {seen:,} images are seen, {limit}")
    return chosen


def _image_size(values: Mapping[str, Any], index: AnnotationIndex) -> Chosen:
    del values
    own = math.sqrt(float(np.median(_sizes(index).prod(axis=1))))
    side = min(max(MULTIPLE, MULTIPLE * round(own / MULTIPLE)), LARGEST_SIZE)
    limit = f"; {LARGEST_SIZE} is the largest size that is chosen" if own > LARGEST_SIZE else ""
    return side, f"the median image has the area of {own:.0f} x {own:.0f} pixels{limit}"


def _anchor_scale(values: Mapping[str, Any], index: AnnotationIndex) -> Chosen:
    default = values["anchor_scale"]
    if may_be_detector(values):
        return default, "the published anchors, as the weights may be of a detector trained with them"
    sample = BoxSample.draw(index)
    if len(sample.boxes) == 0:
        return default, "there are no boxes to fit anchors to"
    buckets = AspectBuckets.fit(_sizes(index), image_size=values["image_size"], num_buckets=values["num_buckets"])
    means = {scale: mean_reach(sample, buckets, scale) for scale in SCALES}
    best = max(means.values())
    scale = max(scale for scale, mean in means.items() if mean >= best - WORTH)
    return scale, f"{means[scale]:.0%} of the boxes of a class match an anchor, in the mean over classes"


def _epochs(values: Mapping[str, Any], index: AnnotationIndex) -> Chosen:
    length = values["epoch_length"] or len(index)
    epochs = min(max(FEWEST_EPOCHS, math.ceil(LEAST_SEEN / length)), MOST_EPOCHS)
    return epochs, f"{length:,} images in an epoch, {epochs * length:,} in all"


def _eval_every(values: Mapping[str, Any], index: AnnotationIndex) -> Chosen:
    del index
    every = math.ceil(values["epochs"] / EVALUATIONS)
    return every, f"the training is evaluated {math.ceil(values['epochs'] / every)} times"


def _sizes(index: AnnotationIndex) -> NDArray[np.int64]:
    return np.asarray(index.sizes, dtype=np.int64)


RULES: Mapping[str, Callable[[Mapping[str, Any], AnnotationIndex], Chosen]] = MappingProxyType(
    {"image_size": _image_size, "anchor_scale": _anchor_scale, "epochs": _epochs, "eval_every": _eval_every}
)
"""Setting -> rule, in the order in which they depend on each other."""
