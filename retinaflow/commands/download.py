"""``download``: images and annotations of Open Images, by classes or by ids, into the layout that ``train`` reads."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from retinaflow.data.class_files import read_taxonomy
from retinaflow.data.class_groups import keys_of_file, select_classes
from retinaflow.data.download import tables, urls
from retinaflow.data.download.http import Fetcher, UnreachableError
from retinaflow.data.download.images import Fetched, Picture, fetch_pictures
from retinaflow.data.download.selection import choose_images
from retinaflow.data.openimages import is_plain_id, read_image_ids
from retinaflow.files import atomic_file
from retinaflow.interrupts import StopRequest
from retinaflow.progress import report
from retinaflow.runs.run import Run
from retinaflow.runs.tracking import launched_by_mlflow, start_data_run
from retinaflow.settings.data_commands import DownloadConfig
from retinaflow.taxonomy import Taxonomy

WORK = ".download"
"""Folder for what is fetched before the images, removed when all is done."""
REQUEST = "download.json"
SAMPLED = 12
"""Images whose sizes are asked for to estimate that of all."""
_ASKED = ("class_group", "per_class", "splits", "originals", "tables_url", "images_url", "seed")
"""Settings that decide what is fetched."""


@dataclass(frozen=True)
class _Request:
    """What is to be fetched, and with what."""

    config: DownloadConfig
    fetcher: Fetcher
    folder: Path
    ids: frozenset[str] | None
    """Given image ids; None: images are chosen by class."""
    check: Callable[[], None]
    """Raises when somebody asked to stop."""

    @property
    def work(self) -> Path:
        return self.folder / WORK

    def table(self, place: str) -> str:
        """The address of a table."""
        return f"{self.config.tables_url.rstrip('/')}/{place}"


def run(config: DownloadConfig) -> Path:
    """Read the tables, say how much there is to fetch, fetch it, write the tables. Returns the folder."""
    if config.class_group is None and config.image_ids is None:
        raise ValueError(
            "what is to be fetched? Give class_group=Rose,Taxi (or people-clothing, ...) or image_ids=FILE"
        )
    ids = None if config.image_ids is None else _given_ids(config.image_ids)
    fetcher = Fetcher(retries=config.retries, timeout=config.timeout)
    if _is_complete(config, ids):
        report(f"{config.output} is complete: it was fetched by this same command")
        return config.output
    with (
        start_data_run("download", track=config.track, experiment=config.experiment, folder=config.output) as run,
        StopRequest(watch_parent=launched_by_mlflow()) as stop,
    ):
        request = _Request(config, fetcher, config.output, ids, stop.check)
        run.log_params(config.model_dump())
        request.work.mkdir(exist_ok=True)
        taxonomy, wanted = _classes(request)
        boxes = {split: _boxes(request, split, wanted) for split in config.splits}
        chosen = {split: _chosen(request, boxes[split], taxonomy, wanted) for split in config.splits}
        pictures = [picture for split in config.splits for picture in _pictures(request, split, chosen[split])]
        unlisted = _unlisted(request, pictures, chosen)
        chosen = {split: [name for name in names if name not in unlisted] for split, names in chosen.items()}
        _report_amount(request, pictures, chosen)
        if config.dry_run:
            return config.output
        (config.output / "images").mkdir(exist_ok=True)
        fetched = fetch_pictures(
            pictures,
            fetcher,
            connections=config.connections,
            skip=config.on_bad_image == "skip",
            check=stop.check,
            quiet=not sys.stderr.isatty(),
        )
        fetched.missing += sorted(unlisted.items())
        _settle(request, pictures, fetched, run)
        for split in config.splits:
            there = frozenset(picture.image_id for picture in pictures if picture.is_there)
            _write_tables(request, split, wanted, frozenset(chosen[split]), there)
        _finish(request, taxonomy, wanted, run, fetched)
    report(f"written: {config.output}\nnext: python -m retinaflow explore --data {config.output}")
    return config.output


def _given_ids(path: Path) -> frozenset[str]:
    """Image ids of a file, the split before them taken away."""
    if not path.is_file():
        raise FileNotFoundError(f"image_ids={path}: no such file")
    ids = {str(text).rpartition("/")[2] for text in read_image_ids(path)}
    wrong = sorted(image_id for image_id in ids if not is_plain_id(image_id))
    if wrong:
        raise ValueError(f"image_ids={path}: an id must be a plain file name, but got {wrong[0]!r:.80}")
    return frozenset(ids)


def _is_complete(config: DownloadConfig, ids: frozenset[str] | None) -> bool:
    """Whether this was fetched before. A folder that this command did not begin is refused, one it did is resumed.

    Raises ValueError for a folder that holds anything else.
    """
    folder, path = config.output, config.output / REQUEST
    asked: dict[str, Any] = {name: config.model_dump(mode="json")[name] for name in _ASKED}
    # Of a file counts what is in it, not where it lies.
    listed = None if config.class_group is None else keys_of_file(config.class_group)
    if listed is not None:
        asked["class_group"] = sorted(set(listed.values()))
    asked["image_ids"] = None if ids is None else sorted(ids)
    if path.is_file():
        known = _read_note(path)
        other = [name for name in asked if known["asked"].get(name) != asked[name]]
        if other:
            raise ValueError(f"output={folder} was begun with other settings ({', '.join(other)}); give another folder")
        return bool(known["complete"])
    # A process that was killed at its first note leaves the half of it.
    if folder.exists() and any(not held.name.startswith(f".{REQUEST}") for held in folder.iterdir()):
        raise ValueError(f"output={folder}: the folder must be new, empty, or begun by download")
    _write_note(path, {"asked": asked, "complete": False})
    return False


def _read_note(path: Path) -> dict[str, Any]:
    """What was asked for, and whether that is complete. Raises ValueError for a damaged file."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        return {"asked": dict(known["asked"]), "complete": bool(known["complete"])}
    except (ValueError, TypeError, KeyError):
        raise ValueError(
            f"{path}: the file must say in whole what was asked for, but is damaged, so nobody can tell what is in the "
            "folder; give another output, or remove the folder and start again"
        ) from None


