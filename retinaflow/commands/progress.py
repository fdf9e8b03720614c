"""What one sees of a training: a bar on a terminal, a line per epoch in a log, points of the curves in the run."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from tqdm import tqdm

from retinaflow.commands.inputs import say
from retinaflow.run_files import Run
from retinaflow.training.loop import EpochResult, StepResult, Trainer
from retinaflow.training.stopping import StopRequest

CURVE_POINTS_EVERY = 10
"""Steps between logged points of the loss curves: a write to a remote store takes longer than a small step."""


class Progress:
    """Told of every step and epoch; raises Stopped after a step when somebody asked to stop."""

    def __init__(self, run: Run, trainer: Trainer, length: int, stop: StopRequest) -> None:
        self._run, self._trainer, self._length, self._stop = run, trainer, length, stop
        self._stack = ExitStack()
        self._bar: Any = None
        self._not_logged: StepResult | None = None

    def __enter__(self) -> Progress:
        total = self._trainer.settings.epochs * self._length
        done = self._trainer.epoch * self._length
        self._bar = self._stack.enter_context(
            tqdm(total=total, initial=done, unit="image", desc="training", disable=None, leave=False)
        )
        return self

    def __exit__(self, *details: object) -> None:
        self._stack.close()

    def after_step(self, step: StepResult) -> None:
        self._bar.update(step.images - self._bar.n)
        self._bar.set_postfix({"class": f"{step.loss_class:.3f}", "box": f"{step.loss_box:.3f}"}, refresh=False)
        self._not_logged = step
        if step.step % CURVE_POINTS_EVERY == 0:
            self._log_point(step)
        self._stop.check()

    def _log_point(self, step: StepResult) -> None:
        self._run.log_metrics(
            {
                "train/loss": step.loss_class + step.loss_box,
                "train/loss_class": step.loss_class,
                "train/loss_box": step.loss_box,
                "train/lr": step.lr,
            },
            step=step.step,
        )
        self._not_logged = None

    def after_epoch(self, epoch: EpochResult, value: float | None) -> None:
        # Each epoch ends with a point, so that a small set has curves too.
        if self._not_logged is not None:
            self._log_point(self._not_logged)
        self._run.log_metrics(
            {"train/images_per_second": epoch.images_per_second, "train/epoch": epoch.epoch}, step=epoch.step
        )
        judged = "" if value is None else f"  val/mAP {value:.4f}"
        text = (
            f"epoch {epoch.epoch:>3}/{self._trainer.settings.epochs}  loss class {epoch.loss_class:.3f} box "
            f"{epoch.loss_box:.3f}  {epoch.images_per_second:.1f} images/s{judged}"
        )
        tqdm.write(text) if not self._bar.disable else say(text)
