"""Progress of a training: a bar on a terminal, lines in a log, points of the curves in the run.

A point of a loss curve is the mean over the steps since the point before, as a single step's loss jumps with the
images of its batch. What the training takes of its machine has the names of MLflow's own system metrics, so ``mlflow
ui`` shows it under its tab of that name; it is logged in order and through the same store, not by a thread of MLflow's.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

import psutil
import torch

from retinaflow.errors import Interrupted
from retinaflow.interrupts import StopRequest
from retinaflow.progress import ImageProgress
from retinaflow.runs.run import Run
from retinaflow.training.loop import EpochResult, StepResult, Trainer

CURVE_POINTS_EVERY = 10
"""Steps between logged points of the curves: a write to a remote store takes longer than a small step."""
SECONDS_PER_SYSTEM_POINT = 30.0


class Progress:
    """Shows and logs steps and epochs. ``quiet``: prints nothing, on every rank but the first.

    ``length``: images of an epoch. ``curve``: sums since the last point, of the training that is resumed.
    """

    def __init__(
        self,
        run: Run,
        trainer: Trainer,
        length: int,
        stop: StopRequest,
        *,
        quiet: bool = False,
        curve: Mapping[str, Any] | None = None,
    ) -> None:
        self._run, self._trainer, self._stop = run, trainer, stop
        self._shown = ImageProgress(
            trainer.settings.epochs * length, what="training", done=trainer.images_seen(length), quiet=quiet
        )
        self.curve: dict[str, Any] = dict(curve) if curve else {"steps": 0, "sums": {}}
        self._last_system_point = time.monotonic()

    def __enter__(self) -> Progress:
        self._shown.__enter__()
        return self

    def __exit__(self, *details: object) -> None:
        self._shown.__exit__(*details)

    def after_step(self, step: StepResult) -> None:
        """Show a step and add it to the curves."""
        epoch = f"epoch {self._trainer.epoch + 1}/{self._trainer.settings.epochs}"
        self._shown.add(
            step.images - self._shown.count, f"{epoch}  loss class {step.loss_class:.3f} box {step.loss_box:.3f}"
        )
        values = {
            "train/loss": step.loss_class + step.loss_box,
            "train/loss_class": step.loss_class,
            "train/loss_box": step.loss_box,
            "train/gradient_norm": step.gradient_norm,
        }
        sums = self.curve["sums"]
        self.curve = {
            "steps": self.curve["steps"] + 1,
            "sums": {name: sums.get(name, 0.0) + value for name, value in values.items()},
            "lr": step.lr,
        }
        if step.step % CURVE_POINTS_EVERY == 0:
            self._log_point(step.step, with_system=True)

    def stop_if_asked(self) -> None:
        """Raise Interrupted on every rank when one was asked to stop."""
        if self._trainer.world.any(self._stop.reason is not None):
            raise Interrupted(self._stop.reason or "another rank was asked to stop")

    def _log_point(self, step: int, *, with_system: bool = False) -> None:
        steps = self.curve["steps"]
        if steps == 0:
            return
        means = {name: value / steps for name, value in self.curve["sums"].items()}
        if with_system and time.monotonic() - self._last_system_point >= SECONDS_PER_SYSTEM_POINT:
            self._last_system_point = time.monotonic()
            means |= system_metrics(self._trainer.device)
        self._run.log_metrics({**means, "train/lr": self.curve["lr"]}, step=step)
        self.curve = {"steps": 0, "sums": {}}

    def after_epoch(self, epoch: EpochResult, metrics: Mapping[str, float] | None) -> None:
        """Log and show an epoch; ``metrics``: of its evaluation, if there was one."""
        # Each epoch ends with a point, so that a small set has curves too.
        self._log_point(epoch.step)
        # An epoch that was resumed for its evaluation alone has no speed.
        speed = (
            {"train/images_per_second": epoch.images_per_second, "train/waiting_for_images": epoch.waiting}
            if epoch.images_per_second > 0
            else {}
        )
        self._run.log_metrics(
            {
                **speed,
                "train/peak_memory_mib": peak_memory_mib(self._trainer.device),
                "train/epoch": epoch.epoch,
                **system_metrics(self._trainer.device),
            },
            step=epoch.step,
        )
        self._shown.line(
            f"epoch {epoch.epoch:>3}/{self._trainer.settings.epochs}  loss class {epoch.loss_class:.3f} box "
            f"{epoch.loss_box:.3f}  {epoch.images_per_second:.1f} images/s{_evaluated(metrics)}"
        )


def _evaluated(metrics: Mapping[str, float] | None) -> str:
    """mAP, and AP per bin from the rarest on."""
    if not metrics:
        return ""
    bins = [value for name, value in metrics.items() if name.startswith("val/mAP_bin_")]
    by_bin = f"  by bin, rarest first: {' '.join(f'{value:.3f}' for value in bins)}" if bins else ""
    return f"  val/mAP {metrics.get('val/mAP', float('nan')):.4f}{by_bin}"


MIB = 1 << 20


def peak_memory_mib(device: torch.device) -> float:
    """Peak memory of this process in MiB: of the GPU that it trains on, else of the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MIB
    try:
        import resource
    except ImportError:  # Windows
        return psutil.Process().memory_info().rss / MIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Kilobytes on Linux, bytes on macOS.
    return peak / MIB if sys.platform == "darwin" else peak / 1024


def system_metrics(device: torch.device) -> dict[str, float]:
    """Use of the machine since the last call (processor) and now (memory)."""
    memory = psutil.virtual_memory()
    found = {
        "system/cpu_utilization_percentage": psutil.cpu_percent(),
        "system/system_memory_usage_megabytes": memory.used / 1e6,
        "system/system_memory_usage_percentage": memory.percent,
    }
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        found["system/gpu_0_memory_usage_megabytes"] = (total - free) / 1e6
        found["system/gpu_0_memory_usage_percentage"] = 100 * (1 - free / total)
    return found
