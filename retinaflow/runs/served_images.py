"""A value of a request -> the bytes of an image file, checked before an image is decoded.

Every rule is checked on what is there already: the number of rows, the length of the base64 text, the pixels that the
file's header announces. An image is decoded only after that, one at a time.
"""

from __future__ import annotations

import base64
import binascii
import io
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from retinaflow.data.decoding_limits import open_header
from retinaflow.errors import DataError, SettingError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
"""The formats that training reads. Pillow's other readers are not used on files from a request."""


@dataclass(frozen=True)
class Limits:
    """What one request may ask for; whole numbers above 0."""

    max_images: int = 32
    """Images of one request."""
    max_bytes: int = 16 << 20
    """Bytes of one image file."""
    max_pixels: int = 50_000_000
    """Pixels of one image."""
    max_request_bytes: int = 64 << 20
    """Bytes of the body of a request to ``mlflow models serve``."""

    @staticmethod
    def of(settings: Mapping[str, Any]) -> Limits:
        """The limits among some settings. Raises SettingError for one that is no whole number above 0."""
        given = {item.name: settings[item.name] for item in fields(Limits) if item.name in settings}
        for name, value in given.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise SettingError(f"{name} must be a whole number above 0, but got {name}={value!r}")
        return Limits(**given)

    def as_settings(self) -> dict[str, int]:
        """Name -> value, as :meth:`of` takes them."""
        return asdict(self)


def _example() -> str:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (120, 160, 90)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


EXAMPLE = _example()
"""A tiny base64-encoded image: the input example of the logged model."""


class ImageFile(NamedTuple):
    """A whole file in memory, and the (height, width) in its header."""

    data: NDArray[np.uint8]
    size: tuple[int, int]


def sent_image(value: Any, limits: Limits) -> ImageFile:
    """The file that a base64 text holds. Raises DataError for any other value and for one beyond a limit."""
    if not isinstance(value, str):
        raise DataError(f"image must be base64 text, but is a {type(value).__name__}")
    # Four letters are three bytes; what is far too long is not even decoded.
    if len(value) // 4 * 3 > limits.max_bytes + 3:
        raise DataError(f"an image file may have {limits.max_bytes:,} bytes, but has {len(value) // 4 * 3:,}")
    try:
        data = base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        raise DataError(f"image must be a base64-encoded image file, but is {_shown(value)}") from None
    return _checked(data, limits)


def image_at(value: Any, limits: Limits) -> ImageFile:
    """The file of a path. Raises DataError unless it is a readable image file within the limits."""
    try:
        path = Path(value)
        if is_file := path.is_file():
            with path.open("rb") as file:
                data = file.read(limits.max_bytes + 1)
    except (TypeError, ValueError, OSError) as error:
        raise DataError(f"image must be the path of a file, but {_shown(str(error))}") from None
    # Not a pipe or a device, which may never end.
    if not is_file:
        raise DataError(f"image must be the path of a file, but {_shown(str(value))} is none")
    return _checked(data, limits)


def _checked(data: bytes, limits: Limits) -> ImageFile:
    if len(data) > limits.max_bytes:
        raise DataError(f"an image file may have {limits.max_bytes:,} bytes, but has more")
    try:
        with warnings.catch_warnings():
            # Of images that Pillow finds large; here the limit decides.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with open_header(io.BytesIO(data), FORMATS) as image:
                width, height = image.size
    except Image.DecompressionBombError:
        raise DataError(f"an image may have {limits.max_pixels:,} pixels, but has many more") from None
    # A damaged header makes Pillow's readers raise what their parsing happens to meet.
    except Exception:
        raise DataError(f"not an image file of {', '.join(FORMATS)}") from None
    if width * height > limits.max_pixels:
        raise DataError(f"an image may have {limits.max_pixels:,} pixels, but has {width} x {height}")
    if width < 1 or height < 1:
        raise DataError(f"an image must have pixels, but has {width} x {height}")
    return ImageFile(np.frombuffer(data, dtype=np.uint8), (height, width))


def _shown(value: str) -> str:
    return repr(value if len(value) <= 200 else f"{value[:200]}...")
