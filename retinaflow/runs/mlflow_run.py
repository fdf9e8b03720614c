"""A run in the MLflow store, written to from a thread of its own.

Logging only puts results into an :class:`~retinaflow.runs.outbox.Outbox`, whose thread sends them, so a server that is
slow or out of reach does not hold up the work. Nothing arrives twice: a database store keeps one of several equal
points (name, step, value, time; they are its primary key), a point that may have arrived is looked for before it is
sent again, and everything else replaces what was there.
"""

from __future__ import annotations

import contextlib
import json
import math
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import mlflow
import pandas as pd
from mlflow.entities import Dataset, InputTag, LoggedModelInput, Metric
from mlflow.entities import DatasetInput as MlflowDatasetInput
from PIL import Image

from retinaflow.addresses import without_secrets
from retinaflow.errors import first_line, refusal
from retinaflow.progress import print_to
from retinaflow.runs.datasets import DatasetInput
from retinaflow.runs.logged_model import link_metrics, log_checkpoint
from retinaflow.runs.outbox import Item, Outbox, Refused, Unsent
from retinaflow.runs.run import DESCRIPTION, Pixels, Run, as_parameters
from retinaflow.runs.step_images import StepImages
from retinaflow.runs.store import refuses, uri

Value = TypeVar("Value")
_LONGEST = 6000
"""Letters of a parameter, after which MLflow cuts it."""
LONGEST_NAME = 500
"""Letters of the name of a dataset that MLflow takes."""
_OWN_DESCRIPTION = "retinaflow.description"
"""Tag with the description that was set here: another one is somebody's own."""
_LOGGED_ARTIFACTS = "mlflow.loggedArtifacts"
"""The tag in which ``mlflow ui`` finds the tables of a run."""


