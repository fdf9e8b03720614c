"""The files below a folder of another layout, through links, without what the system hides."""

from __future__ import annotations

import os
from pathlib import Path


def hidden(path: Path, folder: Path) -> bool:
    """Whether a part of the path below ``folder`` begins with a dot: macOS puts ``._1.jpg`` beside ``1.jpg``."""
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def files_under(folder: Path) -> list[Path]:
    """All files at any depth, sorted, but hidden ones.

    Links to folders are followed unless they lead to one that holds ``folder`` itself; each folder is read once.
    """
    found: list[Path] = []
    seen: set[str] = set()
    tops, own = [folder], folder.resolve()
    # Links wait until the rest is read: a folder reached both ways keeps its own path, under which its labels are.
    for top in tops:
        for place, folders, names in os.walk(top):
            real = os.path.realpath(place)
            folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith("."))
            if real not in seen:
                seen.add(real)
                links = [path for name in folders if (path := Path(place, name)).is_symlink()]
                tops += [path for path in links if not own.is_relative_to(path.resolve())]
                found += [Path(place, name) for name in names if not name.startswith(".")]
    return sorted(found)
