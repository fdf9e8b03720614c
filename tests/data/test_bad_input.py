"""Bad input, case by case and at random: a clear error by default, counted and listed when asked to go on, never a
traceback, never a silent loss."""

from __future__ import annotations

import codecs
import io
import json
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from made_index import TinyDataset
from PIL import Image

from retinaflow.data.cache import LoadedIndex, load_index
from retinaflow.data.image_headers import header_size
from retinaflow.data.images import UnreadableImageError, decode
from retinaflow.data.openimages import find_files, read_annotations
from retinaflow.data.predictions import read_predictions
from retinaflow.data.tables import RowErrors
from retinaflow.files import read_text
from retinaflow.settings.data_settings import OnBadImage, OnBadRow

BOXES, LABELS = "train-annotations-bbox.csv", "train-annotations-human-imagelabels.csv"
CLASSES, HIERARCHY = "class-descriptions.csv", "bbox_labels_hierarchy.json"
Change = Callable[[Path], None]


def load(folder: Path, *, on_bad_row: OnBadRow = "stop", on_bad_image: OnBadImage = "stop") -> LoadedIndex:
    files = find_files(folder, ["train"])
    return load_index(
        files, [folder / "images"], on_bad_row=on_bad_row, on_bad_image=on_bad_image, report=lambda text: None
    )


def edit(name: str, change: Callable[[list[str]], list[str]]) -> Change:
    """Change the lines of a file, without their ends."""

    def apply(folder: Path) -> None:
        lines = (folder / name).read_text(encoding="utf-8").splitlines()
        (folder / name).write_bytes("\n".join([*change(lines), ""]).encode())

    return apply


def add(name: str, *rows: str) -> Change:
    return edit(name, lambda lines: [*lines, *rows])


def box(**changes: object) -> str:
    row: dict[str, object] = {
        "ImageID": "train001", "Source": "x", "LabelName": "/m/0tree", "Confidence": 1, "XMin": 0.125, "XMax": 0.25,
        "YMin": 0.5, "YMax": 0.75, "IsOccluded": 0, "IsTruncated": 0, "IsGroupOf": 0, "IsDepiction": 0, "IsInside": 0,
    }  # fmt: skip
    return ",".join(str(value) for value in (row | changes).values())


def image(content: bytes, name: str = "train001.jpg") -> Change:
    def apply(folder: Path) -> None:
        (folder / "images" / name).write_bytes(content)

    return apply


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def huge_jpeg() -> bytes:
    """The header of a JPEG of 50,000 x 50,000 pixels, and the end marker: 7.5 GB decoded."""
    start = b"\xff\xd8\xff\xc0" + struct.pack(">HBHHB", 17, 8, 50_000, 50_000, 3)
    return start + b"\x01\x11\x00\x02\x11\x00\x03\x11\x00" + b"\xff\xd9"


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8))


@dataclass(frozen=True)
class Refused:
    """A change that stops the reading with an error that matches; ``lost`` rows and images when told to go on.

    ``lost=None``: it stops either way, as the file as a whole cannot be understood.
    """

    change: Change
    error: str
    lost: int | None = 1


