"""Images that turn out to be unreadable while a command runs with ``on_bad_image=skip``: reported, counted, listed."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd

from retinaflow.data.images import BadImage
from retinaflow.data.tables import RowError, errors_frame
from retinaflow.progress import report


class SkippedImages:
    """Collects the images; :meth:`log` adds them to the rows and images left out when the data was read."""

    def __init__(self) -> None:
        self._found: dict[str, BadImage] = {}

    def __len__(self) -> int:
        return len(self._found)

    @property
    def images(self) -> list[BadImage]:
        """Each image once, in the order in which they were found."""
        return list(self._found.values())

    def add(self, image: BadImage) -> None:
        """Add an image, and report it if it is new."""
        if image.image_id not in self._found:
            report(f"skipped {image.reason}")
        self.note(image)

    def note(self, image: BadImage) -> None:
        """Add an image without a report."""
        self._found[image.image_id] = image

    def table(self, dropped: pd.DataFrame) -> pd.DataFrame:
        """``dropped`` (columns of :func:`~retinaflow.data.tables.errors_frame`) with a row for each image."""
        rows = [RowError(i.image_id, 0, "an image must stay readable", i.reason) for i in self._found.values()]
        return pd.concat([dropped, errors_frame(rows)], ignore_index=True)

    def log(self, log_csv: Callable[[pd.DataFrame, str], None], dropped: pd.DataFrame) -> None:
        """If there are any, log ``dropped.csv`` again with them, and report how many."""
        if self._found:
            log_csv(self.table(dropped), "dropped.csv")
            report(f"{len(self):,} images became unreadable and were skipped; dropped.csv lists them")
