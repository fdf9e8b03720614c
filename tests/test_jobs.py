"""The files of docs/jobs, with which a training begins on a cluster: as far as a schema goes."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from documents import settings_of

from retinaflow.settings.commands import COMMANDS
from retinaflow.settings.resolve import resolve

JOBS = Path(__file__).parents[1] / "docs" / "jobs"
SLURM, TRAINJOB, SKYPILOT = (JOBS / name for name in ("slurm.sh", "trainjob.yaml", "skypilot.yaml"))
SBATCH = {
    "job-name": r"\w+", "nodes": r"\d+", "ntasks-per-node": "1", "gpus-per-node": r"\d+", "cpus-per-task": r"\d+",
    "time": r"\d+:\d\d:\d\d", "requeue": None, "open-mode": "append|truncate", "output": r"\S+",
    "signal": r"(B:)?(USR1|TERM)@\d{1,5}",
}  # fmt: skip
"""Options of sbatch (Slurm's manual page) and the form of their values; None: it takes none."""

POD: dict[str, Any] = {
    "volumes": [{"name": str, "persistentVolumeClaim": {"claimName": str}}],
    "containers": [{"name": str, "volumeMounts": [{"name": str, "mountPath": str}]}],
}
RUNTIME = {"spec": {"replicatedJobs": [{"name": str, "template": {"spec": {"template": {"spec": POD}}}}]}}
FIELDS: dict[Path, dict[str, Any]] = {
    # kubeflow/trainer, pkg/apis/trainer/v1alpha1/trainjob_types.go: fields of a TrainJob.
    TRAINJOB: {
        "apiVersion": str,
        "kind": str,
        "metadata": {"name": str},
        "spec": {
            "runtimeRef": {"name": str, "kind": str, "apiGroup": str},
            "trainer": {
                "image": str,
                "command": [str],
                "args": [str],
                "env": [{"name": str, "value": str}],
                "numNodes": int,
                "numProcPerNode": int,
                "resourcesPerNode": {"limits": dict, "requests": dict},
            },
            "runtimePatches": [{"manager": str, "trainingRuntimeSpec": {"template": RUNTIME}}],
            "suspend": bool,
            "activeDeadlineSeconds": int,
        },
    },
    # The page "SkyPilot YAML" of SkyPilot's documentation.
    SKYPILOT: {
        "name": str,
        "workdir": str,
        "num_nodes": int,
        "resources": {
            "infra": str,
            "accelerators": str,
            "use_spot": bool,
            "disk_size": int,
            "job_recovery": {"strategy": str, "max_restarts_on_errors": int, "recover_on_exit_codes": list},
        },
        "envs": dict,
        "file_mounts": dict,
        "setup": str,
        "run": str,
    },
}


def _check(value: Any, form: Any, path: str) -> None:
    if isinstance(form, dict):
        assert isinstance(value, dict), path
        assert set(value) <= set(form), f"{path} has no {sorted(set(value) - set(form))}"
        for name, item in value.items():
            _check(item, form[name], f"{path}.{name}")
    elif isinstance(form, list):
        assert isinstance(value, list), path
        for item in value:
            _check(item, form[0], path)
    else:
        assert isinstance(value, form), f"{path}={value!r}"
        assert form is not int or not isinstance(value, bool), path


def _document(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", FIELDS, ids=lambda path: path.name)
def test_a_job_has_fields_of_its_schema_only(path: Path) -> None:
    _check(_document(path), FIELDS[path], path.stem)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"spec": {"trainer": {"numNodes": "2"}}}, "numNodes"), ({"spec": {"podSpecOverrides": []}}, "podSpecOverrides")],
    ids=["a text for a number", "a field of an earlier version"],
)
def test_a_job_with_another_field_is_noticed(change: dict[str, Any], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        _check(change, FIELDS[TRAINJOB], "trainjob")


def test_the_trainjob_is_of_the_published_version_and_its_volume_has_a_mount() -> None:
    job = _document(TRAINJOB)
    assert (job["apiVersion"], job["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    assert re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", job["metadata"]["name"])
    (patch,) = job["spec"]["runtimePatches"]
    (node,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = node["template"]["spec"]["template"]["spec"]
    (volume,), (container,) = pod["volumes"], pod["containers"]
    assert volume["name"] == container["volumeMounts"][0]["name"]
    # The environment of the container called node is that of the trainer, by the rule of the API.
    assert "env" not in container


def test_the_options_of_the_slurm_script_are_options_of_sbatch() -> None:
    lines = SLURM.read_text(encoding="utf-8").splitlines()
    options = [line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")]
    assert len(options) >= 8
    for option in options:
        name, _, value = option.partition("=")
        form = SBATCH[name]
        assert value == "" if form is None else re.fullmatch(form, value), option
    first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert not [line for line in lines[first_command:] if line.startswith("#SBATCH")], "sbatch reads none after that"


@pytest.mark.parametrize("path", [SLURM, SKYPILOT], ids=lambda path: path.name)
def test_a_script_is_bash(path: Path) -> None:
    texts = [path.read_text(encoding="utf-8")] if path == SLURM else [_document(path)[key] for key in ("setup", "run")]
    for text in texts:
        done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("path", [SLURM, TRAINJOB, SKYPILOT], ids=lambda path: path.name)
def test_a_job_trains_with_settings_that_exist_and_resumes_by_itself(path: Path) -> None:
    if path == TRAINJOB:
        trainer = _document(path)["spec"]["trainer"]
        words = [*trainer["command"], *trainer["args"]]
        restarts = {item["name"]: item["value"] for item in trainer["env"]}["PET_MAX_RESTARTS"]
    else:
        text = path.read_text(encoding="utf-8") if path == SLURM else _document(path)["run"]
        (command,) = [line for line in text.replace("\\\n", " ").splitlines() if "-m retinaflow" in line]
        words = [word for word in shlex.split(command.replace("$(", "").replace("|", "")) if word != "&"]
        restarts = next(word.partition("=")[2] for word in words if word.startswith("--max-restarts="))
    assert int(restarts) > 0
    name, given = settings_of(words)
    assert name == "train"
    settings = resolve(COMMANDS[name], {setting: value for setting, value in given.items() if setting != "data"})
    assert settings.resume == "auto"  # type: ignore[attr-defined]
