"""The documents of the project and the commands in them, for the tests that read them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from retinaflow.cli import build_parser

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
TUTORIAL = ROOT / "docs" / "tutorial.md"
SETTINGS = ROOT / "docs" / "settings.md"
DOCUMENTS = (README, *sorted((ROOT / "docs").glob("*.md")))


def blocks(document: Path, kind: str) -> list[str]:
    """The fenced blocks of a kind."""
    return re.findall(rf"^```{kind}\n(.*?)^```", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def commands(document: Path) -> list[list[str]]:
    """The words of every shell command, continued lines joined, comments left out."""
    lines = [line for block in blocks(document, "bash") for line in block.replace("\\\n", " ").splitlines()]
    parts = [part for line in lines for part in re.split(r"&&", line)]
    return [words for part in parts if (words := shlex.split(part, comments=True))]


def is_ours(words: list[str]) -> bool:
    """Whether a command starts an entry point of the project."""
    return words[:3] == ["mlflow", "run", "."] or (words[0] in ("python", "torchrun") and "retinaflow" in words)


def settings_of(words: list[str]) -> tuple[str, dict[str, str]]:
    """The entry point and the settings of one of our commands."""
    if words[0] != "mlflow":
        given = vars(build_parser().parse_args(words[words.index("retinaflow") + 1 :]))
        return given.pop("command"), given
    name = words[words.index("-e") + 1] if "-e" in words else "main"
    pairs = [words[index + 1].split("=", 1) for index, word in enumerate(words) if word == "-P"]
    return name, {pair[0]: pair[1] for pair in pairs}


def table_of_contents(document: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a document."""
    text = re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
