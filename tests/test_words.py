"""The package speaks in terms of the field: in help, messages, log lines, docstrings and comments."""

from __future__ import annotations

import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest
from words import unwanted_words

PACKAGE = Path(__file__).parents[1] / "retinaflow"
SOURCES = [path for path in sorted([*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.html")]) if path.stat().st_size]
REPLACEMENT_FIELD = re.compile(r"\{[^{}]*\}")


def _texts(path: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of the comments and strings of a module; of an HTML template all lines."""
    source = path.read_text(encoding="utf-8")
    if path.suffix == ".html":
        yield from enumerate(source.splitlines(), 1)
        return
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.STRING, tokenize.COMMENT) and " " in token.string:
            text = token.string
            while REPLACEMENT_FIELD.search(text):
                text = REPLACEMENT_FIELD.sub("", text)
            yield from enumerate(text.splitlines(), token.start[0])


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_a_module_uses_the_words_of_the_field(path: Path) -> None:
    found = [f"line {line}: {hit.split(': ', 1)[1]}" for line, text in _texts(path) for hit in unwanted_words(text)]
    assert not found, f"{path.relative_to(PACKAGE.parent)}:\n" + "\n".join(found)
