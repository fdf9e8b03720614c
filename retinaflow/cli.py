"""The command line: one subcommand per entry point, one flag per setting.

Flags are spelled like the settings (``--focal_gamma 1.5``, ``--track false``), so ``mlflow run -P`` and the command
line take the same words. Errors that a user can cause or meet (:data:`retinaflow.errors.SHOWN`, a full disk) end with a
message and exit code 2, without a traceback; a stop on request with 130. Anything else is a bug: its traceback is shown
and the exit code is 1. ``RETINAFLOW_TRACEBACK=1`` shows every traceback.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from types import TracebackType

from retinaflow.errors import SHOWN, Interrupted, SettingError, refusal
from retinaflow.interrupts import STOPPED, stopping_at_once
from retinaflow.progress import print_to, report
from retinaflow.settings.commands import COMMANDS
from retinaflow.settings.data_settings import TrackingSettings
from retinaflow.settings.help import MAIN_SETTINGS, SettingsParser, add_settings
from retinaflow.settings.resolve import FOLDER_FILE, of_folder, resolve


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit code."""
    sys.excepthook = _show_traceback
    with stopping_at_once():
        given: dict[str, str] = {}
        try:
            given = vars(build_parser().parse_args(arguments))
            _run(given.pop("command"), given)
        except (Interrupted, KeyboardInterrupt) as error:
            print_to(sys.stderr, f"stopped: {str(error) or 'interrupted'}")
            return STOPPED
        except (*SHOWN, OSError) as error:
            message = refusal(error) if isinstance(error, OSError) else str(error)
            if message is None or os.environ.get("RETINAFLOW_TRACEBACK") == "1":
                raise
            print_to(sys.stderr, f"error: {message}{_where_paths_begin(message, given)}")
            return 2
    return 0


def _run(command: str, given: Mapping[str, str]) -> None:
    _refuse_several_processes(command)
    _verify_working_folder()
    config = resolve(COMMANDS[command], given, fetch=_fetched)
    for name, value in of_folder(type(config), getattr(config, "data", None), config.model_fields_set).items():
        report(f"{FOLDER_FILE} of the data folder: {name}={str(value).lower()}")
    estimates = command == "search" and getattr(config, "dry_run", False)
    if not estimates and int(os.environ.get("RANK", "0")) == 0:
        _verify_before_work(command, config)
    importlib.import_module(f"retinaflow.commands.{command}").run(config)


def _verify_before_work(command: str, config: TrackingSettings) -> None:
    """Whether the results can be stored, before minutes are spent on reading annotations."""
    if command != "export":
        _verify_folder("output", config.output)
    if command not in ("train", "convert", "download", "export"):
        from retinaflow.runs.run import refuse_folder_of_another

        refuse_folder_of_another(config)
    file = "output" if command == "export" else "submission"
    if (path := getattr(config, file, None)) is not None:
        if path.is_dir():
            raise SettingError(f"{file}={path}: must be a file to write, but is a folder; add the name of a file")
        _verify_folder(file, path.parent)
    if config.track:
        # Here, as MLflow takes seconds to load.
        from retinaflow.runs.before_work import verify_store

        verify_store(
            experiment=config.experiment if "experiment" in config.model_fields_set else None,
            register_as=getattr(config, "register_as", None),
            alias=getattr(config, "alias", None),
            resumes=getattr(config, "resume", None) not in (None, "auto"),
        )


def _verify_folder(setting: str, folder: Path) -> None:
    """Raise SettingError for a folder that cannot be written, or that a file stands in the way of."""
    present = folder.absolute()
    while not present.exists() and not present.is_symlink() and present != present.parent:
        present = present.parent
    if not present.is_dir():
        kind = "a link that leads nowhere" if present.is_symlink() and not present.exists() else "a file"
        what = f"it is {kind}" if present == folder.absolute() else f"{present} is {kind}"
        raise SettingError(f"{setting}={folder}: must be a folder, but {what}")
    try:
        # Permissions alone do not decide: the disk may be mounted for reading, or be none (/proc).
        with TemporaryFile(dir=present):
            pass
    except OSError as error:
        raise SettingError(f"{setting}={folder}: the folder {present} cannot be written: {error.strerror}") from None


def _show_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print the traceback of a bug, without secrets."""
    print_to(sys.stderr, "".join(traceback.format_exception(kind, error, trace)).rstrip())


def _where_paths_begin(message: str, given: Mapping[str, str]) -> str:
    """What a missing relative path of the message is relative to: under ``mlflow run`` not the caller's folder."""
    words = {word for value in given.values() for word in value.split(",")} - {""}
    if "no such" not in message or not any(word in message and _is_missing_path(word) for word in words):
        return ""
    why = ", the project's folder, in which mlflow run starts it; give an absolute path"
    return f"\n(paths are relative to {Path.cwd()}{why if 'MLFLOW_RUN_ID' in os.environ else ''})"


def _is_missing_path(word: str) -> bool:
    try:
        return not Path(word).is_absolute() and not Path(word).exists()
    except (OSError, ValueError):
        return False


def _fetched(address: str) -> Path:
    # Here, as MLflow takes seconds to load: settings are read before anything else.
    from retinaflow.runs.store import fetch_file

    return fetch_file(address)


def _verify_working_folder() -> None:
    try:
        Path.cwd()
    except OSError as error:
        raise SettingError(
            f"the working folder cannot be read ({error.strerror}): it was removed, or may not be entered; change into "
            "a folder that exists (cd) and start again"
        ) from None


def _refuse_several_processes(command: str) -> None:
    """Any other command than ``train`` would do the same work, and write the same files, once per process."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1 and command != "train":
        raise SettingError(
            f"{command} runs in one process, but torchrun started {size} (WORLD_SIZE={size}); only train runs in "
            f"several: start {command} without torchrun"
        )


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands; only flags that are given appear in its result."""
    parser = SettingsParser(
        prog="retinaflow", description="RetinaNet with focal loss on long-tailed detection data.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, settings in COMMANDS.items():
        summary = " ".join((settings.__doc__ or "").split(": ", 1)[-1].replace("`", "").split())
        summary = summary[:1].upper() + summary[1:]
        command = commands.add_parser(
            name,
            help=summary.partition(". ")[0].rstrip("."),
            description=summary,
            usage=f"retinaflow {name} [--SETTING VALUE ...]",
            allow_abbrev=False,
        )
        add_settings(command, settings, MAIN_SETTINGS[name])
    return parser