REFUSED = {
    "a missing column": Refused(
        edit(BOXES, lambda lines: [line.replace("XMax", "Right") for line in lines]), "lacks XMax", None
    ),
    "semicolons": Refused(
        edit(BOXES, lambda lines: [line.replace(",", ";") for line in lines]), "the header must name", None
    ),
    "tabs": Refused(
        edit(LABELS, lambda lines: [line.replace(",", "\t") for line in lines]), "the header must name", None
    ),
    "an empty file": Refused(edit(BOXES, lambda lines: [""]), "must begin with a header line", None),
    "a row given twice": Refused(
        edit(BOXES, lambda lines: [*lines, lines[1]]), "line .*: a box must be given once, but got ImageID=train000"
    ),
    "XMax below XMin": Refused(add(BOXES, box(XMax=0.1)), "XMin < XMax must hold, but got XMin=0.125, XMax=0.1"),
    "no width": Refused(add(BOXES, box(XMax=0.125)), "XMin < XMax must hold, but got XMin=0.125, XMax=0.125"),
    "no height": Refused(add(BOXES, box(YMax=0.5)), "YMin < YMax must hold"),
    "a corner above 1": Refused(add(BOXES, box(XMax=1.01)), r"coordinates must lie in \[0, 1\]"),
    "a corner below 0": Refused(add(BOXES, box(YMin=-0.01)), r"coordinates must lie in \[0, 1\]"),
    "NaN": Refused(add(BOXES, box(XMin="nan")), "XMin must be a number, but got XMin=nan"),
    "no number": Refused(add(BOXES, box(XMin="wide")), "XMin must be a number, but got XMin=wide"),
    "an unknown class": Refused(add(BOXES, box(LabelName="/m/0cat")), "LabelName must be in the class list"),
    "an id that is a path": Refused(add(BOXES, box(ImageID="../x")), "ImageID must be a plain file name"),
    "a file cut in the middle of a row": Refused(
        edit(BOXES, lambda lines: [*lines, box()[:31]]), r"a row must have 13 fields, but got fields=\d"
    ),
    "a row too long": Refused(add(BOXES, box() + ",1"), "a row must have 13 fields, but got fields=14"),
    "an open quote": Refused(
        edit(BOXES, lambda lines: [*lines[:-1], '"' + box(), lines[-1]]), "quotes must open and close", 1
    ),
    "a row that is not UTF-8": Refused(
        lambda folder: (folder / BOXES).write_bytes((folder / BOXES).read_bytes() + b"\xff" + box().encode()),  # type: ignore[arg-type, return-value]
        "a row must be text in UTF-8",
    ),
    "a name among the labels": Refused(
        add(LABELS, "train001,v,Car,1"), "(?s)LabelName must be in the class list.*Car is the name of /m/0car"
    ),
    "a label that is neither present nor absent": Refused(add(LABELS, "train001,v,/m/0car,2"), "Confidence must be 1"),
    "a flag that is neither 0 nor 1": Refused(add(BOXES, box(IsGroupOf=2)), "IsGroupOf must be 1"),
    "an id longer than a file name": Refused(add(BOXES, box(ImageID="a" * 256)), "ImageID must have at most 255 bytes"),
    "a hierarchy with a cycle": Refused(
        lambda folder: (folder / HIERARCHY).write_text(  # type: ignore[arg-type, return-value]
            json.dumps({"LabelName": "r", "Subcategory": [cycle("/m/0car", "/m/0bus", "/m/0car")]})
        ),
        "the class hierarchy must not contain a cycle, but got",
        None,
    ),
    "a class given twice": Refused(add(CLASSES, "/m/0car,Automobile"), "class ids must be unique", None),
    "a box of an image without a file": Refused(
        add(BOXES, box(ImageID="nowhere")), "12 of 13 images have a file .*; nowhere has none"
    ),
    "a label of an image without a file": Refused(
        add(LABELS, "nowhere,v,/m/0car,0"), "12 of 13 images have a file .*; nowhere has none"
    ),
    "an image of zero bytes": Refused(image(b""), r"1 of 12 image files cannot be read; .*train001\.jpg: not an image"),
    "a text with the name of an image": Refused(image(b"<html>404</html>"), r"train001\.jpg: not an image"),
    "a JPEG cut in the middle": Refused(image(encoded(NOISE, "JPEG")[:-500]), r"train001\.jpg: the JPEG is cut short"),
    "a JPEG header of 50,000 x 50,000 pixels": Refused(image(huge_jpeg()), r"train001\.jpg: .*2500000000 pixels"),
}


def cycle(*ids: str) -> dict[str, object]:
    return {"LabelName": ids[0], **({"Subcategory": [cycle(*ids[1:])]} if ids[1:] else {})}


