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
from collections.abc import Mapping, Sequence
from pathlib import Path

from retinaflow.errors import SHOWN, Interrupted, SettingError, is_refused_write
from retinaflow.settings.commands import COMMANDS
from retinaflow.settings.data_settings import TrackingSettings
from retinaflow.settings.help import MAIN_SETTINGS, SettingsParser, add_settings
from retinaflow.settings.resolve import FOLDER_FILE, RENAMED, of_folder, resolve


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit code."""
    given = vars(build_parser().parse_args(arguments))
    command = given.pop("command")
    if "MLFLOW_RUN_ID" in os.environ:
        given = without_defaults(COMMANDS[command], given)
    try:
        _refuse_several_processes(command)
        config = resolve(COMMANDS[command], given, fetch=_fetched)
        for name, value in of_folder(type(config), getattr(config, "data", None), config.model_fields_set).items():
            print(f"{FOLDER_FILE} of the data folder: {name}={str(value).lower()}", flush=True)
        importlib.import_module(f"retinaflow.commands.{command}").run(config)
    except (Interrupted, KeyboardInterrupt) as error:
        print(f"stopped: {str(error) or 'interrupted'}", file=sys.stderr)
        return 130
    except (*SHOWN, OSError) as error:
        is_bug = isinstance(error, OSError) and not is_refused_write(error)
        if is_bug or os.environ.get("RETINAFLOW_TRACEBACK") == "1":
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _fetched(address: str) -> Path:
    # Here, as MLflow takes seconds to load: settings are read before anything else.
    from retinaflow.runs.store import fetch_file

    return fetch_file(address)


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


def without_defaults(settings: type[TrackingSettings], given: Mapping[str, str]) -> dict[str, str]:
    """Flags whose value is not the default.

    ``mlflow run`` hands on every declared parameter, so a default there was chosen by nobody and must not override the
    file named by ``config``.
    """
    defaults = {name: settings.default_text(name) for name in settings.model_fields}
    return {name: value for name, value in given.items() if not _same(value, defaults.get(RENAMED.get(name, name), ""))}


def _same(first: str, second: str) -> bool:
    try:
        return float(first) == float(second)
    except ValueError:
        return first == second
