"""Reading over HTTP with retries, growing waits and verified lengths.

A status of 429 or 5xx, a broken or stalled connection, and a body that does not match its headers are tried again after
a random wait, each time twice as long; all connections obey ``Retry-After``. 403, 404 and 410 mean that there is no
such file. HTTP itself is left to requests.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from email.utils import parsedate_to_datetime
from typing import TypeVar

import requests

from retinaflow.errors import DataError
from retinaflow.files import growing_waits, retry

Result = TypeVar("Result")
FIRST_WAIT = 1.0
"""Seconds; the first wait is between half of it and all of it."""
LONGEST_WAIT = 60.0
LONGEST_RETRY_AFTER = 600.0
_BLOCK = 1 << 20
_GONE = (403, 404, 410)
_BUSY = (408, 425, 429, 500, 502, 503, 504)


class MissingFileError(DataError):
    """The server has no such file."""


class UnreachableError(DataError):
    """A file could not be read whole in all tries; the message ends with the last reason."""


class _FailedTryError(Exception):
    """The reason why one try failed."""


_TEMPORARY = (requests.RequestException, _FailedTryError)


class Fetcher:
    """Reads files. Several threads may use it; each has a connection of its own.

    ``timeout``: seconds without a byte after which a try has failed; one try takes at most twenty times that for a
    file read whole. ``retries``: further tries after the first.
    """

    def __init__(self, *, retries: int = 6, timeout: float = 30.0) -> None:
        self.retries, self.timeout = retries, timeout
        self._threads = threading.local()
        self._not_before = 0.0
        self._random = random.Random()
        self.stopped = threading.Event()
        """Set it to end all waits at once."""

    def read(self, url: str, *, verify: Callable[[bytes], str | None] = lambda data: None) -> bytes:
        """The whole file, with the length and the MD5 of its headers.

        ``verify`` returns what else is wrong with it, or None. Raises MissingFileError or UnreachableError.
        """

        def attempt() -> bytes:
            deadline = time.monotonic() + 20 * self.timeout
            parts = []
            with self._open(url) as response:
                for block in response.iter_content(_BLOCK):
                    parts.append(block)
                    if time.monotonic() > deadline:
                        raise _FailedTryError(f"not complete after {20 * self.timeout:g} seconds")
                data = b"".join(parts)
                reason = _flaw(data, response.headers) or verify(data)
            if reason:
                raise _FailedTryError(reason)
            return data

        return self._with_retries(url, attempt)

    def size(self, url: str) -> int | None:
        """Bytes of a file by its headers, without reading it; None if they do not give its length."""

        def attempt() -> int | None:
            with self._open(url, method="HEAD") as response:
                length = response.headers.get("Content-Length", "")
            return int(length) if length.isdigit() else None

        return self._with_retries(url, attempt)

    def lines(self, url: str, *, seen: Callable[[int], None] = lambda count: None) -> Iterator[bytes]:
        """Lines of a file of any length, while they are read; after an error the reading resumes where it stopped.

        ``seen`` gets the number of bytes of each block. A file of unknown length must end with the end of a line,
        because a file that was cut could not be recognised. Raises as :meth:`read`, and DataError for a file that
        changes.
        """
        position = _Position()
        blocks: Iterator[bytes] | None = None

        def next_block() -> bytes:
            nonlocal blocks
            blocks = blocks or self._blocks(url, position)
            try:
                return next(blocks, b"")
            except BaseException:
                blocks = None
                raise

        rest = b""
        while not position.complete:
            block = self._with_retries(url, next_block)
            seen(len(block))
            *whole, rest = (rest + block).split(b"\n")
            yield from (line.rstrip(b"\r") for line in whole)
        if rest:
            yield rest.rstrip(b"\r")

    def _blocks(self, url: str, position: _Position) -> Iterator[bytes]:
        """The rest of a file from an offset, which is moved forward."""
        asked = {"Range": f"bytes={position.offset}-"} if position.offset else {}
        with self._open(url, headers=asked) as response:
            mark = response.headers.get("ETag") or response.headers.get("Last-Modified")
            if position.mark not in (None, mark):
                raise DataError(f"{url}: the file must not change while it is read, but did; start the command again")
            position.mark = mark
            # A server that does not support ranges sends the whole file again.
            skip = position.offset if response.status_code == 200 else 0
            for block in response.iter_content(_BLOCK):
                fresh = block[skip:]
                skip -= min(skip, len(block))
                position.offset += len(fresh)
                if fresh:
                    position.ends_line = fresh.endswith(b"\n")
                    yield fresh
            total = _total(response.headers)
        if total is not None and position.offset < total:
            raise _FailedTryError(f"{position.offset:,} of {total:,} bytes were received")
        if total is None and not position.ends_line:
            raise _FailedTryError(
                f"{position.offset:,} bytes of an unknown number were received, which end within a line"
            )
        position.complete = True

    def _open(self, url: str, *, method: str = "GET", headers: Mapping[str, str] | None = None) -> requests.Response:
        self._sleep(self._not_before - time.monotonic())
        session: requests.Session | None = getattr(self._threads, "session", None)
        if session is None:
            session = self._threads.session = requests.Session()
            # A file that is compressed for the transfer would not have the length of its headers.
            session.headers.update({"User-Agent": "retinaflow", "Accept-Encoding": "identity"})
        response = session.request(method, url, headers=dict(headers or {}), timeout=self.timeout, stream=True)
        status = response.status_code
        if status in (200, 206):
            return response
        response.close()
        if status in _GONE:
            raise MissingFileError(f"{url}: the server has no such file (status {status})")
        if status in _BUSY:
            pause = _retry_after(response.headers.get("Retry-After"))
            self._not_before = max(self._not_before, time.monotonic() + pause)
            raise _FailedTryError(f"status {status}")
        raise UnreachableError(f"{url}: the server returned status {status}")

    def _with_retries(self, url: str, attempt: Callable[[], Result]) -> Result:
        try:
            return retry(
                attempt,
                waits=growing_waits(FIRST_WAIT, LONGEST_WAIT, count=self.retries, spread=self._random),
                may_pass=lambda error: isinstance(error, _TEMPORARY) and not self.stopped.is_set(),
                sleep=self._sleep,
            )
        except _TEMPORARY as error:
            reason = str(error) if isinstance(error, _FailedTryError) else type(error).__name__
            raise UnreachableError(f"{url}: not read in {self.retries + 1} tries; the last one: {reason}") from error

    def _sleep(self, seconds: float) -> None:
        if seconds > 0:
            self.stopped.wait(seconds)


class _Position:
    """How far a file has been read: bytes, the version of the file, and whether a line or the file ends there."""

    def __init__(self) -> None:
        self.offset = 0
        self.mark: str | None = None
        self.ends_line = False
        self.complete = False


def _total(headers: Mapping[str, str]) -> int | None:
    """Bytes of the whole file."""
    ranged = re.fullmatch(r"bytes \d+-\d+/(\d+)", headers.get("Content-Range", ""))
    if ranged:
        return int(ranged[1])
    length = headers.get("Content-Length", "")
    return int(length) if length.isdigit() else None


def _flaw(data: bytes, headers: Mapping[str, str]) -> str | None:
    """What the headers of a whole file contradict in it, or None."""
    total = _total(headers)
    if total is not None and len(data) != total:
        return f"{len(data):,} of {total:,} bytes were received"
    # The ETag of a file that was uploaded in one piece is its MD5; Google's storage has a header of its own for it.
    promised = {headers.get("ETag", "").strip('"').lower()}
    for word in headers.get("x-goog-hash", "").replace(" ", "").split(","):
        if word.startswith("md5="):
            promised.add(hex_of(word.removeprefix("md5=")))
    digests = {tag for tag in promised if re.fullmatch(r"[0-9a-f]{32}", tag)}
    if digests and hashlib.md5(data, usedforsecurity=False).hexdigest() not in digests:
        return "the MD5 is not that of the headers"
    return None


def hex_of(base64_md5: str) -> str:
    """An MD5 written in base64 as hex digits; empty when it is none."""
    try:
        return base64.b64decode(base64_md5, validate=True).hex()
    except (binascii.Error, ValueError):
        return ""


def _retry_after(value: str | None) -> float:
    """Seconds to wait by a Retry-After header: a number or a date."""
    if not value:
        return 0.0
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (TypeError, ValueError):
            return 0.0
    return min(max(seconds, 0.0), LONGEST_RETRY_AFTER)
