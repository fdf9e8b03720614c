"""What a served model needs installed: the distributions that its code imports, with the versions of this machine.

The code of a logged model is this package, and it starts with ``served_model.py``. Its imports are read from the
sources: those of that file, of the files of this package that it imports, and so on, those inside functions included.
So nothing that loading or predicting can import is missing, and no list is kept by hand.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Collection, Iterator
from importlib.metadata import distribution, packages_distributions
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]
_START = f"{_PACKAGE.name}.runs.served_model"


def serving_requirements(more: Collection[str] = ()) -> list[str]:
    """Lines of a requirements file, sorted: ``NAME==VERSION`` of each distribution that serving imports, and of the
    modules ``more``, which only some models need.

    A local version (``2.9.1+cpu``) is given without its last part: no package index has it.
    """
    known = packages_distributions()
    names = {_distribution_of(known[module]) for module in imported_modules().union(more) if module in known}
    return sorted(f"{name}=={distribution(name).version.partition('+')[0]}" for name in names)


def imported_modules() -> set[str]:
    """Top-level names of the modules of others, not of Python's own, that serving imports."""
    waiting, seen, others = [_START], set[str](), set[str]()
    while waiting:
        module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        for name in _imports(_source_of(module)):
            top = name.partition(".")[0]
            if top == _PACKAGE.name:
                # Importing a.b.c runs a and a.b too; `from a import b` may name a module or a value of a.
                parents = name.split(".")
                waiting += [".".join(parents[: depth + 1]) for depth in range(len(parents))]
            elif top not in sys.stdlib_module_names:
                others.add(top)
    return others


def _source_of(module: str) -> Path | None:
    """The file of a module of this package; None for a name that is no module."""
    path = _PACKAGE.joinpath(*module.split(".")[1:])
    found = [file for file in (path / "__init__.py", path.with_suffix(".py")) if file.is_file()]
    return found[0] if found else None


def _imports(path: Path | None) -> Iterator[str]:
    """Full names that a source file imports; of ``from a import b`` both ``a`` and ``a.b``."""
    if path is None:
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _distribution_of(candidates: list[str]) -> str:
    """The one distribution to install for a module that several have files of: the one that brings the others."""
    brought = {_normalised(name) for one in candidates for name in _requires(one)}
    return next((name for name in sorted(candidates, reverse=True) if _normalised(name) not in brought), candidates[0])


def _requires(name: str) -> list[str]:
    """Names of the distributions that one needs, without those of its extras."""
    lines = [line for line in distribution(name).requires or [] if "extra ==" not in line]
    return [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in lines]


def _normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
