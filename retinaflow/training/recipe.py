"""Training settings -> the network and the optimisation they mean, with what depends on data and machine filled in."""

from __future__ import annotations

import torch

from retinaflow.data.bins import ClassBins
from retinaflow.detector.device import Precision, workers_on
from retinaflow.detector.loss import LossConfig
from retinaflow.detector.network import HeadNorm, NetworkConfig, P6Source
from retinaflow.settings.commands import TrainConfig
from retinaflow.training.by_bin import by_class
from retinaflow.training.loop import FitSettings


def fit_settings(config: TrainConfig, bins: ClassBins, *, precision: Precision, device: torch.device) -> FitSettings:
    """The optimisation settings of a process; its loader gets as many processes as it has threads."""
    return FitSettings(
        epochs=resolved(config.epochs),
        batch_size=resolved(config.batch_size),
        lr=float(config.lr),
        weight_decay=float(config.weight_decay),
        warmup=config.warmup,
        clip=config.clip,
        precision=precision,
        workers=workers_on(device, config.workers),
        seed=config.seed,
        loss=LossConfig(
            gamma=by_class("focal_gamma", _gamma(config), bins),
            alpha=by_class("focal_alpha", config.focal_alpha, bins),
            learn_ancestors=config.parents == "learn",
            box_loss=config.box_loss,
        ),
        optimizer=config.optimizer,
        momentum=config.momentum,
        schedule=config.schedule,
        milestones=config.milestones,
        lr_drop=config.lr_drop,
        accumulate=config.accumulate,
        ema=config.ema,
    )


def build_network(config: TrainConfig, num_classes: int) -> NetworkConfig:
    """The network of the settings. Raises ValueError for frozen statistics that were never estimated."""
    if config.batch_norm == "frozen" and config.weights == "none":
        raise ValueError(
            "batch_norm=frozen needs weights that bring statistics, but got weights=none; leave it at auto"
        )
    return NetworkConfig(
        backbone=config.backbone,
        num_classes=num_classes,
        anchor_scale=float(config.anchor_scale),
        trainable_layers=resolved(config.trainable_layers),
        norm="frozen" if config.batch_norm == "frozen" else "batch",
        head_norm=_head_norm(config),
        p6_from=_p6_from(config),
        head_depth=resolved(config.head_depth),
        fpn_channels=resolved(config.fpn_channels),
    )


def _head_norm(config: TrainConfig) -> HeadNorm:
    if config.head_norm == "auto":
        raise ValueError("auto settings must be resolved before use, but got head_norm=auto")
    return config.head_norm


def _p6_from(config: TrainConfig) -> P6Source:
    if config.p6_from == "auto":
        raise ValueError("auto settings must be resolved before use, but got p6_from=auto")
    return config.p6_from


def _gamma(config: TrainConfig) -> float | tuple[float, ...]:
    if config.focal_gamma == "auto":
        raise ValueError(f"auto settings must be resolved before use, but got {config.focal_gamma!r}")
    return config.focal_gamma


def resolved(value: int | str) -> int:
    """A setting that may have been ``auto``: :func:`retinaflow.settings.resolve.resolve` has filled it in."""
    if not isinstance(value, int):
        raise ValueError(f"auto settings must be resolved before use, but got {value!r}")
    return value