def rows_of(loaded: LoadedIndex) -> int:
    return len(loaded.index.boxes) + len(loaded.index.verified_class)


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_stops_with_its_place_or_is_counted_and_listed(name: str, tiny_dataset: TinyDataset) -> None:
    case, folder = REFUSED[name], tiny_dataset()
    whole = load(tiny_dataset("whole"))
    case.change(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=case.error) as caught:
        load(folder)
    assert "Traceback" not in str(caught.value)
    if case.lost is None:
        with pytest.raises(ValueError, match=case.error):
            load(folder, on_bad_row="drop", on_bad_image="skip")
        return
    loaded = load(folder, on_bad_row="drop", on_bad_image="skip")
    assert len(loaded.dropped) == case.lost
    again = load(folder, on_bad_row="drop", on_bad_image="skip")
    assert again.dropped.equals(loaded.dropped), "what was left out is remembered with the cached index"
    if "image" not in name and "file" not in loaded.dropped["rule"].iloc[0]:
        assert rows_of(loaded) == rows_of(whole)
    assert set(loaded.index.image_ids) <= set(whole.index.image_ids)


ACCEPTED: dict[str, Change] = {
    "a byte order mark": lambda folder: prefixed(folder, b"\xef\xbb\xbf"),
    "CRLF": lambda folder: replaced(folder, b"\n", b"\r\n"),
    "CR alone": lambda folder: replaced(folder, b"\n", b"\r"),
    "UTF-16": lambda folder: recoded(folder, "utf-16"),
    "UTF-16 with CR LF": lambda folder: (replaced(folder, b"\n", b"\r\n"), recoded(folder, "utf-16"))[1],
    "UTF-32": lambda folder: recoded(folder, "utf-32"),
    "blank lines": lambda folder: replaced(folder, b"\n", b"\n\n"),
    "no last newline": edit(BOXES, lambda lines: lines),
    "quoted names": edit(CLASSES, lambda lines: [f'"{line.split(",")[0]}","{line.split(",")[1]}"' for line in lines]),
    "extra columns": edit(BOXES, lambda lines: [f"{line},{'Note' if n == 0 else 'x'}" for n, line in enumerate(lines)]),
    "the 7 columns of 2019": edit(
        BOXES, lambda lines: [",".join(np.array(line.split(","))[[0, 2, 4, 5, 6, 7, 10]]) for line in lines]
    ),
    "a grey image": image(encoded(NOISE.convert("L"), "JPEG")),
    "a CMYK image": image(encoded(NOISE.convert("CMYK"), "JPEG")),
    "a 16-bit image": image(
        encoded(Image.fromarray(np.arange(64 * 96, dtype=np.uint16).reshape(64, 96) * 10), "PNG"), "train001.jpg"
    ),
    "an animated image": image(
        encoded(NOISE, "WEBP", save_all=True, append_images=[NOISE.rotate(180)], duration=100), "train001.jpg"
    ),
    "an animated PNG": image(encoded(NOISE, "PNG", save_all=True, append_images=[NOISE.rotate(180)]), "train001.jpg"),
}


def prefixed(folder: Path, start: bytes) -> None:
    for name in (BOXES, LABELS, CLASSES, HIERARCHY):
        (folder / name).write_bytes(start + (folder / name).read_bytes())


def recoded(folder: Path, encoding: str) -> None:
    for name in (BOXES, LABELS, CLASSES, HIERARCHY):
        (folder / name).write_bytes((folder / name).read_bytes().decode().encode(encoding))


def replaced(folder: Path, old: bytes, new: bytes) -> None:
    for name in (BOXES, LABELS, CLASSES):
        (folder / name).write_bytes((folder / name).read_bytes().replace(b"\r\n", b"\n").replace(old, new))


