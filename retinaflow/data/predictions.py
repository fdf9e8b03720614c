"""Predictions in their usual forms -> :class:`~retinaflow.detections.Detections`.

- the published columns ``ImageID, LabelName, Score, XMin, XMax, YMin, YMax``, found by name, in a CSV or Parquet file;
- the same in a pandas frame;
- the Kaggle submission of the Challenge: ``ImageId, PredictionString``, one row per image, six words per detection:
  ``{MID} {score} {XMin} {YMin} {XMax} {YMax}``;
- COCO results in JSON (:mod:`retinaflow.data.coco_results`).

Rows keep their order, by which the metric breaks equal scores. Boxes are kept as given, valid or not, inside the image
or not (METRIC rules 3 and 9); a score or coordinate that is no finite number, and a class outside the class list, is an
error with file and line. An image that is not in the annotations gets index -1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pa_compute

from retinaflow.data.annotation_rows import CORNERS
from retinaflow.data.coco_results import read_coco_results
from retinaflow.data.id_columns import with_class, with_normal_ids
from retinaflow.data.index import AnnotationIndex
from retinaflow.data.prediction_checks import PredictionFile, check_predictions
from retinaflow.data.spreadsheets import from_spreadsheet
from retinaflow.data.table_reader import header_of, read_table
from retinaflow.data.tables import Frame, RowErrors, Source, Table, TextColumn
from retinaflow.detections import Detections
from retinaflow.errors import DataError

_STRING = "PredictionString"
_WORDS = ("LabelName", "Score", *CORNERS)
"""The words of one detection of a PredictionString."""
SCHEMA = pa.schema(
    [("ImageID", pa.string()), ("LabelName", pa.string()), *((name, pa.float32()) for name in _WORDS[1:])]
)
"""The published columns, as they are written."""


def read_predictions(
    source: Source,
    index: AnnotationIndex,
    errors: RowErrors,
    *,
    ids: Path | None = None,
    explain: bool = False,
) -> Detections:
    """The detections of a file or frame; ``image_index`` counts the images of ``index``, -1 is none of them.

    ``ids``: a COCO file of the images and categories that a JSON file names by number. ``explain``: print a line for
    each reason why detections cannot count (:func:`~retinaflow.data.prediction_checks.check_predictions`). Raises
    DataError with file, line, rule and value, or drops rows with errors, by the setting in ``errors``.
    """
    table = _read(source, index, errors, ids)
    table = with_class(with_normal_ids(table), index.taxonomy, errors)
    errors.settle()
    images = table.texts["ImageID"]
    position = pd.Index(index.image_ids).get_indexer(pd.Index(images.values.to_pylist(), dtype=object))
    boxes = np.empty((len(table), 4))
    for column, name in enumerate(CORNERS):
        boxes[:, column] = table.columns.pop(name)
    image_index = position.astype(np.int32)[images.codes]
    detections = Detections(image_index, table.columns["class"], table.columns["Score"], boxes)
    if explain:
        file = PredictionFile(table.path.name, lambda row: f"line {table.lines[row]}", images.__getitem__)
        check_predictions(detections, index, file)
    return detections


def _read(source: Source, index: AnnotationIndex, errors: RowErrors, ids: Path | None) -> Table:
    if isinstance(source, Path) and source.suffix.lower() == ".json":
        if not source.is_file():
            raise DataError(f"{source}: no such file")
        return read_coco_results(source, index, errors, ids=ids)
    header = [str(name) for name in source.data.columns] if isinstance(source, Frame) else header_of(source)
    if _STRING in header:
        return _read_submission(source, header, errors)
    table = read_table(source, text=("ImageID", "LabelName"), numbers=("Score", *CORNERS), optional={}, errors=errors)
    if isinstance(source, Path) and source.suffix.lower() == ".csv":
        for name in ("ImageID", "LabelName"):
            table.texts[name] = table.texts[name].mapped(from_spreadsheet(table.texts[name].values))
    return table


def _read_submission(source: Source, header: list[str], errors: RowErrors) -> Table:
    """A Kaggle submission as a table of one row per detection, in the published columns."""
    image_column = "ImageId" if "ImageId" in header else "ImageID"
    rows = read_table(source, text=(image_column, _STRING), numbers=(), optional={}, errors=errors)
    strings = rows.texts[_STRING]
    trimmed = pa_compute.ascii_trim_whitespace(strings.values)
    words = pa_compute.ascii_split_whitespace(trimmed)
    # An empty string splits into one empty word.
    empty = pa_compute.equal(trimmed, "").to_numpy(zero_copy_only=False)
    count = np.where(empty, 0, pa_compute.list_value_length(words).to_numpy(zero_copy_only=False))[strings.codes]
    rule = f"PredictionString must hold six words per detection ({' '.join(_WORDS)})"
    rows.columns["words"] = count
    rows = rows.require(count % len(_WORDS) == 0, rule, ("words",), errors)
    count = rows.columns["words"] // len(_WORDS)
    filled = rows.texts[_STRING].codes[count > 0]
    flat = words.take(pa.array(filled)).flatten()
    owner = np.repeat(np.arange(len(rows)), count)
    images = rows.texts[image_column]
    table = Table(rows.path, {}, {"ImageID": TextColumn(images.codes[owner], images.values)}, rows.lines[owner])
    first = np.arange(len(owner)) * len(_WORDS)
    for number, name in enumerate(_WORDS):
        table.texts[name] = TextColumn.encode(pa.chunked_array([flat.take(pa.array(first + number))], type=pa.string()))
    return _with_numbers(table, errors)


def _with_numbers(table: Table, errors: RowErrors) -> Table:
    """The words of Score and the corners as float64; a word that is no finite number becomes an error."""
    for name in _WORDS[1:]:
        values = table.texts[name].numbers()
        table = table.require(np.isfinite(values), f"{name} must be a number", [name], errors)
        table.columns[name] = values[np.isfinite(values)]
        del table.texts[name]
    return table


def predictions_frame(detections: Detections, index: AnnotationIndex) -> pd.DataFrame:
    """Detections in the published columns, rows in their order."""
    ids = np.asarray(index.taxonomy.ids, dtype=object)
    corners = {name: detections.boxes[:, column] for column, name in enumerate(CORNERS)}
    return pd.DataFrame(
        {
            "ImageID": np.asarray(index.image_ids)[detections.image_index],
            "LabelName": ids[detections.class_index],
            "Score": detections.score,
            **corners,
        }
    )


def submission_rows(table: pa.Table, image_ids: Sequence[str]) -> pd.DataFrame:
    """Detections in the published columns as rows of a Kaggle submission: one per image, in the order of the ids.

    Numbers have enough digits to distinguish float32 values. An image without detections has an empty string.
    """
    words = [table["LabelName"], *(pa_compute.cast(table[name], pa.string()) for name in _WORDS[1:])]
    texts = pa_compute.binary_join_element_wise(*words, " ")
    of_image: dict[str, list[str]] = {image_id: [] for image_id in image_ids}
    for image_id, text in zip(table["ImageID"].to_pylist(), texts.to_pylist(), strict=True):
        of_image[image_id].append(text)
    return pd.DataFrame({"ImageId": list(of_image), _STRING: [" ".join(found) for found in of_image.values()]})


def source_of(given: object, name: str) -> Source:
    """A path, a pandas frame or a mapping of columns to arrays, as a source; ``name`` is its name in errors.

    Raises DataError for anything else and for columns of different length.
    """
    if isinstance(given, str | Path):
        return Path(given)
    if isinstance(given, pd.DataFrame):
        return Frame(name, given)
    if isinstance(given, Mapping):
        try:
            return Frame(name, pd.DataFrame(dict(given)))
        except ValueError as error:
            raise DataError(f"{name}: columns must be arrays of one length, but {error}") from None
    raise DataError(f"{name} must be a path, a pandas frame or a dict of columns, but got a {type(given).__name__}")
