"""README and docs: what they name exists, their commands can be given, and their words are those of the field."""

from __future__ import annotations

import ast
import importlib
import os
import re
from pathlib import Path

import pytest
from documents import (
    DOCUMENTS,
    README,
    ROOT,
    SETTINGS,
    TUTORIAL,
    blocks,
    commands,
    is_ours,
    settings_of,
    table_of_contents,
)
from settings_reference import GROUPS, settings_reference
from words import unwanted_words

from retinaflow.settings.commands import COMMANDS, TrainConfig
from retinaflow.settings.resolve import resolve
from retinaflow.settings.value_types import as_text

MOST_WORDS = 1200
"""Of the README: one page."""
OURS = [(document.name, words) for document in DOCUMENTS for words in commands(document) if is_ours(words)]
by_name = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


# What they name


def test_the_readme_is_one_page() -> None:
    words = len(README.read_text(encoding="utf-8").split())
    assert words <= MOST_WORDS, f"README.md has {words} words; move what is more than {MOST_WORDS} to docs/"


def test_the_readme_names_every_entry_point() -> None:
    named = set(re.findall(r"`(\w+)`", README.read_text(encoding="utf-8")))
    assert not sorted(set(COMMANDS) - named)


@pytest.mark.parametrize("entry_point", COMMANDS)
def test_the_documents_run_every_entry_point(entry_point: str) -> None:
    assert entry_point in {settings_of(words)[0] for _, words in OURS}, f"no document runs {entry_point}"


@pytest.mark.parametrize(("document", "words"), OURS, ids=[f"{name}: {' '.join(words)[:90]}" for name, words in OURS])
def test_a_command_in_the_documents_can_be_given(document: str, words: list[str]) -> None:
    name, given = settings_of(words)
    assert name in COMMANDS, f"{document}: {name} is no entry point"
    # Files of runs and of the reader are not here; every other value is checked by the settings themselves.
    given = {setting: value for setting, value in given.items() if setting not in ("config", "data")}
    settings = resolve(COMMANDS[name], given)
    assert set(given) <= set(type(settings).model_fields), f"{document}: {name} lacks one of {sorted(given)}"


@by_name
def test_a_document_names_only_settings_that_exist(document: Path) -> None:
    known = {name for kind in COMMANDS.values() for name in kind.model_fields}
    named = re.findall(r"-P\s+(\w+)=(?!value\b)", document.read_text(encoding="utf-8"))
    assert not [name for name in named if name not in known]


@pytest.mark.parametrize(
    ("document", "heading", "sets"),
    [
        (README, "## The settings that matter first", ("mydata",)),
        (ROOT / "docs" / "training.md", "## Defaults", ("demo", "mydata")),
    ],
    ids=["README.md", "training.md"],
)
def test_the_defaults_in_a_table_are_those_that_train_uses(document: Path, heading: str, sets: tuple[str, ...]) -> None:
    """Rows ``| `setting`, `setting` | default, default | ...``, a column of defaults for each kind of data."""
    section = document.read_text(encoding="utf-8").split(heading)[1].split("\n## ")[0]
    rows = [
        [cell.replace("`", "").split(", ") for cell in row.split(" | ")]
        for row in re.findall(r"^\| (`.+) \|$", section, re.M)
    ]
    assert sum(len(names) for names, *_ in rows) >= 8
    for number, data in enumerate(sets, 1):
        used = resolve(COMMANDS["train"], {"data": data})
        for cells in rows:
            for name, default in zip(cells[0], cells[number], strict=True):
                value = getattr(used, name)
                shown = f"{value:g}" if isinstance(value, float) else as_text(value)
                if document == README and TrainConfig.auto_of(name):
                    shown = "auto"
                assert name == "data" or default == shown, name


def test_the_readme_tests_as_the_build_does() -> None:
    install, test = re.compile(r"pip install\b.*\.\[test\]"), re.compile(r"(?:^|&&)\s*pytest\b", flags=re.MULTILINE)
    for name in ("README.md", ".ci/run"):
        text = (ROOT / name).read_text(encoding="utf-8")
        first = install.search(text)
        assert first, f"{name} lacks pip install '.[test]'"
        assert test.search(text, first.end()), f"{name} runs no pytest after pip install '.[test]'"


