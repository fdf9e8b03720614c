"""Reading over HTTP that is polite and patient: bounded connections, waits that double, and checked lengths.

An answer of 429 or 5xx, a broken or stalled connection, and a body that is not what its headers promise are tried
again after a random wait that doubles each time; ``Retry-After`` is kept to by all connections. 403, 404 and 410 mean
that there is no such file. HTTP itself is left to requests.
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

Result = TypeVar("Result")
FIRST_WAIT = 1.0
"""Seconds, of which the first wait is half to all."""
LONGEST_WAIT = 60.0
LONGEST_RETRY_AFTER = 600.0
_BLOCK = 1 << 20
_GONE = (403, 404, 410)
_BUSY = (408, 425, 429, 500, 502, 503, 504)


class MissingFileError(OSError):
    """The server has no such file."""


class UnreachableError(OSError):
    """A file could not be read whole, however often it was tried; the message ends with the last reason."""


class _TryAgainError(Exception):
    """One try failed, for this reason."""


class Fetcher:
    """Reads files; safe to use from several threads, each of which has a connection of its own.

    ``timeout``: seconds without a byte after which a try has failed; one try takes at most twenty times that for a
    file read whole. ``retries``: further tries after the first.
    """

    def __init__(self, *, retries: int = 6, timeout: float = 30.0) -> None:
        self.retries, self.timeout = retries, timeout
        self._threads = threading.local()
        self._not_before = 0.0
        self._waits = random.Random()
        self.stopped = threading.Event()
        """Set to end all waiting at once."""

    def read(self, url: str, *, verify: Callable[[bytes], str | None] = lambda data: None) -> bytes:
        """The whole file, as long as its headers say and with the MD5 that they give.

        ``verify`` says what else is wrong with it, or None. Raises MissingFileError or UnreachableError.
        """

        def attempt() -> bytes:
            deadline = time.monotonic() + 20 * self.timeout
            parts = []
            with self._open(url) as response:
                for block in response.iter_content(_BLOCK):
                    parts.append(block)
                    if time.monotonic() > deadline:
                        raise _TryAgainError(f"not complete after {20 * self.timeout:g} seconds")
                data = b"".join(parts)
                reason = _flaw(data, response.headers) or verify(data)
            if reason:
                raise _TryAgainError(reason)
            return data

        return self._patiently(url, attempt)

    def size(self, url: str) -> int | None:
        """Bytes of a file as its headers say, without reading it; None where they do not."""

        def attempt() -> int | None:
            with self._open(url, method="HEAD") as response:
                length = response.headers.get("Content-Length", "")
            return int(length) if length.isdigit() else None

        return self._patiently(url, attempt)

    def lines(self, url: str, *, seen: Callable[[int], None] = lambda count: None) -> Iterator[bytes]:
        """Lines of a file of any length, read while they come and never kept; a broken reading goes on where it broke.

        ``seen`` is told how many bytes have come. A file of unknown length must end with the end of a line, as one that
        was cut could not be told. Raises as :meth:`read`, and ValueError when the file was changed.
        """
        place = _Place()
        rest, failures = b"", 0
        while not place.complete:
            try:
                for block in self._blocks(url, place):
                    failures = 0
                    seen(len(block))
                    *whole, rest = (rest + block).split(b"\n")
                    yield from (line.rstrip(b"\r") for line in whole)
            except (requests.RequestException, _TryAgainError) as error:
                failures += 1
                self._wait(url, failures, error)
        if rest:
            yield rest.rstrip(b"\r")

    def _blocks(self, url: str, place: _Place) -> Iterator[bytes]:
        """What is left of a file from a place on, which moves along."""
        asked = {"Range": f"bytes={place.offset}-"} if place.offset else {}
        with self._open(url, headers=asked) as response:
            mark = response.headers.get("ETag") or response.headers.get("Last-Modified")
            if place.mark not in (None, mark):
                raise ValueError(f"{url}: the file must not change while it is read, but did; start again")
            place.mark = mark
            # A server that knows no ranges sends everything again.
            skip = place.offset if response.status_code == 200 else 0
            for block in response.iter_content(_BLOCK):
                fresh = block[skip:]
                skip -= min(skip, len(block))
                place.offset += len(fresh)
                if fresh:
                    place.ends_line = fresh.endswith(b"\n")
                    yield fresh
            total = _total(response.headers)
        if total is not None and place.offset < total:
            raise _TryAgainError(f"{place.offset:,} of {total:,} bytes came")
        if total is None and not place.ends_line:
            raise _TryAgainError(f"{place.offset:,} bytes of an unknown number came, the last of them in mid-line")
        place.complete = True

    def _open(self, url: str, *, method: str = "GET", headers: Mapping[str, str] | None = None) -> requests.Response:
        self._sleep(self._not_before - time.monotonic())
        session: requests.Session | None = getattr(self._threads, "session", None)
        if session is None:
            session = self._threads.session = requests.Session()
            # Compressed on the way, a file would not have the length that its headers say.
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
            raise _TryAgainError(f"status {status}")
        raise UnreachableError(f"{url}: the server answers with status {status}")

    def _patiently(self, url: str, attempt: Callable[[], Result]) -> Result:
        failures = 0
        while True:
            try:
                return attempt()
            except (requests.RequestException, _TryAgainError) as error:
                failures += 1
                self._wait(url, failures, error)

    def _wait(self, url: str, failures: int, error: Exception) -> None:
        if failures > self.retries or self.stopped.is_set():
            reason = str(error) if isinstance(error, _TryAgainError) else type(error).__name__
            raise UnreachableError(f"{url}: not read in {failures} tries; the last one: {reason}") from error
        longest = min(FIRST_WAIT * 2 ** (failures - 1), LONGEST_WAIT)
        # Random, so that connections that failed together do not come back together.
        self._sleep(longest * self._waits.uniform(0.5, 1))

    def _sleep(self, seconds: float) -> None:
        if seconds > 0:
            self.stopped.wait(seconds)


class _Place:
    """How far a file has been read: bytes, the version they are of, whether a line ends there, and whether all does."""

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
    """What the headers of a whole file say against it."""
    total = _total(headers)
    if total is not None and len(data) != total:
        return f"{len(data):,} of {total:,} bytes came"
    # The tag is the MD5 where a file was uploaded in one piece; Google's storage has a header for it.
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
    """Seconds that a server asks to wait, from a number or a date."""
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