def _write_note(path: Path, note: Mapping[str, Any]) -> None:
    with atomic_file(path) as partial:
        partial.write_text(json.dumps(note, indent=1), encoding="utf-8")


def _classes(request: _Request) -> tuple[Taxonomy, tuple[str, ...]]:
    """All boxable classes, and the ids of those to fetch with everything below them; () for all of given images."""
    paths = []
    for place in (urls.CLASSES, urls.HIERARCHY):
        path = request.work / Path(place).name
        if not path.is_file():
            part = path.with_suffix(".part")
            part.write_bytes(request.fetcher.read(request.table(place)))
            part.replace(path)
        paths.append(path)
    taxonomy = read_taxonomy(*paths)
    if request.config.class_group is None:
        return taxonomy, ()
    chosen = select_classes(request.config.class_group, taxonomy)
    below = np.flatnonzero(taxonomy.is_ancestor[:, chosen].sum(axis=1))
    return taxonomy, tuple(taxonomy.ids[index] for index in np.union1d(chosen, below).tolist())


def _boxes(request: _Request, split: str, wanted: Sequence[str]) -> Path:
    """The kept rows of a split's box table, those of earlier attempts as they are."""
    kept = request.work / f"{split}-boxes.csv"
    if not kept.is_file():
        _filter(request, urls.BOXES[split], kept, wanted, request.ids)
    return kept


