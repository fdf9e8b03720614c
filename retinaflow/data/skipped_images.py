"""Images that turn out unreadable while a command runs (``on_bad_image=skip``): said once each, counted, listed."""

from __future__ import annotations

import pandas as pd

from retinaflow.data.images import BadImage
from retinaflow.data.tables import RowError
from retinaflow.progress import report
from retinaflow.runs.run import Run


class SkippedImages:
    """Collects them; :meth:`log` adds them to what was left out when the data was read."""

    def __init__(self) -> None:
        self._found: dict[str, BadImage] = {}

    def __len__(self) -> int:
        return len(self._found)

    @property
    def images(self) -> list[BadImage]:
        """Each once, in the order in which they were found."""
        return list(self._found.values())

    def add(self, image: BadImage) -> None:
        """Take note of an image; it is said when it is new."""
        if image.image_id not in self._found:
            report(f"skipped {image.reason}")
        self.note(image)

    def note(self, image: BadImage) -> None:
        """The same without a word."""
        self._found[image.image_id] = image

    def table(self, dropped: pd.DataFrame) -> pd.DataFrame:
        """``dropped`` (columns file, line, rule, value) with a row for each image."""
        rows = [RowError(i.image_id, 0, "an image must stay readable", i.reason) for i in self._found.values()]
        return pd.concat([dropped, pd.DataFrame(rows, columns=list(RowError._fields))], ignore_index=True)

    def log(self, run: Run, dropped: pd.DataFrame) -> None:
        """Write ``dropped.csv`` anew, and say how many there are, if there are any."""
        if self._found:
            run.log_csv(self.table(dropped), "dropped.csv")
            report(f"{len(self):,} images could not be read any more and were skipped; dropped.csv lists them")
