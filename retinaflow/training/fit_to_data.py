"""Defaults that fit the data: what nobody set is chosen from the images, their boxes and the length of the training.

Each rule gives a value and its reason, which is printed. A setting that the user gave is never changed, and what is
chosen here counts as given from then on, so that a search, a comparison or a resumed training uses it as it is.
How the rules were found, with figures: docs/decisions.md and docs/benchmarks.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from retinaflow.data.batching import MULTIPLE, AspectBuckets
from retinaflow.data.index import AnnotationIndex
from retinaflow.progress import report
from retinaflow.settings.resolve import changed
from retinaflow.settings.training_settings import AnchorSettings
from retinaflow.settings.value_types import as_text
from retinaflow.training.anchor_fit import SCALES, BoxSample, mean_reach

LARGEST_SIZE = 512
"""Largest ``image_size`` that is chosen: beyond it, time and memory are the user's decision."""
WORTH = 0.03
"""A smaller anchor than torchvision's is chosen when it lets this much more of the boxes of a class, in the mean over
classes, match an anchor."""
LEAST_SEEN = 24_000
"""Images that a training sees unless it has more than this in :data:`FEWEST_EPOCHS`, or less in :data:`MOST_EPOCHS`."""
FEWEST_EPOCHS = 12
MOST_EPOCHS = 100
EVALUATIONS = 12
"""Most evaluations of a training."""

Chosen = tuple[Any, str]
ConfigType = TypeVar("ConfigType", bound=AnchorSettings)


def fit_to_data(config: ConfigType, index: AnnotationIndex) -> ConfigType:
    """``config`` with the settings of :data:`RULES` that were not given chosen by ``index``, the training images.

    Prints one line per choice. A setting that ``config`` does not have, or has another default for, is left out, so
    ``explore`` and ``search`` take the same rules as ``train``. The generated set has defaults of its own, which train
    in minutes.
    """
    if getattr(config, "data", None) == "demo" or not np.asarray(index.sizes).any():
        return config
    chosen: dict[str, Any] = {}
    for name, rule in RULES.items():
        if type(config).auto_of(name) is None or name in config.model_fields_set:
            continue
        value, reason = rule({**dict(config), **chosen}, index)
        chosen[name] = value
        report(f"{name}={as_text(value)}: {reason}")
    if not chosen:
        return config
    fitted = changed(config, chosen)
    fitted.model_fields_set.update(chosen)
    return fitted


def _image_size(values: Mapping[str, Any], index: AnnotationIndex) -> Chosen:
    del values
    own = math.sqrt(float(np.median(_sizes(index).prod(axis=1))))
    side = min(max(MULTIPLE, MULTIPLE * round(own / MULTIPLE)), LARGEST_SIZE)
    limit = f"; {LARGEST_SIZE} is the largest size that is chosen" if own > LARGEST_SIZE else ""
    return side, f"the median image has the area of {own:.0f} x {own:.0f} pixels{limit}"


def _anchor_scale(values: Mapping[str, Any], index: AnnotationIndex) -> Chosen:
    default = AnchorSettings.model_fields["anchor_scale"].get_default(call_default_factory=True, validated_data={})
    if values.get("weights", "none") not in ("none", "imagenet", "imagenet_v2"):
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
    return epochs, f"{epochs * length:,} images are seen, {length:,} in an epoch"


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
