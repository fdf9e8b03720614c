"""Request: what a download asks for, and its record in the folder, by which the same command resumes it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retinaflow.data.class_groups import keys_of_file
from retinaflow.data.download.http import Fetcher
from retinaflow.data.openimages import is_plain_id, read_image_ids
from retinaflow.errors import DataError, SettingError, shown
from retinaflow.files import atomic_file
from retinaflow.settings.conversion_settings import DownloadConfig

WORK = ".download"
"""Folder for the tables while images are fetched; removed when the download is complete."""
RECORD = "download.json"
_DECISIVE = ("class_group", "per_class", "splits", "originals", "tables_url", "images_url", "seed")
"""Settings that decide what is fetched."""


@dataclass(frozen=True)
class Request:
    """What is to be fetched, and with what."""

    config: DownloadConfig
    fetcher: Fetcher
    ids: frozenset[str] | None
    """Given image ids; None: images are chosen by class."""
    check: Callable[[], None]
    """Raises Interrupted on a request to stop."""

    @property
    def folder(self) -> Path:
        """The folder that is written."""
        return self.config.output

    @property
    def work(self) -> Path:
        """The folder of the tables while images are fetched."""
        return self.folder / WORK

    def table_url(self, path: str) -> str:
        """The URL of a published table."""
        return f"{self.config.tables_url.rstrip('/')}/{path}"


def read_ids(path: Path | None) -> frozenset[str] | None:
    """The image ids of a file, without a split before them. None without a file."""
    if path is None:
        return None
    ids = {str(text).rpartition("/")[2] for text in read_image_ids(path, setting="image_ids")}
    wrong = sorted(image_id for image_id in ids if not is_plain_id(image_id))
    if wrong:
        raise DataError(f"image_ids={path}: an id must be a plain file name, but got {shown(wrong[0])}")
    return frozenset(ids)


def is_complete(config: DownloadConfig, ids: frozenset[str] | None) -> bool:
    """Whether the folder holds this download already. A new folder gets a record of the request.

    Raises SettingError for a folder of another request, or one that holds anything else.
    """
    folder, path = config.output, config.output / RECORD
    asked: dict[str, Any] = {name: config.model_dump(mode="json")[name] for name in _DECISIVE}
    # The content of a file of classes decides, not its path.
    listed = None if config.class_group is None else keys_of_file(config.class_group)
    if listed is not None:
        asked["class_group"] = sorted(set(listed.values()))
    asked["image_ids"] = None if ids is None else sorted(ids)
    if path.is_file():
        known = _read_record(path)
        other = [name for name in asked if known["asked"].get(name) != asked[name]]
        if other:
            raise SettingError(
                f"output={folder}: the folder must be of the same request, but was begun with other settings "
                f"({', '.join(other)}); give another folder"
            )
        return bool(known["complete"])
    # A process that was killed while it wrote the record leaves a part of it.
    if folder.exists() and any(not held.name.startswith(f".{RECORD}") for held in folder.iterdir()):
        raise SettingError(f"output={folder}: the folder must be new, empty, or begun by download")
    _write_record(path, {"asked": asked, "complete": False})
    return False


def mark_complete(folder: Path) -> None:
    """Note in the record that everything is there."""
    _write_record(folder / RECORD, {**_read_record(folder / RECORD), "complete": True})


def _read_record(path: Path) -> dict[str, Any]:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        return {"asked": dict(known["asked"]), "complete": bool(known["complete"])}
    except (ValueError, TypeError, KeyError):
        raise DataError(
            f"{path}: the file must hold the request of the download, but is damaged, so the content of the folder is "
            "unknown; give another output, or remove the folder and start again"
        ) from None


def _write_record(path: Path, record: Mapping[str, Any]) -> None:
    with atomic_file(path) as partial:
        partial.write_text(json.dumps(record, indent=1), encoding="utf-8")