@pytest.mark.parametrize("name", ACCEPTED)
def test_unusual_input_that_is_right_changes_nothing(name: str, tiny_dataset: TinyDataset) -> None:
    folder = tiny_dataset()
    whole = load(tiny_dataset("whole"))
    ACCEPTED[name](folder)
    loaded = load(folder)
    assert len(loaded.dropped) == 0
    assert loaded.index.digest == whole.index.digest
    place = loaded.index.image_ids.tolist().index("train001")
    height, width = (int(side) for side in loaded.index.sizes[place])
    assert decode(loaded.index.file_of(place), (height, width), (32, 64)).shape == (32, 64, 3)


def test_an_animated_image_shows_its_first_image(tmp_path: Path) -> None:
    flat = [Image.new("RGB", (64, 64), colour) for colour in ((200, 10, 10), (10, 10, 200))]
    for kind in ("WEBP", "PNG"):
        path = tmp_path / f"moving.{kind.lower()}"
        path.write_bytes(encoded(flat[0], kind, save_all=True, append_images=flat[1:]))
        red, _, blue = decode(path, (64, 64), (32, 32)).reshape(-1, 3).mean(axis=0)
        assert red > 150 > 60 > blue


def test_labels_of_an_image_without_boxes_make_an_image_without_boxes(tiny_dataset: TinyDataset) -> None:
    folder = tiny_dataset()
    add(LABELS, "train900,v,/m/0car,0")(folder)
    (folder / "images" / "train900.jpg").write_bytes(encoded(NOISE, "JPEG"))
    index = load(folder).index
    assert index.image_ids[-1] == "train900"
    assert index.box_start[-1] == index.box_start[-2]


# Mutations at random


def broken_bytes(content: bytes, rng: np.random.Generator) -> bytes:
    """One to three small changes of the kinds that editors, downloads and scripts make."""
    for _ in range(int(rng.integers(1, 4))):
        content = MUTATIONS[rng.integers(len(MUTATIONS))](content, rng)
    return content


def at(content: bytes, rng: np.random.Generator) -> int:
    return int(rng.integers(len(content) + 1))


