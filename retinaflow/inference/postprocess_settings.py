"""The written settings of detections -> what the detector takes: class groups become classes.

The same for training, evaluating and serving, so that a model's detections are suppressed alike everywhere.
"""

from __future__ import annotations

import torch

from retinaflow.data.bins import ClassBins
from retinaflow.data.class_groups import select_classes
from retinaflow.detector.postprocess import PostprocessConfig
from retinaflow.settings.groups import PostprocessFields
from retinaflow.settings.suppression import Rule, Suppression, read_rules
from retinaflow.taxonomy import Taxonomy


def postprocess_config(
    settings: PostprocessFields, taxonomy: Taxonomy, bins: ClassBins | None = None
) -> PostprocessConfig:
    """The settings for a model with the classes of ``taxonomy``, in their order.

    ``bins`` is needed where ``nms`` names a group ``bin:K``. Classes that no rule of ``nms`` names are suppressed by
    plain NMS at ``nms_iou``. A group of which the model has no class is no error: the models of a split label space
    share their settings. Raises ValueError for an unknown class, and for one that two rules name.
    """
    nms, nms_iou = settings.nms, settings.nms_iou
    score_threshold, max_detections = settings.score_threshold, settings.max_detections
    defaults = PostprocessConfig(score_threshold=score_threshold, nms_iou=nms_iou, max_detections=max_detections)
    rules = read_rules(nms)
    ways: list[Suppression] = ["nms"] * len(taxonomy)
    iou, sigma, power = (
        torch.full((len(taxonomy),), float(value)) for value in (nms_iou, defaults.soft_sigma, defaults.support_power)
    )
    numbers = {"nms": iou, "soft-nms": sigma, "support-nms": power}
    named: dict[int, Rule] = {}
    for rule in rules:
        for label in select_classes(rule.group, taxonomy, bins, setting="nms", may_be_empty=True).tolist():
            if label in named:
                raise ValueError(
                    f"nms={nms}: a class must have one rule, but {taxonomy.labels[label]} is in {named[label].group} "
                    f"and {rule.group}"
                )
            named[label], ways[label] = rule, rule.way
            if rule.number is not None:
                numbers[rule.way][label] = rule.number
    return PostprocessConfig(
        score_threshold=score_threshold,
        nms=ways[0] if len(set(ways)) == 1 else tuple(ways),
        nms_iou=iou,
        soft_sigma=sigma,
        support_power=power,
        max_detections=max_detections,
    )
