"""Random damage to COCO JSON, VOC XML, YOLO text and image bytes: read or refused by name, never a traceback, and every
box that goes in comes out or is reported."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from retinaflow.data.formats.conversion import convert
from retinaflow.data.formats.known_formats import layout_of
from retinaflow.errors import DataError, SettingError
from retinaflow.settings.conversion_settings import ConvertConfig
from retinaflow.settings.resolve import resolve

Boxes = Callable[[bytes], int | None]
"""Content of a file -> boxes in it; None where it cannot be counted without reading it as ``convert`` does."""


@dataclass(frozen=True)
class Layout:
    """A small set, the file that is damaged, odd values for its fields, and how to count its boxes."""

    files: dict[str, bytes]
    target: str
    boxes: Boxes
    others: int
    """Boxes in the files that are whole."""
    weights: tuple[float, ...]
    """How often each kind of damage is done: most other damage makes a JSON file no JSON."""


BOXES = [[4.5, 4, 20, 20], [30, 5, 10, 12.25], [0, 0, 64, 48]]


def coco_file() -> bytes:
    images = [{"id": n, "file_name": f"{n}.jpg", "width": 64, "height": 48} for n in range(3)]
    annotations = [
        {"id": n, "image_id": n % 2, "category_id": 1 + n % 2, "bbox": box, "area": box[2] * box[3], "iscrowd": n % 2}
        for n, box in enumerate(BOXES)
    ]
    categories = [{"id": 1, "name": "cup"}, {"id": 2, "name": "plate"}]
    document = {"images": images, "annotations": annotations, "categories": categories}
    return json.dumps(document, indent=0).encode()


def voc_file() -> bytes:
    things = "\n".join(
        f"<object><name>cup</name><difficult>0</difficult><bndbox><xmin>{n}</xmin><ymin>2</ymin><xmax>{n + 9}</xmax>"
        "<ymax>20</ymax></bndbox></object>"
        for n in range(3)
    )
    size = "<size><width>64</width><height>48</height></size>"
    return f"<annotation>\n<filename>0.jpg</filename>{size}\n{things}\n</annotation>".encode()


def boxes_of_coco(content: bytes) -> int | None:
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        return None
    annotations = document.get("annotations") if isinstance(document, dict) else None
    # A name that is given twice: the JSON parser keeps the last, convert refuses the file.
    return len(annotations) if isinstance(annotations, list) else None


def boxes_of_voc(content: bytes) -> int | None:
    return len(re.findall(rb"<object>", content))


def boxes_of_yolo(content: bytes) -> int | None:
    return sum(1 for line in re.split(rb"\r\n|\r|\n", content) if line.strip(b" \t\x0b\x0c\x1c\x1d\x1e\x1f"))


ROWS = b"0 0.5 0.5 0.4 0.4\n1 0.25 0.25 0.25 0.125\n0 0.1 0.1 0.3 0.1 0.2 0.4\n"
LAYOUTS = {
    "coco": Layout({"train.json": coco_file()}, "train.json", boxes_of_coco, 0, (0.01, 0.01, 0.01, 0.02, 0.5, 0.45)),
    "voc": Layout(
        {"0.xml": voc_file(), "1.xml": voc_file().replace(b"0.jpg", b"1.jpg")},
        "0.xml",
        boxes_of_voc,
        3,
        (0.05, 0.05, 0.05, 0.25, 0.3, 0.3),
    ),
    "yolo": Layout(
        {"classes.txt": b"cup\nplate\n", "0.txt": ROWS, "1.txt": ROWS, "2.txt": b""},
        "0.txt",
        boxes_of_yolo,
        3,
        (0.1, 0.1, 0.1, 0.5, 0.1, 0.1),
    ),
}
ODD = (
    b"", b"null", b"NaN", b"-1", b"1e999", b"1" + b"0" * 400, b"9" * 5000, b"Infinity", b"0.0", b'"0"', b"true",
    b"[]", b"{}", b"[" * 3000, b'"' + b"x" * 300 + b'"', b'"\\ud800"', b"\x00", b"\xff", b"0,5", b"../x", b"&#0;",
    b"&a;", b"1_0", b" ",
    "\u2028\u0085".encode(), "\u0663".encode(),
)  # fmt: skip


def damaged(content: bytes, rng: np.random.Generator, weights: tuple[float, ...]) -> bytes:
    """One to three changes: bytes cut, put in, moved or exchanged, fields replaced by odd values, lines repeated."""
    for _ in range(int(rng.integers(1, 4))):
        at, kind = int(rng.integers(len(content) + 1)), int(rng.choice(6, p=weights))
        if kind == 0:
            content = content[:at] + content[at + int(rng.integers(1, 9)) :]
        elif kind == 1:
            content = content[:at] + bytes(rng.choice(list(b'<>,"\n\r\x00\xff{}[]:0.-e /'), 2).tolist()) + content[at:]
        elif kind == 2:
            content = content[:at]
        elif kind == 3:
            lines = content.split(b"\n")
            first, second = (int(value) for value in rng.integers(len(lines), size=2))
            lines[first : first + 1] = [lines[second]] if rng.random() < 0.5 else [lines[first], lines[second]]
            content = b"\n".join(lines)
        else:
            fields = re.split(rb'([-\w.]+|"[^"]*")', content)
            fields[2 * int(rng.integers(max(len(fields) // 2, 1))) + (len(fields) > 1)] = ODD[
                int(rng.integers(len(ODD)))
            ]
            content = b"".join(fields)
    return content


def converted(data: Path, folder: Path) -> tuple[int, int, bool]:
    """Boxes that are written, boxes that are reported, and whether a file as a whole is reported."""
    folder.mkdir()
    given = {"data": str(data), "on_bad_row": "drop", "on_bad_image": "skip", "validation_fraction": 0}
    config = resolve(ConvertConfig, {**given, "box_unit": "auto", "image_files": "hardlink"})
    found, errors = convert(config, data, folder, layout=layout_of(data), target="coco")
    # An image or category that is left out takes its boxes along: their number stands in its error.
    more = [re.search(r"with ([\d,]+) (?:boxes|annotations)", error.value) for error in errors.found]
    whole = sum(
        int(hit[1].replace(",", "")) if hit else 0 if _is_image(error.rule) else 1
        for hit, error in zip(more, errors.found, strict=True)
    )
    files = ("an annotation file must", "a VOC file must", "a label file must")
    return len(found.boxes), whole, any(error.rule.startswith(files) for error in errors.found)


def _is_image(rule: str) -> bool:
    return rule.startswith(("an image must", "the declared size", "file_name must"))


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_damaged_files_are_read_or_refused_and_no_box_is_lost_in_silence(tmp_path: Path, layout: str) -> None:
    made = LAYOUTS[layout]
    data = tmp_path / "set"
    data.mkdir()
    for name, content in made.files.items():
        (data / name).write_bytes(content)
    for n in range(3):
        Image.new("RGB", (64, 48), (90, 120, 90)).save(data / f"{n}.jpg")
    refused = kept = reported = 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        content = damaged(made.files[made.target], rng, made.weights)
        (data / made.target).write_bytes(content)
        try:
            written, left_out, of_file = converted(data, tmp_path / f"out{seed}")
        except (DataError, SettingError) as error:
            refused += 1
            too_long = str(error) if len(str(error)) > 5000 else None
            assert too_long is None
            continue
        boxes = made.boxes(content)
        # A file that is no text or no XML is one error, whatever is in it.
        if boxes is not None and not of_file:
            assert written + left_out >= boxes + made.others, (seed, content)
        kept += 1
        reported += left_out > 0
    assert min(kept - reported, reported) > 10
    assert refused > 20 or layout != "coco"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "WEBP"])
def test_damaged_images_are_read_or_reported_with_their_boxes(tmp_path: Path, kind: str) -> None:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, kind)
    data = tmp_path / "set"
    data.mkdir()
    suffix = {"JPEG": "jpg"}.get(kind, kind.lower())
    for name, content in {"classes.txt": b"cup\nplate\n", "0.txt": ROWS, "1.txt": ROWS}.items():
        (data / name).write_bytes(content)
    (data / f"1.{suffix}").write_bytes(buffer.getvalue())
    left_out = 0
    for seed in range(150):
        rng = np.random.default_rng(seed)
        content = bytearray(buffer.getvalue())
        if rng.random() < 0.5:
            content = content[: int(rng.integers(len(content)))]
        for at in rng.integers(max(min(len(content), 200), 1), size=3).tolist():
            if at < len(content):
                content[at] = int(rng.integers(256))
        (data / f"0.{suffix}").write_bytes(bytes(content))
        written, reported, _ = converted(data, tmp_path / f"out{seed}")
        assert written + reported == 6, seed
        left_out += reported > 0
    assert left_out > 20
