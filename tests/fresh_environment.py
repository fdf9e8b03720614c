"""A fresh virtual environment that holds exactly what some requirements bring, and costs nothing.

The files are links to those installed here, so neither a download nor 6 GB of disk is needed, and versions are those of
the tests. What is not among the requirements, or needed by one of them, cannot be imported in it: not this checkout
either.
"""

from __future__ import annotations

import importlib.metadata as metadata
import os
import re
import subprocess
import venv
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement


def fresh_environment(folder: Path, requirements: Iterable[str]) -> Path:
    """The Python program of a new environment in ``folder``.

    Fails when a requirement, or one of a requirement's own, is not installed here in a version that it allows.
    """
    venv.create(folder, with_pip=False, symlinks=True)
    site = next(folder.glob("lib/python*/site-packages"))
    for found in _closure(requirements):
        tops = {Path(str(file)).parts[0] for file in found.files or []} - {".."}
        for top in tops - {"__pycache__"}:
            source = Path(str(found.locate_file(top)))
            if source.exists() and not (site / top).exists():
                (site / top).symlink_to(source)
    return folder / "bin" / "python"


def run_in(python: Path, *words: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``python WORDS`` with no variable of this process that points to a checkout. Output is text."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    kept |= {"PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}", **environment}
    return subprocess.run([python, *words], cwd=cwd, env=kept, capture_output=True, text=True, check=False)


def _closure(requirements: Iterable[str]) -> list[metadata.Distribution]:
    """The distributions that the requirements name, and those that these need."""
    waiting = [Requirement(line) for line in requirements]
    seen: dict[str, metadata.Distribution] = {}
    done: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        wanted = waiting.pop()
        name, extras = re.sub(r"[-_.]+", "-", wanted.name).lower(), frozenset(wanted.extras)
        if (name, extras) in done:
            continue
        done.add((name, extras))
        found = seen.setdefault(name, metadata.distribution(name))
        # A local version (2.9.1+cpu) counts as the public one.
        assert wanted.specifier.contains(found.version.partition("+")[0], prereleases=True), (
            str(wanted),
            found.version,
        )
        for line in found.requires or []:
            own = Requirement(line)
            if own.marker is None or any(own.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
                waiting.append(own)
    return list(seen.values())