@by_name
def test_links_and_images_of_a_document_exist(document: Path) -> None:
    text = re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    missing = []
    for target in re.findall(r"\]\(<?([^)\s>]+)>?(?:\s[^)]*)?\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, heading = target.partition("#")
        file = document.parent / path if path else document
        if not file.exists() or (heading and heading not in table_of_contents(file)):
            missing.append(target)
    assert not missing, f"{document.name} links to {missing}, which do not exist"


def test_every_page_and_image_is_linked_from_a_document() -> None:
    text = "\n".join(document.read_text(encoding="utf-8") for document in DOCUMENTS)
    files = [*(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "images").iterdir()]
    assert not [path.name for path in files if not re.search(rf"[(/]{re.escape(path.name)}[)#]", text)]


@by_name
def test_files_that_a_document_names_exist(document: Path) -> None:
    named = re.findall(r"\b(?:benchmarks|tests|retinaflow)/[\w/]+\.\w+", document.read_text(encoding="utf-8"))
    assert not [name for name in named if not (ROOT / name).exists()]


def test_the_tree_of_the_readme_names_only_what_exists_in_the_package() -> None:
    (tree,) = (block for block in blocks(README, "text") if block.startswith("retinaflow/\n"))
    named = [
        name for line in tree.splitlines()[1:] for name in re.findall(r"\b(\w+/|\w+\.py)(?= |$)", line.split("   ")[0])
    ]
    folders = {path.name + "/" for path in (ROOT / "retinaflow").iterdir() if (path / "__init__.py").exists()}
    assert not [name for name in named if not (ROOT / "retinaflow" / name).exists()]
    assert folders <= set(named), f"the tree lacks {sorted(folders - set(named))}"


# Python


@by_name
def test_what_the_python_of_a_document_imports_from_the_package_exists(document: Path) -> None:
    for block in blocks(document, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("retinaflow"):
                module = importlib.import_module(str(node.module))
                for alias in node.names:
                    if not hasattr(module, alias.name):
                        importlib.import_module(f"{node.module}.{alias.name}")


def test_what_the_page_on_python_names_exists() -> None:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| [^|`]+ \| (`[^|]+`) \| `(retinaflow[\w.]+)`", text, flags=re.MULTILINE)
    assert len(rows) > 10
    for names, module in rows:
        for name in re.findall(r"`(\w+)`", names):
            assert hasattr(importlib.import_module(module), name), f"{module} has no {name}"


# The list of settings


def test_the_groups_of_commands_hold_every_command_once() -> None:
    assert sorted(name for names in GROUPS.values() for name in names) == sorted(COMMANDS)


def test_the_list_of_settings_is_that_of_the_code() -> None:
    """UPDATE_GOLDEN=1 writes it anew."""
    text = settings_reference()
    if os.environ.get("UPDATE_GOLDEN") == "1":
        SETTINGS.write_text(text, encoding="utf-8")
    assert SETTINGS.read_text(encoding="utf-8") == text, "docs/settings.md is out of date: run with UPDATE_GOLDEN=1"


def test_the_recipe_of_the_tutorial_holds_settings_of_train_and_search(tmp_path: Path) -> None:
    (recipe,) = blocks(TUTORIAL, "yaml")
    (tmp_path / "recipe.yaml").write_text(recipe, encoding="utf-8")
    for name in ("train", "search"):
        assert resolve(COMMANDS[name], {"config": str(tmp_path / "recipe.yaml")}).config is not None


# Words


@pytest.mark.parametrize(
    "document", [*(path for path in DOCUMENTS if path != SETTINGS), ROOT / "CHANGELOG.md"], ids=lambda path: path.name
)
def test_a_document_uses_the_words_of_the_field(document: Path) -> None:
    """The meanings in docs/settings.md are the help of the flags."""
    found = list(unwanted_words(document.read_text(encoding="utf-8"), quotes=document.name == "decisions.md"))
    assert not found, f"{document.name}: " + "; ".join(found)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Runs that were judged on other data", "judged"),
        ("The truth is expanded", "truth"),
        ("Ground truth is expanded, and ground-truth boxes", None),
        ("a share of the images", "share of"),
        ("machines share a study", None),
        ("what went on, went ahead", "went on"),
        ("the setting `truth`, the folder `pictures/`, [docs](pictures/x.png)", None),
        ("the column num_truths", None),
    ],
)
def test_words_are_found_as_whole_words_outside_of_code(text: str, found: str | None) -> None:
    assert [hit.split("'")[1] for hit in unwanted_words(text)] == ([found] if found else [])


# Images


def test_images_of_the_documents_are_small() -> None:
    images = [
        path for path in ROOT.glob("docs/**/*") if path.suffix.lower() in {".png", ".jpg", ".jpeg", ".gif", ".svg"}
    ]
    assert images
    assert not {path.name: path.stat().st_size for path in images if path.stat().st_size > 300_000}
