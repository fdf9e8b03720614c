"""The body of a request to MLflow's scoring server, checked before MLflow parses it.

MLflow reads any body whole, and parses what it holds before the model is asked. So 82 kB of Parquet become 0.66 GB,
64 MB of ``{},{},`` 1.4 GB, one long text beside a hundred short ones 12 GB (an array of texts of one length), and an
error repeats the whole body. It offers no setting and no hook for this, so the method by which its server reads a body
is replaced: it returns the images and parameters of the body in MLflow's plainest form, or raises.

A body is JSON or CSV as it stands: not compressed, not Parquet. A proxy in front can limit the length as well (nginx:
``client_max_body_size``).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

from retinaflow.runs.served_images import Limits

_VALUES_PER_IMAGE = 100
"""Values and names that a request may have for each image; ordinary ones have one to four."""
_JSON, _CSV, _PARQUET = "application/json", "text/csv", "application/vnd.apache.parquet"
_SEPARATORS = {_JSON: b"[{,:", _CSV: b",\n\r"}
"""What stands before or after each value. Base64 text has none of these."""
_FORMS = ("dataframe_split", "dataframe_records", "instances", "inputs")
"""MLflow's forms of a table, one of which a JSON request has."""
_MAX_UNICODE_BYTES = 1 << 20
"""A longer body must be ASCII: one letter beyond it makes each of the others four bytes."""
_MAX_CSV_HEADER = 1000


class BadRequest(MlflowException, ValueError):
    """An error of the request: a ValueError in Python, 400 from a server."""

    def __init__(self, message: str) -> None:
        super().__init__(message, error_code=INVALID_PARAMETER_VALUE)


def limit_request_bodies(limits: Limits) -> None:
    """Refuse other bodies in this process with 400: larger ones before they are in memory."""
    from starlette.requests import Request

    most, message = limits.max_request_bytes, f"a request may have {limits.max_request_bytes:,} bytes"
    message = f"{message} (max_request_bytes)"

    async def body(self: Request) -> bytes:
        if not hasattr(self, "_body"):
            kind = body_kind(self.headers)
            length = self.headers.get("content-length", "")
            if length.isdecimal() and int(length) > most:
                raise BadRequest(f"{message}, but has {int(length):,}")
            parts, size = [], 0
            async for part in self.stream():
                size += len(part)
                if size > most:
                    raise BadRequest(f"{message}, but has more")
                parts.append(part)
            content = b"".join(parts)
            # In a thread: others are answered meanwhile.
            self._body = await asyncio.to_thread(checked_body, content, kind, limits)
        return bytes(self._body)

    Request.body = body  # type: ignore[method-assign, assignment]


def body_kind(headers: Mapping[str, str]) -> str:
    """The content type of a request. Raises BadRequest for one that is compressed, Parquet, or not named."""
    kind = headers.get("content-type", "").split(";")[0].strip()
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if not kind or kind == _PARQUET or encoding not in ("", "identity"):
        got = f"content-encoding: {encoding[:40]}" if kind and kind != _PARQUET else f"content-type: {kind or 'none'}"
        raise BadRequest(f"a request must be {_JSON} or {_CSV}, not compressed, but got {got}")
    return kind


def checked_body(content: bytes, kind: str, limits: Limits) -> bytes:
    """The same request for MLflow to parse. Raises BadRequest for more values than the images that are allowed have,
    and for what is no request. Another kind is as it was: MLflow answers it with 415, unread."""
    most = _VALUES_PER_IMAGE * (limits.max_images + 10)
    values = sum(content.count(separator) for separator in _SEPARATORS.get(kind, b""))
    if values > most:
        raise BadRequest(f"a request may have {most:,} values ({limits.max_images} images, max_images), but has more")
    if len(content) > _MAX_UNICODE_BYTES and not content.isascii():
        raise BadRequest(f"a request of more than {_MAX_UNICODE_BYTES:,} bytes must be ASCII, as base64 text is")
    if kind == _CSV and len(content.partition(b"\n")[0]) > _MAX_CSV_HEADER:
        raise BadRequest(f"the first line of a CSV names its columns, in at most {_MAX_CSV_HEADER:,} bytes")
    return _plainest(content, limits) if kind == _JSON else content


def _plainest(content: bytes, limits: Limits) -> bytes:
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"a request must be a JSON object, but {str(error)[:200]}") from None
    if not isinstance(document, dict):
        raise BadRequest(f"a request must be a JSON object, but is a {type(document).__name__}")
    found = [form for form in _FORMS if form in document]
    if len(found) != 1:
        raise BadRequest(f"a request must have one of {', '.join(_FORMS)}, but has {' and '.join(found) or 'none'}")
    images = _images_of(document[found[0]], form=found[0])
    if len(images) > limits.max_images:
        raise BadRequest(f"a request may have {limits.max_images} images (max_images), but has {len(images)}")
    for number, image in enumerate(images):
        if not isinstance(image, str):
            raise BadRequest(f"row {number}: image must be base64 text, but is a {type(image).__name__}")
    params = document.get("params")
    if params is not None and not (isinstance(params, dict) and all(map(_is_number, params.values()))):
        raise BadRequest("params must be an object of names and numbers")
    plain: dict[str, Any] = {"dataframe_split": {"columns": ["image"], "data": [[image] for image in images]}}
    return json.dumps(plain | ({} if params is None else {"params": params})).encode()


def _images_of(given: Any, *, form: str) -> list[Any]:
    """The values of ``image`` in one of MLflow's forms. Raises BadRequest when there is no such column."""
    if form == "dataframe_split":
        columns, rows = (given.get(name) if isinstance(given, dict) else None for name in ("columns", "data"))
        if isinstance(columns, list) and isinstance(rows, list) and "image" in columns:
            at = columns.index("image")
            if all(isinstance(row, list) and len(row) == len(columns) for row in rows):
                return [row[at] for row in rows]
    elif isinstance(given, dict) and "image" in given:
        return given["image"] if isinstance(given["image"], list) else [given["image"]]
    elif isinstance(given, list):
        if all(isinstance(row, dict) and "image" in row for row in given):
            return [row["image"] for row in given]
        if form in ("instances", "inputs") and not any(isinstance(row, dict) for row in given):
            return given
    raise BadRequest(f"{form} must have a column image, with a value in each row")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1e9