def _filter(request: _Request, place: str, path: Path, classes: Sequence[str], images: frozenset[str] | None) -> None:
    """Stream a table into a file that keeps the rows of some classes (() for all) and images (None for all)."""
    wanted = {tables.LABEL: frozenset(classes)} if classes else {}
    wanted |= {} if images is None else {tables.IMAGE: images}
    url = request.table(place)
    size = request.fetcher.size(url)
    report(f"reading {url}{f' ({size / 2**20:,.0f} MiB)' if size else ''}")
    with tqdm(total=size, unit="B", unit_scale=True, disable=None, leave=False) as bar:

        def seen(count: int) -> None:
            bar.update(count)
            request.check()

        tables.keep(tables.filtered(request.fetcher.lines(url, seen=seen), wanted, name=url), path)


def _chosen(request: _Request, boxes: Path, taxonomy: Taxonomy, wanted: Sequence[str]) -> list[str]:
    """The images to fetch of a split, by their kept boxes."""
    if request.ids is not None:
        return tables.images_of(boxes)
    names, image, classes = tables.image_classes(boxes, tuple(wanted))
    assert request.config.class_group is not None
    # A Taxi is a Car too: an image counts for the classes of its boxes and for those above them.
    asked = select_classes(request.config.class_group, taxonomy)
    place = pd.Index(taxonomy.ids).get_indexer(pd.Index(wanted))
    speaks = taxonomy.is_ancestor[:, asked].copy()
    speaks[asked, range(len(asked))] = True
    rows, columns = speaks[place[classes]].nonzero()
    pairs = pd.DataFrame({"image": image[rows], "class": columns}).drop_duplicates()
    chosen = choose_images(
        pairs["image"].to_numpy(),
        pairs["class"].to_numpy(),
        len(names),
        per_class=request.config.per_class,
        seed=request.config.seed,
    )
    return [str(name) for name in names[chosen]]


def _pictures(request: _Request, split: str, ids: Sequence[str]) -> list[Picture]:
    """Where the images of a split come from and go to."""
    unsafe = [image_id for image_id in ids if not is_plain_id(image_id)]
    if unsafe:
        raise ValueError(f"{urls.BOXES[split]}: an id must be a plain file name, but got {unsafe[0]!r:.80}")
    base, folder = request.config.images_url.rstrip("/"), request.folder / "images"
    if not request.config.originals:
        places = {image_id: urls.IMAGE.format(split=split, image_id=image_id) for image_id in ids}
        return [Picture(image_id, f"{base}/{place}", folder / f"{image_id}.jpg") for image_id, place in places.items()]
    kept = request.work / f"{split}-originals.csv"
    if not kept.is_file():
        _filter(request, urls.ORIGINALS[split], kept, (), frozenset(ids))
    found = tables.originals_of(kept)
    return [Picture(name, url, folder / f"{name}.jpg", size, md5) for name, (url, size, md5) in found.items()]


def _unlisted(request: _Request, pictures: Sequence[Picture], chosen: Mapping[Any, list[str]]) -> dict[str, str]:
    """Image id -> reason of what is wanted and has no address."""
    reasons = dict.fromkeys(request.ids or (), "in no box table of these splits")
    for split, ids in chosen.items():
        reasons |= dict.fromkeys(ids, f"not in {urls.ORIGINALS[split]}")
    for picture in pictures:
        reasons.pop(picture.image_id, None)
    for reason, count in Counter(reasons.values()).items():
        example = min(image_id for image_id in reasons if reasons[image_id] == reason)
        report(f"{count:,} images are {reason}, {example} for example")
    return reasons


