"""Going on with a training: which checkpoint, which run, and by whose settings.

The checkpoint's settings count, so ``resume=RUN_ID`` alone is enough. A setting given besides is taken when it changes
nothing of what was done (where files lie, how many processes work), taken with a word when it steers the rest (more
epochs, another learning rate), and refused when the checkpoint cannot be resumed by it (another network, another
order of images).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from retinaflow.inference.checkpoint import Checkpoint, load_checkpoint
from retinaflow.progress import report
from retinaflow.runs import store
from retinaflow.settings.commands import TrainConfig
from retinaflow.settings.fields import as_text
from retinaflow.settings.resolve import resolve

WITHOUT_EFFECT = frozenset(
    {
        *(
            "track",
            "experiment",
            "output",
            "config",
            "resume",
            "register_as",
            "nproc",
            "workers",
            "save_minutes",
            "compile",
        ),
        # Where the data lies; that it is the same is seen by its digest.
        *("data", "boxes", "image_labels", "classes", "hierarchy", "images", "eval_split", "eval_ids", "eval_boxes"),
        *("eval_image_labels", "on_bad_row", "on_bad_image"),
    }
)
STEERING = frozenset(
    {
        *("epochs", "lr", "weight_decay", "momentum", "warmup", "schedule", "milestones", "lr_drop", "clip"),
        *("eval_every", "keep_best", "patience", "precision", "augment", "rare_augment", "vertical_flip"),
        *("focal_gamma", "focal_alpha", "box_loss", "score_threshold", "nms", "nms_iou", "max_detections"),
        # Between two epochs only: the trainer refuses another plan for an epoch that has begun.
        *("sampling", "balance", "balance_start", "bin_rates", "background_rate", "correction_steps", "max_repeats"),
        *("repeat_threshold", "class_power", "group_of_weight"),
    }
)


@dataclass(frozen=True)
class Resumed:
    """A checkpoint to resume from, the best one before it, and the run that they belong to."""

    checkpoint: Checkpoint
    best: Path | None
    run_id: str


def find_resumed(config: TrainConfig) -> Resumed | None:
    """The checkpoint that ``resume`` stands for: a file, a folder that holds one, or a run's ``last.pt``, here or among
    its artifacts.

    Raises FileNotFoundError or ValueError when there is none, or none to resume from.
    """
    if config.resume is None:
        return None
    path, run_id = _last_of(config.resume, config)
    checkpoint = load_checkpoint(path)
    progress = checkpoint.progress
    if progress is None:
        raise ValueError(f"resume={config.resume}: the checkpoint is for use, not for going on; give a last.pt")
    if "open" not in progress:
        raise ValueError(
            f"resume={config.resume}: the checkpoint was written by an earlier version, whose place in the epoch is "
            f"unknown; start anew, from its weights if they fit (weights={path})"
        )
    best = path.with_name("best.pt")
    return Resumed(checkpoint, best if best.is_file() else None, run_id or progress["run_id"])


def _last_of(resume: str, config: TrainConfig) -> tuple[Path, str | None]:
    given = Path(resume)
    if given.is_file():
        return given, None
    for path in (given / "last.pt", given / "checkpoints" / "last.pt"):
        if path.is_file():
            return path, None
    if given.suffix == ".pt":
        raise FileNotFoundError(f"resume={resume}: no such checkpoint file")
    path = config.output / resume / "checkpoints" / "last.pt"
    if not path.is_file():
        # The run may have written elsewhere than this command would.
        path = Path(store.params_of(resume).get("output", config.output)) / resume / "checkpoints" / "last.pt"
    return path if path.is_file() else store.fetch(resume, "checkpoints") / "last.pt", resume


def continued(config: TrainConfig, checkpoint: Checkpoint) -> TrainConfig:
    """The settings to go on by: the checkpoint's, with those given that may change.

    Raises ValueError for a setting that the checkpoint cannot be resumed by.
    """
    kept = resolve(TrainConfig, {**checkpoint.settings, "config": None})
    given = {name for name in config.model_fields_set if name in TrainConfig.model_fields}
    changed = sorted(name for name in given if getattr(config, name) != getattr(kept, name))
    for name in changed:
        new, old = as_text(getattr(config, name)), as_text(getattr(kept, name))
        if name in STEERING:
            report(f"resume: {name}={new} from here on, instead of {old}")
        elif name not in WITHOUT_EFFECT:
            raise ValueError(
                f"resume={config.resume}: {name} must be that of the checkpoint, but got {name}={new}, the "
                f"checkpoint's {old}; leave it out, or start a new training"
            )
    return kept.model_copy(update={"resume": config.resume, **{name: getattr(config, name) for name in changed}})
