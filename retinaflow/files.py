"""Files and folders that are whole or absent, text files of any origin, locks between processes, and retries.

A file is written beside its path, flushed to disk and renamed, so it is whole after the end of the process and after a
loss of power. A folder is made beside its path and renamed: it is whole after the end of the process. Its files are not
flushed one by one, which would take longer than to make the folder again.

Text is UTF-8, or UTF-16 or UTF-32 with a byte order mark; a file that is neither is named, with the line.
"""

from __future__ import annotations

import codecs
import json
import os
import platform
import random
import secrets
import shutil
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import count as counted
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import filelock
import psutil
import yaml

from retinaflow.errors import DataError, first_line

Result = TypeVar("Result")
_PARTIAL = ".partial"
_HALF = "half of a character stands alone (an escape from \\ud800 to \\udfff)"
_MOST_YAML = 1 << 21
"""Characters of a YAML file: Python reads about 50,000 a second. The names of 20,000 classes have 0.5 million."""
_open_folders: set[Path] = set()
"""Partial folders that this process writes now."""
_MARKS = {
    # UTF-32 before UTF-16, whose mark it begins with.
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip


def text_encoding(start: bytes) -> str:
    """The encoding of a text file that begins with these bytes (4 are enough): by its byte order mark, else UTF-8."""
    return next((name for mark, name in _MARKS.items() if start.startswith(mark)), "utf-8-sig")


def decoded(data: bytes, path: Path | str) -> str:
    """The text of a file's content; line ends (CR LF, or CR alone) become LF.

    Raises DataError, which names ``path`` and the line, for bytes that are no text in the encodings that are read.
    """
    encoding = text_encoding(data[:4])
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = "" if encoding != "utf-8-sig" else f" line {data.count(bytes([10]), 0, error.start) + 1}"
        flaw = f"the byte 0x{data[error.start]:02x}" if error.start < len(data) else "its end"
        raise DataError(
            f"{path}{line}: the file must be text in UTF-8, or in UTF-16 with a byte order mark, but {flaw} is not; "
            "save it as UTF-8 (older programs on Windows write cp1252 or another local encoding)"
        ) from None
    if "\0" in text:
        raise DataError(
            f"{path}: the file must be text in UTF-8, or in UTF-16 with a byte order mark, but holds zero bytes; "
            "save it as UTF-8"
        )
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def read_text(path: Path) -> str:
    """The text of a file, as :func:`decoded` reads it. Raises DataError for a file that is not text."""
    return decoded(path.read_bytes(), path)


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises DataError for one that cannot be read."""
    text = read_text(path)
    try:
        value = json.loads(text)
        _refuse_half_characters(value, text)
    except RecursionError:
        raise DataError(f"{path}: not a readable JSON file: its values are nested too deep") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{path} line {error.lineno}: not a readable JSON file: {error.msg}") from None
    except ValueError as error:  # an integer of more than 4,300 digits
        raise DataError(f"{path}: not a readable JSON file: {first_line(error)}") from None
    return value


def _refuse_half_characters(value: Any, text: str) -> None:
    """Raise ValueError for a JSON value, of a ``text``, that no file can hold: the escape of half of a character
    (``"\\ud800"`` alone) is read without an error."""
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError(_HALF) from None


def read_yaml(path: Path, *, as_written: bool = False) -> Any:
    """The content of a YAML file; with ``as_written`` all scalars are texts (``on``, ``010``, ``12:30``; empty: "").

    Raises DataError for one that cannot be read, or that gives a key twice.
    """
    text = read_text(path)
    if len(text) > _MOST_YAML:
        raise DataError(f"{path}: a YAML file must have at most {_MOST_YAML:,} characters, but has {len(text):,}")
    try:
        return yaml.load(text, _AsWritten if as_written else _Typed)
    except RecursionError:
        raise DataError(f"{path}: not a readable YAML file: its values are nested too deep") from None
    # A value that its tag does not fit (!!int "") makes the library raise whatever its parsing meets.
    except (yaml.YAMLError, ValueError, TypeError, OverflowError, LookupError, AttributeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or first_line(error)
        if isinstance(error, LookupError | AttributeError):
            reason = "a value does not fit its tag (!!int, !!bool, ...)"
        raise DataError(f"{path}{line}: not a readable YAML file: {reason:.200}") from None


def _whole(text: Any) -> Any:
    """A text in which two escapes that are the halves of a character (as JSON writes it) are that character. Raises
    ValueError for half of a character alone."""
    try:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
    except UnicodeDecodeError:
        raise ValueError(_HALF) from None


class _Typed(yaml.SafeLoader):
    """YAML's own types. A mapping gives each key once."""

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        """The text of a scalar."""
        return _whole(super().construct_scalar(node))

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._looked_at: set[int] = set()

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Put merge keys in. What they bring may repeat a key: a mapping is looked at before it is flattened."""
        if id(node) not in self._looked_at:
            _refuse_repeated_keys(node)
            self._looked_at.add(id(node))
        super().flatten_mapping(node)


class _AsWritten(yaml.BaseLoader):
    """Texts, lists and mappings only. A mapping gives each key once."""

    def construct_scalar(self, node: yaml.ScalarNode) -> Any:
        """The text of a scalar."""
        return _whole(super().construct_scalar(node))

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The entries of a mapping."""
        _refuse_repeated_keys(node)
        return super().construct_mapping(node, deep)


def _refuse_repeated_keys(node: yaml.MappingNode) -> None:
    seen: set[str] = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and key.value != "<<":
            if key.value in seen:
                problem = f"the key {key.value:.60} is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)


def is_file_name(name: str) -> bool:
    """Whether a text can be the name of a file or folder inside of another one, and leads nowhere else."""
    return name not in ("", ".", "..") and "\0" not in name and not {"/", os.sep, os.altsep or "/"} & set(name)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write to, one process at a time. When the block ends without an error, the file is
    flushed and renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Always the same name, so that what a killed process left behind is overwritten.
    partial = path.with_name(f".{path.name}{_PARTIAL}")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
        _flush_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def remove_partial_files(folder: Path) -> None:
    """Remove the half-written files of killed processes from a folder that no other process is writing to."""
    for left in folder.glob(f".*{_PARTIAL}"):
        left.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """A new folder beside ``path``, renamed to ``path`` when the block ends without an error, and removed otherwise.

    With ``replace`` it replaces the folder that is there. Several processes may write the same folder. The partial
    folders of killed processes of this machine are removed first. Raises OSError when ``path`` holds anything that is
    not to be replaced. A mounted folder, or one in a folder that cannot be written, is filled when the block ends.
    """
    path = path.resolve()
    stays = path.is_dir() and (path.is_mount() or not os.access(path.parent, os.W_OK))
    parent = path if stays else path.parent
    parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{path.name}{_PARTIAL}-{platform.node()}-"
    _remove_left_folders(parent, prefix)
    if stays and any(path.iterdir()):
        raise FileExistsError(f"{path} is not empty")
    partial = parent / f"{prefix}{os.getpid()}-{secrets.token_hex(4)}"
    _open_folders.add(partial)
    try:
        partial.mkdir()
        yield partial
        if stays:
            for entry in partial.iterdir():
                entry.replace(path / entry.name)
        elif replace and path.exists():
            _exchange(partial, path)
        else:
            # A rename replaces an empty folder and fails for one that holds anything.
            partial.replace(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        _open_folders.discard(partial)


def _exchange(partial: Path, path: Path) -> None:
    old = partial.with_name(f"{partial.name}-old")
    path.replace(old)
    try:
        partial.replace(path)
    except OSError:
        if not path.exists():
            old.replace(path)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _remove_left_folders(parent: Path, prefix: str) -> None:
    for folder in parent.iterdir():
        if not folder.name.startswith(prefix) or folder in _open_folders:
            continue
        process = folder.name.removeprefix(prefix).partition("-")[0]
        # This process may have been given the number of one that has ended.
        if process.isdecimal() and (int(process) == os.getpid() or not psutil.pid_exists(int(process))):
            shutil.rmtree(folder, ignore_errors=True)


def _flush_folder(folder: Path) -> None:
    """Make a rename last through a loss of power, where the system opens folders as files."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def check_archive(path: Path, *, most: int | None = None) -> None:
    """Raise zipfile.BadZipFile for a zip file with a damaged entry, or one that expands: beyond ``most`` bytes in all,
    or, without it, at all. Programs that read entries piece by piece do not notice either."""
    with zipfile.ZipFile(path) as archive:
        total, limit = sum(entry.file_size for entry in archive.infolist()), most or path.stat().st_size
        if total > limit:
            raise zipfile.BadZipFile(f"its entries may have {limit:,} bytes in all, but have {total:,}")
        if damaged := archive.testzip():
            raise zipfile.BadZipFile(f"{damaged} is damaged")


@contextmanager
def lock(path: Path, *, wait: bool = True, before_wait: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold the lock of a file, which is made if needed. The system releases it when the process ends, however it ends.

    ``before_wait`` is called once when another process holds the lock. Raises BlockingIOError then with ``wait=False``,
    and OSError for a path that cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The library would wait for a file that it cannot open.
    path.open("ab").close()
    held = filelock.FileLock(path)
    try:
        held.acquire(timeout=0)
    except filelock.Timeout:
        if not wait:
            raise BlockingIOError(f"{path}: another process holds this lock") from None
        before_wait()
        held.acquire()
    try:
        yield
    finally:
        held.release()


def retry(
    call: Callable[[], Result],
    *,
    waits: Iterable[float],
    may_pass: Callable[[Exception], bool],
    sleep: Callable[[float], object] = time.sleep,
) -> Result:
    """The result of a call, which is made again after each of ``waits`` (seconds) while it fails.

    Raises the last error when the waits are used up, and at once one of which ``may_pass`` is False.
    """
    left = iter(waits)
    while True:
        try:
            return call()
        except Exception as error:
            wait = next(left, None) if may_pass(error) else None
            if wait is None:
                raise
        sleep(wait)


def growing_waits(
    first: float,
    longest: float,
    *,
    count: int | None = None,
    patience: float = float("inf"),
    spread: random.Random | None = None,
) -> Iterator[float]:
    """Waits in seconds, each twice as long as the one before and at most ``longest``.

    They end after ``count`` waits, or ``patience`` seconds after the first one was asked for. With ``spread`` each is
    drawn from the upper half of its range, so that callers that failed together do not retry together.
    """
    started = time.monotonic()
    for number in islice(counted(), count):
        if time.monotonic() - started > patience:
            return
        wait = min(first * 2.0 ** min(number, 60), longest)
        yield wait if spread is None else wait * spread.uniform(0.5, 1)
