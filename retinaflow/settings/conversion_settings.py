"""Settings of the commands that bring data in: ``convert`` and ``download``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from retinaflow.settings.data_settings import OnBadImage, OnBadRow, Settings, TrackingSettings, with_defaults
from retinaflow.settings.value_types import Fraction, OptionalPath, OptionalText, Paths, split_list

Layout = Literal["openimages", "coco", "voc", "yolo"]
Placing = Literal["copy", "hardlink", "symlink"]
Orientation = Literal["auto", "stored", "turned"]
FirstPixel = Literal["auto", "0", "1"]
Difficult = Literal["group-of", "keep"]
BoxUnit = Literal["auto", "pixel", "fraction"]
CocoBbox = Literal["auto", "size", "corners"]


@with_defaults(
    output=Path("outputs/converted"),
    texts={"output": "Folder to write; it must be new or empty, and appears when it is complete."},
)
class ConvertConfig(TrackingSettings):
    """``convert``: data in COCO, VOC or YOLO form into the layout that train reads, and back."""

    title = "Conversion"

    data: str = "demo"
    """What is read: a folder, COCO's .json, YOLO's data.yaml, or demo for the generated set."""
    source_format: Layout | Literal["auto"] = "auto"
    """Layout of data: coco (LVIS too), voc, yolo or openimages; auto: by what is in it."""
    to: Layout | Literal["auto"] = "auto"
    """Layout to write; auto: openimages, which train reads, and coco where that is what is read."""
    images: Paths = ()
    """Folders to look for image files in first; none: where the layout has them."""
    linked_folders: Paths = ()
    """Folders outside of data to which its lists and links may lead; none: a path that leads out stops."""
    classes: OptionalPath = None
    """Class list (id,name) that fixes ids and order; none: the one in data, or ids made of the names."""
    exhaustive: bool | Literal["auto"] = "auto"
    """Every object of every class is boxed (noted in retinaflow.yaml for train); auto: true, but false for LVIS."""
    validation_fraction: Annotated[Fraction, Field(lt=1)] = 0.2
    """Fraction of the images for validation where data has a train split only; 0: none."""
    image_files: Placing = "copy"
    """Images are copied, or linked to (hardlink, symlink); never re-encoded."""
    orientation: Orientation = "auto"
    """What boxes of images with an EXIF orientation refer to; auto: by declared size (YOLO: turned)."""
    voc_first_pixel: FirstPixel = "auto"
    """VOC corners: 1: pixels from 1, the last one included; 0: edges; auto: 1 for the challenges' files, else 0."""
    difficult: Difficult = "group-of"
    """Objects marked difficult or ignore (VOC, COCO): group-of (neither learned nor counted as errors), or keep as any
    other."""
    box_unit: BoxUnit = "auto"
    """Unit of the boxes that are read: pixel, or fraction of the image; auto: fraction for YOLO, else pixel, but stops
    where the numbers contradict it."""
    coco_bbox: CocoBbox = "auto"
    """COCO's bbox: x, y and size, or corners x1, y1, x2, y2; auto: size, but stops where area contradicts it."""
    on_bad_row: OnBadRow = "stop"
    """A box that breaks a rule stops the conversion, or is dropped and listed in dropped.csv."""
    on_bad_image: OnBadImage = "stop"
    """An image without a readable file stops the conversion, or is skipped and listed in dropped.csv."""


class DryRunSettings(Settings):
    """Looking before working."""

    dry_run: bool = False
    """Only print how much there is to do."""


@with_defaults(
    output=Path("outputs/openimages"),
    texts={
        "output": "Folder to write; the same command resumes what is there.",
        "dry_run": "Only read the tables and print how many images and bytes there are to fetch.",
    },
)
class DownloadConfig(TrackingSettings, DryRunSettings):
    """``download``: images and annotations of Open Images, by classes or by ids, into the layout that train reads."""

    title = "Download"

    class_group: OptionalText = None
    """Classes to fetch with everything below them: names or ids, people-clothing, rest, all, or a file; none: all that
    the images of image_ids have."""
    per_class: Annotated[int, Field(ge=1)] = 100
    """Maximum images of each class in each split."""
    image_ids: OptionalPath = None
    """File of image ids to fetch (with or without train/ before them) instead of choosing by class."""
    splits: Annotated[tuple[Literal["train", "validation", "test"], ...], BeforeValidator(split_list)] = (
        "train",
        "validation",
    )
    """Published splits to fetch from."""
    originals: bool = False
    """Fetch the original photographs, as far as they are still online, instead of copies of at most 1024 pixels."""
    connections: Annotated[int, Field(ge=1, le=32)] = 8
    """Images fetched at the same time."""
    retries: Annotated[int, Field(ge=0)] = 6
    """Further tries of a file after the first, with waits that double."""
    timeout: Annotated[float, Field(gt=0, le=86_400)] = 30.0
    """Seconds without a byte after which a try has failed."""
    tables_url: str = "https://storage.googleapis.com/openimages"
    """Base address of the tables."""
    images_url: str = "https://s3.amazonaws.com/open-images-dataset"
    """Base address of the image copies."""
    on_bad_image: OnBadImage = "stop"
    """An unreadable image stops the command after the others, or is skipped; one that the server lacks is listed in
    missing.csv, but stop ends the command when it lacks all of the first 20."""
