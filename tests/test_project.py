"""The house rules: who may import whom, which library stays where, and that the project files agree with the code."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

import retinaflow
from retinaflow.settings.commands import COMMANDS
from retinaflow.settings.data_settings import Settings
from retinaflow.settings.help import MAIN_SETTINGS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "retinaflow"
SOURCES = sorted(PACKAGE.rglob("*.py"))
MODULES = [path.relative_to(PACKAGE).as_posix() for path in SOURCES]

ROOMS: tuple[str, ...] = (
    *("addresses", "errors", "boxes", "detections", "taxonomy", "files", "progress", "interrupts"),
    *("settings", "demo", "detector", "data", "metric", "statistics", "inference", "runs", "training"),
    *("reports", "comparison", "ensemble", "search", "commands", "cli", "__main__"),
)
"""Top-level modules and folders in the order of imports: each may import those before it, and itself."""

NEVER: Mapping[str, tuple[str, ...]] = {
    "data": ("detector",),
    "detector": ("data", "demo"),
    "metric": ("detector", "data"),
    "inference": ("metric", "statistics"),
}
"""What a room leaves alone although it comes earlier."""

EXCEPT: Mapping[str, tuple[str, ...]] = {
    # The public call reads files.
    "metric/evaluation.py": ("data",),
    # A merged model has calibrated scores.
    "inference/merged_checkpoint.py": ("statistics.calibration",),
    "inference/detector.py": ("statistics.calibration",),
}
"""File -> what it may import all the same."""

ONLY_IN: Mapping[str, tuple[str, ...]] = {
    "mlflow": ("runs/",),
    "albumentations": ("data/transforms.py",),
    "optuna": ("search/",),
    "triton": ("detector/kernels.py",),
}
"""Library -> the files or folders that may import it."""
COLUMN_FILES = re.compile(
    r"(demo/\w+|taxonomy|data/(annotation_rows|coco_results|id_columns|openimages|index|class_files|predictions|"
    r"formats/published_writer|download/tables))\.py"
)
MAX_FILE, MAX_FUNCTION = 350, 60


def _tree(module: str) -> ast.Module:
    return ast.parse((PACKAGE / module).read_text(encoding="utf-8"), filename=module)


def _imports(module: str) -> Iterator[tuple[int, str, tuple[str, ...]]]:
    """(line, imported module, names) of every import anywhere in a file, relative ones made absolute."""
    place = ["retinaflow", *Path(module).parent.parts]
    for node in ast.walk(_tree(module)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, ()
        elif isinstance(node, ast.ImportFrom):
            base = place[: len(place) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            yield node.lineno, source, tuple(alias.name for alias in node.names)


def _own_edges(module: str) -> Iterator[tuple[int, str]]:
    """(line, target) of imports from the package, target without the leading ``retinaflow.``."""
    for line, source, names in _imports(module):
        if source.split(".")[0] != "retinaflow":
            continue
        inside = source.removeprefix("retinaflow").removeprefix(".")
        is_folder = (PACKAGE / inside.replace(".", "/")).is_dir()
        for target in [f"{inside}.{name}".strip(".") for name in names] if is_folder else [inside]:
            yield line, target


def _under(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def _strings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def _listed_files() -> list[Path]:
    """What git tracks or would track."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip("not a git checkout")
    return [path for name in done.stdout.split("\0") if name and (path := ROOT / name).is_file()]


# Imports


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module: str) -> None:
    top = Path(module).parts[0].removesuffix(".py")
    if top == "__init__":
        assert not list(_own_edges(module))
        return
    assert top in ROOMS, f"retinaflow/{module} has no place in the order of imports (ROOMS)"
    earlier = ROOMS[: ROOMS.index(top) + 1]
    wrong = [
        f"line {line}: {target}"
        for line, target in _own_edges(module)
        if not _under(target, EXCEPT.get(module, ()))
        and (target.split(".")[0] not in earlier or _under(target, NEVER.get(top, ())))
    ]
    assert not wrong, f"retinaflow/{module} imports {wrong}: {top} may import {', '.join(earlier)} only"


def test_imports_of_the_package_form_no_cycle() -> None:
    from graphlib import TopologicalSorter

    names = {module.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for module in MODULES}
    edges = {
        module.removesuffix(".py").replace("/", "."): {target for _, target in _own_edges(module) if target in names}
        for module in MODULES
        if not module.endswith("__init__.py")
    }
    TopologicalSorter(edges).prepare()