def _report_amount(request: _Request, pictures: Sequence[Picture], chosen: Mapping[Any, list[str]]) -> None:
    """How much there is to fetch. Raises OSError when the disk has no room for it."""
    wanted = [picture for picture in pictures if not picture.is_there]
    if not pictures:
        raise ValueError("no image of these classes or ids is in the tables of the chosen splits")
    known = sum(picture.size for picture in wanted)
    how = "by the table"
    if not known and wanted:
        sample = random.Random(request.config.seed).sample(wanted, min(SAMPLED, len(wanted)))
        sizes = [size for picture in sample if (size := _size(request, picture))]
        known = round(sum(sizes) / len(sizes) * len(wanted)) if sizes else 0
        how = f"by {len(sizes)} of them"
    counts = ", ".join(f"{len(ids):,} of {split}" for split, ids in chosen.items())
    there = f", {len(pictures) - len(wanted):,} are there already" if len(wanted) < len(pictures) else ""
    amount = f"about {known / 2**20:,.1f} MiB {how}" if known else "of unknown size"
    report(
        f"{len(wanted):,} images to fetch ({counts}{there}), {amount}, {request.config.connections} at the same time"
    )
    free = shutil.disk_usage(request.folder).free
    if known > free:
        raise OSError(f"output={request.folder}: {known / 2**30:.1f} GiB are needed, {free / 2**30:.1f} GiB are free")


def _size(request: _Request, picture: Picture) -> int | None:
    with contextlib.suppress(OSError):
        return request.fetcher.size(picture.url)
    return None


def _settle(request: _Request, pictures: Sequence[Picture], fetched: Fetched, run: Run) -> None:
    """Tell what was fetched and what was not.

    Raises UnreachableError when no picture is there, and where another attempt may get the rest.
    """
    lost = pd.DataFrame([*fetched.missing, *fetched.failed], columns=["image_id", "reason"])
    report(f"{fetched.count:,} images fetched, {fetched.bytes / 2**20:,.1f} MiB")
    (request.folder / "missing.csv").unlink(missing_ok=True)
    if len(lost):
        lost.to_csv(request.folder / "missing.csv", index=False)
        run.log_csv(lost, "missing.csv")
        report(f"{len(lost):,} images could not be had; missing.csv lists them")
    if not any(picture.is_there for picture in pictures):
        raise UnreachableError(
            f"the {len(pictures):,} images all failed; is the address right? missing.csv has the reasons, for example: "
            f"{(fetched.failed or fetched.missing)[0][1]}"
        )
    if fetched.failed and request.config.on_bad_image == "stop":
        image_id, reason = fetched.failed[0]
        raise UnreachableError(
            f"{len(fetched.failed):,} images could not be read whole, {image_id} for example: {reason}. The same "
            "command resumes what is missing; on_bad_image=skip does without"
        )


def _write_tables(
    request: _Request, split: str, wanted: Sequence[str], chosen: frozenset[str], there: frozenset[str]
) -> None:
    """The published tables of a split with the rows of the images that are there."""
    labels = request.work / f"{split}-labels.csv"
    if not labels.is_file():
        # Of all chosen images: a later attempt may have more of them.
        _filter(request, urls.LABELS[split], labels, wanted, chosen)
    for kept, name in ((request.work / f"{split}-boxes.csv", "bbox"), (labels, "human-imagelabels")):
        with kept.open("rb") as file:
            lines = (line.rstrip(b"\n") for line in file)
            rows = tables.filtered(lines, {tables.IMAGE: there}, name=kept.name)
            tables.keep(rows, request.folder / f"{split}-annotations-{name}.csv")


def _finish(request: _Request, taxonomy: Taxonomy, wanted: Sequence[str], run: Run, fetched: Fetched) -> None:
    """The class list, the hierarchy, and the note that all is there."""
    classes = (request.work / Path(urls.CLASSES).name).read_bytes()
    text = tables.class_rows(classes, wanted or taxonomy.ids)
    (request.folder / "class-descriptions.csv").write_text(text, encoding="utf-8")
    hierarchy = Path(urls.HIERARCHY).name
    shutil.copyfile(request.work / hierarchy, request.folder / hierarchy)
    path = request.folder / REQUEST
    _write_note(path, {**_read_note(path), "complete": True})
    shutil.rmtree(request.work)
    run.log_metrics({"download/images": fetched.count, "download/bytes": fetched.bytes}, step=0)