def swap_field(content: bytes, rng: np.random.Generator) -> bytes:
    fields = re.split(rb"([,\n])", content)
    odd = (b"", b"nan", b"-1", b"1e400", b"0,5", b'"', b'a"b', b"../x", b"/m/0", b" ", b"\x00", b"\xff", b"true", b"[]")
    fields[2 * int(rng.integers((len(fields) + 1) // 2))] = odd[rng.integers(len(odd))]
    return b"".join(fields)


def move_lines(content: bytes, rng: np.random.Generator) -> bytes:
    lines = content.split(b"\n")
    first, second = rng.integers(len(lines), size=2)
    if rng.random() < 0.5:
        lines[first], lines[second] = lines[second], lines[first]
    else:
        lines.insert(int(first), lines[second])
    return b"\n".join(lines)


MUTATIONS: tuple[Callable[[bytes, np.random.Generator], bytes], ...] = (
    lambda content, rng: content[: (place := at(content, rng))] + content[place + int(rng.integers(1, 9)) :],
    lambda content, rng: (
        content[: (place := at(content, rng))]
        + bytes(rng.choice(list(b',"\n\r;\t\x00\xff{}[]:0.-e '), 2))
        + content[place:]
    ),
    lambda content, rng: content[: at(content, rng)],
    swap_field,
    move_lines,
    lambda content, rng: content.replace(b"\n", b"\r\n") if rng.random() < 0.5 else content.replace(b",", b";"),
    lambda content, rng: content.replace(b"\n", b"\r") if rng.random() < 0.5 else in_utf_16(content),
)


def in_utf_16(content: bytes) -> bytes:
    return content if content.startswith(codecs.BOM_UTF16) else content.decode(errors="replace").encode("utf-16")


def filled_lines(content: bytes) -> int:
    if content.startswith(codecs.BOM_UTF16):
        content = content.decode("utf-16", errors="replace").encode(errors="replace")
    return sum(1 for line in re.split(rb"\r\n|\r|\n", content) if line)


@pytest.mark.slow
def test_of_2000_mutations_each_is_read_in_full_or_refused_by_name(tiny_dataset: TinyDataset) -> None:
    folder = tiny_dataset(train=6, validation=0)
    names = (BOXES, LABELS, CLASSES, HIERARCHY)
    originals = {name: (folder / name).read_bytes() for name in names}
    refused = kept = dropped = 0
    for seed in range(2000):
        rng = np.random.default_rng(seed)
        name = names[rng.choice(4, p=[0.5, 0.25, 0.125, 0.125])]
        content = broken_bytes(originals[name], rng)
        (folder / name).write_bytes(content)
        errors = RowErrors("drop")
        try:
            index = read_annotations(find_files(folder, ["train"]), errors, progress=lambda text: None)
        except ValueError as error:
            unnamed = None if name in str(error) else (seed, content, error)
            assert unnamed is None
            refused += 1
        else:
            rows_in = sum(filled_lines((folder / file).read_bytes()) - 1 for file in (BOXES, LABELS))
            counted = len(index.boxes) + len(index.verified_class) + errors.count + errors.left_out
            assert counted == rows_in, (seed, content)
            assert (errors.left_out > 0) == bool(errors.notices)
            kept += 1
            dropped += errors.count > 0
        (folder / name).write_bytes(originals[name])
    # All three ways are taken often, or the mutations would test little.
    assert min(refused, kept - dropped, dropped) > 100


PREDICTIONS = "ImageID,LabelName,Score,XMin,XMax,YMin,YMax\n" + "".join(
    f"train00{row % 6},/m/0car,0.{row},0.1,0.5,0.25,0.75\n" for row in range(1, 9)
)
RESULTS = json.dumps(
    [
        {"image_id": f"train00{row % 6}", "category_id": 1, "bbox": [1, 2, 30, 40.5], "score": row / 9}
        for row in range(1, 9)
    ]
)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["predictions.csv", "results.json"])
def test_of_1000_mutations_of_predictions_each_row_is_a_detection_or_an_error(
    name: str, tiny_dataset: TinyDataset, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_dataset(train=6, validation=0)
    index = load(folder).index
    path, text = folder / name, (PREDICTIONS if name.endswith("csv") else RESULTS).encode()
    refused = kept = dropped = 0
    for seed in range(1000):
        content = broken_bytes(text, np.random.default_rng(seed))
        path.write_bytes(content)
        errors = RowErrors("drop")
        capsys.readouterr()
        try:
            found = read_predictions(path, index, errors, explain=True)
        except ValueError as error:
            unnamed = None if name in str(error) else (seed, content, error)
            assert unnamed is None
            refused += 1
            continue
        rows = filled_lines(content) - 1 if name.endswith("csv") else len(json.loads(read_text(path)))
        assert len(found) + errors.count == rows, (seed, content)
        assert bool((found.image_index < 0).any()) == ("not evaluated" in capsys.readouterr().out)
        kept += 1
        dropped += errors.count > 0
    assert min(refused, kept - dropped, dropped) > 20


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "WEBP"])
def test_of_500_mutations_of_an_image_each_has_pixels_or_a_reason(kind: str, tmp_path: Path) -> None:
    whole = encoded(NOISE, kind)
    refused = 0
    for seed in range(500):
        rng = np.random.default_rng(seed)
        path = tmp_path / "image"
        path.write_bytes(broken_bytes(whole, rng) if seed % 2 else whole[: at(whole, rng)])
        size = header_size(path)
        if isinstance(size, str):
            assert size
            refused += 1
            continue
        assert seed % 2 or kind == "JPEG" or path.stat().st_size == len(whole), "a cut file was not noticed"
        try:
            assert decode(path, size, (32, 48)).shape == (32, 48, 3)
        except UnreadableImageError:
            refused += 1
    assert refused > 200