@pytest.mark.parametrize("library", ONLY_IN)
def test_a_library_stays_behind_its_fence(library: str) -> None:
    wrong = [
        f"retinaflow/{module} line {line}"
        for module in MODULES
        if not module.startswith(ONLY_IN[library])
        for line, source, _ in _imports(module)
        if source.split(".")[0] == library
    ]
    assert not wrong, f"{library} may be imported by {', '.join(ONLY_IN[library])} only, but {wrong} do too"


def test_a_training_without_augmentation_does_without_trackers_search_and_augmentation() -> None:
    """Detector, data, loop and metric on a machine with torch and the usual libraries alone, as benchmarks/gpu.py."""
    blocked = ("mlflow", "optuna", "albumentations", "triton", "sqlalchemy")
    rooms = ("detector/", "data/", "metric/", "statistics/", "inference/")
    alone = ("training/loop.py", "training/step.py", "training/compilation.py", "training/optimizer.py")
    skipped = ("detector/kernels.py", "data/transforms.py")
    modules = [m for m in MODULES if (m.startswith(rooms) or m in alone) and m not in skipped]
    names = [f"retinaflow.{m.removesuffix('.py').removesuffix('/__init__').replace('/', '.')}" for m in modules]
    code = (
        "import importlib, sys\n"
        f"sys.modules.update(dict.fromkeys({blocked}))\n"
        f"for name in {names}: importlib.import_module(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_metric_and_data_do_without_torch() -> None:
    wrong = [
        f"retinaflow/{module} line {line}"
        for module in MODULES
        if module.startswith(("metric/", "statistics/", "data/")) and module != "data/dataset.py"
        for line, source, _ in _imports(module)
        if source.split(".")[0] in ("torch", "torchvision")
    ]
    assert not wrong, f"of data, metric and statistics only data/dataset.py may import torch, but {wrong} do too"


def test_published_column_names_stand_in_their_readers_and_writers_only() -> None:
    wrong = [
        f"retinaflow/{module} line {line}: {text!r}"
        for module in MODULES
        if not COLUMN_FILES.fullmatch(module)
        for line, text in _strings(_tree(module))
        if text in ("ImageID", "LabelName", "IsGroupOf")
    ]
    assert not wrong, f"only {COLUMN_FILES.pattern} may know a column name, but got {wrong}"


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = ("torch", "mlflow", "numpy", "pandas", "pydantic", "cv2")
    code = f"import sys, retinaflow; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def _defined(module: str) -> set[str]:
    """Names at the top level of a module of the package, and the modules of a folder."""
    path = ROOT / f"{module.replace('.', '/')}.py"
    folder = path.with_suffix("")
    names = {item.stem for item in folder.iterdir()} if folder.is_dir() else set()
    source = path if path.is_file() else folder / "__init__.py"
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
    return names


@pytest.mark.parametrize("script", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.name)
def test_a_benchmark_imports_what_the_package_has(script: Path) -> None:
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "retinaflow":
            missing = {alias.name for alias in node.names} - _defined(node.module or "")
            assert not missing, f"benchmarks/{script.name} line {node.lineno}: {node.module} has no {missing}"


# Form


def test_no_file_has_a_name_that_says_nothing() -> None:
    empty = {"utils", "util", "common", "helpers", "helper", "manager", "base", "core", "misc"}
    python = [path for path in _listed_files() if path.suffix == ".py"]
    assert not [str(path) for path in python if path.stem.lower() in empty]


@pytest.mark.parametrize("module", MODULES)
def test_a_file_and_its_functions_are_short(module: str) -> None:
    lines = len((PACKAGE / module).read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_FILE, f"retinaflow/{module} has {lines} lines"
    long = [
        f"{node.name} ({node.end_lineno - node.lineno + 1} lines)"
        for node in ast.walk(_tree(module))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno >= MAX_FUNCTION
    ]
    assert not long, f"retinaflow/{module}: {long} are longer than {MAX_FUNCTION} lines"


@pytest.mark.parametrize("module", [name for name in MODULES if (PACKAGE / name).stat().st_size])
def test_every_file_and_public_name_says_what_it_is(module: str) -> None:
    tree = _tree(module)
    assert ast.get_docstring(tree), f"retinaflow/{module} has no docstring"
    silent = [
        f"{node.name} (line {node.lineno})"
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    assert not silent, f"retinaflow/{module}: {silent} have no docstring"


# MLproject, conda.yaml, pyproject.toml


def _mlproject() -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((ROOT / "MLproject").read_text(encoding="utf-8"))
    return document


def _pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_entry_point_is_a_command_and_every_command_an_entry_point() -> None:
    assert set(_mlproject()["entry_points"]) == set(COMMANDS)


def test_every_command_has_a_module_that_runs_it() -> None:
    for name in COMMANDS:
        module = f"commands/{name}.py" if f"commands/{name}.py" in MODULES else f"commands/{name}/__init__.py"
        functions = [node.name for node in _tree(module).body if isinstance(node, ast.FunctionDef)]
        assert "run" in functions, f"{module} has no function run"


@pytest.mark.parametrize("entry_point", COMMANDS)
def test_an_entry_point_declares_no_parameter_so_that_what_was_given_is_known(entry_point: str) -> None:
    """MLflow hands on every declared parameter, given or not, and logs its default as if it were the value used."""
    assert _mlproject()["entry_points"][entry_point] == {"command": f"python -m retinaflow {entry_point}"}


@pytest.mark.parametrize("entry_point", COMMANDS)
def test_the_settings_that_help_shows_first_stand_in_mlproject_with_their_defaults(entry_point: str) -> None:
    text = (ROOT / "MLproject").read_text(encoding="utf-8")
    found = re.search(rf"^  {entry_point}:\n((?:    #.*\n)+)    command:", text, flags=re.MULTILINE)
    assert found is not None
    kind = COMMANDS[entry_point]
    shown = found[1].replace("    # ", "").split()
    assert shown == [f"{name}={kind.default_text(name)}" for name in MAIN_SETTINGS[entry_point]]


@pytest.mark.parametrize("kind", COMMANDS.values(), ids=COMMANDS)
def test_every_setting_says_what_it_means(kind: type[Settings]) -> None:
    silent = [name for name, field in kind.model_fields.items() if not (field.description or "").strip()]
    assert not silent, f"{kind.__name__}: {silent} have no docstring"


def test_conda_and_pip_install_the_same_packages() -> None:
    conda = yaml.safe_load((ROOT / "conda.yaml").read_text(encoding="utf-8"))
    pip = next(item["pip"] for item in conda["dependencies"] if isinstance(item, dict))
    assert pip == _pyproject()["project"]["dependencies"]
    assert "python=3.11" in conda["dependencies"]
    assert _pyproject()["project"]["requires-python"] == ">=3.11"


def test_the_packages_that_the_project_is_built_on_are_required() -> None:
    def names(requirements: list[str]) -> set[str]:
        return {re.split(r"[^\w.-]", requirement, maxsplit=1)[0].lower() for requirement in requirements}

    project = _pyproject()["project"]
    wanted = {"torch", "torchvision", "mlflow", "optuna", "pandas", "numpy", "albumentations"}
    assert wanted <= names(project["dependencies"])
    assert "pytest" in names(project["optional-dependencies"]["test"])


def test_the_version_is_the_same_everywhere() -> None:
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (\S+)", changes, flags=re.MULTILINE)
    assert headings, "CHANGELOG.md has no heading '## VERSION'"
    assert {_pyproject()["project"]["version"], headings[0]} == {retinaflow.__version__}


# What stands in no file


def test_no_file_names_this_machine_or_a_package_registry() -> None:
    machine = re.compile(rb"(?<![\w.*-])/(?:root|work|tmp)/|(?<![\w.*-])/home/[a-z]")
    registry = re.compile(rb"pypi\.org|pythonhosted\.org|anaconda\.(?:org|com)|pytorch\.org/whl|registry\.npmjs\.org")
    found = []
    for path in _listed_files():
        data = path.read_bytes()
        if b"\0" in data[:8192]:
            continue
        found += [
            f"{path.relative_to(ROOT)} line {data.count(bytes([10]), 0, hit.start()) + 1}: {hit.group().decode()}"
            for pattern in (machine, registry)
            for hit in pattern.finditer(data)
        ]
    assert not found, f"files must not name machine paths or registries, but got {found}"
