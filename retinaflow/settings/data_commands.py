"""Settings of the commands that bring data in: ``convert`` and ``download``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from retinaflow.data.formats.checks import Orientation
from retinaflow.data.formats.image_files import Placing
from retinaflow.data.formats.layout import Layout
from retinaflow.data.formats.voc import Difficult, FirstPixel
from retinaflow.data.images import OnBadImage
from retinaflow.data.tables import OnBadRow
from retinaflow.settings.fields import Auto, Fraction, OptionalPath, OptionalText, Paths, split_list
from retinaflow.settings.groups import TrackingSettings


class ConvertConfig(TrackingSettings):
    """``convert``: data in COCO, VOC or YOLO form into the layout that train reads, and back."""

    data: str = "demo"
    """What is read: a folder, COCO's .json, YOLO's data.yaml, or demo for the generated set."""
    output: Path = Path("outputs/converted")
    """Folder to write; it must be new or empty, and appears when it is complete."""
    source_format: Layout | Auto = "auto"
    """Layout of data: coco (LVIS too), voc, yolo or openimages; auto: by what is in it."""
    to: Layout | Auto = "auto"
    """Layout to write; auto: openimages, which train reads, and coco where that is what is read."""
    images: Paths = ()
    """Folders to look for image files in first; none: where the layout has them."""
    classes: OptionalPath = None
    """Class list (id,name) that fixes ids and order; none: class-descriptions.csv in data, else as data has them, with
    ids made of the names (/c/traffic_light)."""
    exhaustive: bool | Auto = "auto"
    """Every object of every class is boxed; auto: true, but false for LVIS. Kept in retinaflow.yaml for train."""
    validation_share: Annotated[Fraction, Field(lt=1)] = 0.2
    """Share of the images that become the validation split where data has a train split only; 0: none."""
    image_files: Placing = "copy"
    """Images are copied, hardlink: get a second name on the same disk, or symlink: are linked to; never re-encoded."""
    orientation: Orientation = "auto"
    """What boxes of images with an EXIF orientation refer to: stored, turned; auto: by declared size (YOLO: turned)."""
    voc_first_pixel: FirstPixel = "auto"
    """VOC corners: 1: pixels counted from 1, the last one included, as in the challenges; 0: edges, as most tools
    write; auto: 1 for the challenges' own files, else 0."""
    voc_difficult: Difficult = "group-of"
    """VOC's difficult objects: group-of (neither learned nor punished), or keep as any other."""
    on_bad_row: OnBadRow = "stop"
    """A box that breaks a rule stops the conversion, or is dropped and listed in dropped.csv."""
    on_bad_image: OnBadImage = "stop"
    """An image without a readable file stops the conversion, or is skipped and listed in dropped.csv."""


class DownloadConfig(TrackingSettings):
    """``download``: images and annotations of Open Images, by classes or by ids, into the layout that train reads."""

    output: Path = Path("outputs/openimages")
    """Folder to write; the same command resumes what is there."""
    class_group: OptionalText = None
    """Classes to fetch, with everything below them in the hierarchy: names or ids, people-clothing, rest, all, or a
    file of names; none: all that the images of image_ids have."""
    per_class: Annotated[int, Field(ge=1)] = 100
    """Images of each class in each split, as far as there are as many."""
    image_ids: OptionalPath = None
    """File of image ids to fetch (with or without train/ before them) instead of choosing by class; none: choose."""
    splits: Annotated[tuple[Literal["train", "validation", "test"], ...], BeforeValidator(split_list)] = (
        "train",
        "validation",
    )
    """Published splits to fetch from."""
    originals: bool = False
    """Fetch the photographs as they were uploaded, as far as they still are, not the copies of at most 1024 pixels."""
    dry_run: bool = False
    """Only read the tables and say how many images and bytes there are to fetch."""
    connections: Annotated[int, Field(ge=1, le=32)] = 8
    """Images fetched at the same time."""
    retries: Annotated[int, Field(ge=0)] = 6
    """Further tries of a file after the first, with waits that double."""
    timeout: Annotated[float, Field(gt=0)] = 30.0
    """Seconds without a byte after which a try has failed."""
    tables_url: str = "https://storage.googleapis.com/openimages"
    """Base address of the tables."""
    images_url: str = "https://s3.amazonaws.com/open-images-dataset"
    """Base address of the image copies."""
    on_bad_image: OnBadImage = "stop"
    """An image that cannot be read whole ends the command after the others, to be resumed, or is skipped. One that
    the server does not have is left out in any case, and listed in missing.csv; but when the server has none of the
    first 20, stop takes the address to be wrong, and skip goes on."""