class MlflowRun(Run):
    """A run in the MLflow store. Every method hands over to the outbox and returns at once."""

    def __init__(self, run_id: str, folder: Path, *, resumed: bool = False) -> None:
        """folder: for what has not arrived yet. resumed: points that the run has already are not logged again."""
        self.run_id = run_id
        self._client = mlflow.MlflowClient()
        self._resumed = resumed
        self._known: dict[str, set[tuple[int, float]]] = {}
        self._images = StepImages(self._client, run_id)
        self._outbox = Outbox(folder, self._deliver, answers=self._answers, report=warn, store=f"MLflow at {uri()}")

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log parameters the run does not have: ``mlflow run`` has logged its own in its own spelling.

        What it logged is not always what was used (a file of settings wins over its declared defaults); MLflow lets no
        parameter be changed, so such a value is logged as ``used/NAME``.
        """
        self._outbox.put("params", {"params": as_parameters(params)})

    def log_metrics(self, metrics: Mapping[str, float], *, step: int) -> None:
        values = {name: float(value) for name, value in metrics.items()}
        self._outbox.put("metrics", {"time": int(time.time() * 1000), "step": step, "metrics": values})

    def set_tags(self, tags: Mapping[str, str]) -> None:
        self._outbox.put("tags", {"tags": {name: without_secrets(value) for name, value in tags.items()}})

    def set_description(self, text: str) -> None:
        """The description, unless somebody has written another one."""
        self._outbox.put("description", {"text": without_secrets(text)})

    def log_datasets(self, datasets: Sequence[DatasetInput]) -> None:
        self._outbox.put("datasets", {"datasets": [dataset.document() for dataset in datasets]})

    def log_file(self, path: Path, folder: str | None = None) -> None:
        self._outbox.put("file", {"folder": folder}, path)

    def log_table(self, table: pd.DataFrame, name: str) -> None:
        """A table for the evaluation view of ``mlflow ui`` (class x run); replaces one of that name."""
        values = table.astype(object).where(table.notna(), None)
        # MLflow's own log_table appends to a table that is there, and a run that is resumed is evaluated again.
        self.log_json({"columns": list(values), "data": values.to_numpy().tolist()}, name)
        self._outbox.put("table", {"name": name})

    def log_written(self, name: str, write: Callable[[Path], object]) -> None:
        with _left_out_without_room(name):
            super().log_written(name, write)

    def log_image(self, image: Pixels, *, key: str, step: int) -> None:
        with _left_out_without_room(f"the image {key} of step {step}"), tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "image.png"
            Image.fromarray(image).save(path)
            self._outbox.put("image", {"key": key, "step": step, "time": int(time.time() * 1000)}, path)

    def log_model_input(self, model_id: str | None, *, evaluated_on: DatasetInput | None = None) -> None:
        if model_id is not None:
            dataset = None if evaluated_on is None else [evaluated_on.name[:LONGEST_NAME], evaluated_on.digest]
            self._outbox.put("model_input", {"model_id": model_id, "dataset": dataset})

    def log_model(self, checkpoint: Path, *, register_as: str | None, step: int, dataset: DatasetInput) -> None:
        """A checkpoint as an MLflow model with the metrics of its evaluation, registered if a name is given."""
        evaluated_on = [dataset.name[:LONGEST_NAME], dataset.digest]
        self._outbox.put("model", {"register_as": register_as, "step": step, "dataset": evaluated_on}, checkpoint)

    def end(self, status: str, *, patience: float) -> None:
        """Wait until all has arrived, or the store has failed for ``patience`` seconds."""
        self._outbox.put("end", {"status": status, "time": int(time.time() * 1000)})
        self._outbox.wait(patience=patience)

    def close(self) -> Unsent | None:
        """Stop sending and return what never arrived."""
        return self._outbox.close()

    def _deliver(self, item: Item) -> None:
        try:
            getattr(self, f"_deliver_{item.kind}")(item)
        except Refused:
            raise
        except Exception as error:
            # What has arrived by now must be looked up again.
            self._known.clear()
            if refuses(error):
                raise Refused(first_line(error)) from error
            raise

    def _answers(self) -> bool:
        try:
            self._client.get_run(self.run_id)
        except Exception:
            return False
        return True

    def _deliver_params(self, item: Item) -> None:
        known = self._client.get_run(self.run_id).data.params
        for name in [name for name, value in known.items() if without_secrets(value) != value]:
            warn(
                f"the parameter {name}, which mlflow run has logged, holds a password, and MLflow lets no parameter be "
                "changed: delete the run, and give passwords in PGPASSWORD or PGPASSFILE"
            )
        given: dict[str, str] = item.content["params"]
        new = {name: value for name, value in given.items() if name not in known}
        # A resumed run has the parameters it was started with.
        for name in () if self._resumed else given.keys() & known.keys():
            if f"used/{name}" not in known and not _same_value(known[name], given[name]):
                new[f"used/{name}"] = given[name]
        self._each(new, lambda some: mlflow.log_params(dict(some), synchronous=True, run_id=self.run_id))

    def _deliver_metrics(self, item: Item) -> None:
        content = item.content
        points = {name: value for name, value in content["metrics"].items() if not self._has(name, value, item)}

        def send(some: Mapping[str, float]) -> None:
            metrics = [Metric(name, value, content["time"], content["step"]) for name, value in some.items()]
            self._client.log_batch(self.run_id, metrics, synchronous=True)

        self._each(points, send)
        for name in points.keys() & self._known.keys():
            self._known[name].add((content["step"], _stored(points[name])))

    def _has(self, name: str, value: float, item: Item) -> bool:
        """Whether the store has the point. Asked only where it may: a lost answer, or a run that is resumed."""
        if (item.again or self._resumed) and name not in self._known:
            history = self._client.get_metric_history(self.run_id, name)
            self._known[name] = {(point.step, _stored(point.value)) for point in history}
        step, known = item.content["step"], self._known.get(name, set())
        # A training that is resumed repeats the steps since its last checkpoint; only their times differ.
        return (step, _stored(value)) in known or (self._resumed and any(step == other for other, _ in known))

    def _deliver_tags(self, item: Item) -> None:
        def send(some: Mapping[str, str]) -> None:
            for name, value in some.items():
                self._client.set_tag(self.run_id, name, value)

        self._each(item.content["tags"], send)

    def _deliver_description(self, item: Item) -> None:
        tags, text = self._client.get_run(self.run_id).data.tags, item.content["text"]
        if tags.get(DESCRIPTION, "") in ("", tags.get(_OWN_DESCRIPTION), text):
            # In this order, so that a call between the two that is repeated finds its own text.
            for name in (DESCRIPTION, _OWN_DESCRIPTION):
                self._client.set_tag(self.run_id, name, text)

    def _deliver_datasets(self, item: Item) -> None:
        # The store adds none that the run has.
        self._client.log_inputs(self.run_id, datasets=[_as_mlflow(**dataset) for dataset in item.content["datasets"]])

    def _deliver_file(self, item: Item) -> None:
        self._client.log_artifact(self.run_id, str(item.file), item.content["folder"])

    def _deliver_image(self, item: Item) -> None:
        assert item.file is not None
        self._images.deliver(item.file, item.content, resumed=self._resumed)

    def _deliver_table(self, item: Item) -> None:
        known = json.loads(self._client.get_run(self.run_id).data.tags.get(_LOGGED_ARTIFACTS, "[]"))
        entry = {"path": item.content["name"], "type": "table"}
        if entry not in known:
            self._client.set_tag(self.run_id, _LOGGED_ARTIFACTS, json.dumps([*known, entry]))

    def _deliver_model_input(self, item: Item) -> None:
        model_id, dataset = item.content["model_id"], item.content["dataset"]
        self._client.log_inputs(self.run_id, models=[LoggedModelInput(model_id)])
        if dataset is not None:
            link_metrics(self._client, self.run_id, model_id, step=0, dataset=tuple(dataset))

    def _deliver_model(self, item: Item) -> None:
        content = item.content
        assert item.file is not None
        dataset = tuple(content["dataset"])
        log_checkpoint(
            self.run_id, item.file, register_as=content["register_as"], step=content["step"], dataset=dataset
        )

    def _each(self, entries: Mapping[str, Value], send: Callable[[Mapping[str, Value]], object]) -> None:
        """Send entries at once, or one by one where the store refuses: one that it does not take must not take the
        others along. Raises Refused for those, when all others have arrived."""
        if not entries:
            return
        try:
            send(entries)
        except Exception as error:
            if not refuses(error):
                raise
        else:
            return
        refused = []
        for name, value in entries.items():
            try:
                send({name: value})
            except Exception as error:
                if not refuses(error):
                    raise
                refused.append(f"{name}: {first_line(error)[:300]}")
        if refused:
            raise Refused("; ".join(refused))

    def _deliver_end(self, item: Item) -> None:
        # The end that an earlier process could not send no longer holds: the run has been resumed.
        if not item.earlier:
            self._client.set_terminated(self.run_id, item.content["status"], item.content["time"])


def _same_value(quoted: str, value: str) -> bool:
    """Whether a parameter as ``mlflow run`` logs it, quoted for a shell and cut when it is long, is this value."""
    try:
        logged = " ".join(shlex.split(quoted)) if quoted[:1] in ("'", '"') else quoted
    except ValueError:
        # Cut between the quotes.
        return value.startswith(quoted[1:])
    if len(quoted) >= _LONGEST:
        return value.startswith(logged)
    try:
        return float(logged) == float(value)
    except ValueError:
        return logged == value


def _as_mlflow(name: str, digest: str, source: str, profile: Mapping[str, Any], context: str) -> MlflowDatasetInput:
    place = json.dumps({"uri": without_secrets(source)})
    dataset = Dataset(name[:LONGEST_NAME], digest, "local", place, profile=json.dumps(profile, ensure_ascii=False))
    return MlflowDatasetInput(dataset, [InputTag("mlflow.data.context", context)])


def _stored(value: float) -> float:
    """A value as a store gives it back; NaN as infinity, which no store keeps, so that it equals itself."""
    return math.inf if math.isnan(value) else max(min(value, sys.float_info.max), -sys.float_info.max)


@contextlib.contextmanager
def _left_out_without_room(name: str) -> Iterator[None]:
    """A full disk, and whatever else the system refuses, must not end the work: the file is reported and left out."""
    try:
        yield
    except OSError as error:
        reason = refusal(error)
        if reason is None:
            raise
        warn(f"{name} is not logged: {reason}")


def warn(text: str) -> None:
    """Print a line on standard error at once, without secrets."""
    print_to(sys.stderr, text)
