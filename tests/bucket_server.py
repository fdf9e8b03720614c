"""A local stand-in for the buckets of Open Images that serves a small set, and misbehaves where it is told to."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Bucket:
    """``files``: path -> bytes. ``errors``: path -> what happens in its next requests, in turn, then all is well.

    A fault is ``"truncate"`` (half of the promised bytes), ``"stall"`` (half, then silence), ``"no length"`` (all, and
    none promised), ``"truncate, no length"``, ``"reset"`` (no answer), ``"wrong md5"``, or a status, with
    ``Retry-After`` if a pair of status and text.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.errors: dict[str, list[Any]] = {}
        self.asked: Counter[str] = Counter()
        """GET requests by path."""
        self.ranges: list[str] = []
        self.at_once = self.most_at_once = 0
        self.times: list[float] = []
        self.lock = threading.Lock()
        self.silence = 1.0
        self.url = ""


@contextmanager
def serving() -> Iterator[Bucket]:
    """A bucket at ``bucket.url``, until the block ends."""
    bucket = Bucket()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            """Nothing."""

        def do_HEAD(self) -> None:
            data = bucket.files.get(self.path.lstrip("/"))
            self._head(404 if data is None else 200, b"" if data is None else data)

        def do_GET(self) -> None:
            with bucket.lock:
                bucket.at_once += 1
                bucket.most_at_once = max(bucket.most_at_once, bucket.at_once)
                bucket.asked[self.path.lstrip("/")] += 1
                bucket.times.append(time.monotonic())
            try:
                self._answer(self.path.lstrip("/"))
            finally:
                with bucket.lock:
                    bucket.at_once -= 1

        def _answer(self, path: str) -> None:
            data, errors = bucket.files.get(path), bucket.errors.get(path)
            with bucket.lock:
                fault = errors.pop(0) if errors else None
            if data is None:
                self._head(404, b"")
                return
            if fault == "reset":
                self.close_connection = True
                self.connection.close()
                return
            if isinstance(fault, int | tuple):
                status, after = fault if isinstance(fault, tuple) else (fault, "")
                self._head(status, b"", {"Retry-After": after} if after else {})
                return
            asked = self.headers.get("Range", "")
            first = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
            if asked:
                bucket.ranges.append(asked)
            more: dict[str, str | None]
            more = {"Content-Range": f"bytes {first}-{len(data) - 1}/{len(data)}"} if first else {}
            tag = "0" * 32 if fault == "wrong md5" else hashlib.md5(data).hexdigest()
            if str(fault).endswith("no length"):
                more["Content-Length"] = None
                self.close_connection = True
            self._head(206 if first else 200, data[first:], {**more, "ETag": f'"{tag}"'})
            if fault in ("truncate", "stall", "truncate, no length"):
                self.wfile.write(data[first : first + (len(data) - first) // 2])
                self.wfile.flush()
                self.close_connection = True
                if fault == "stall":
                    time.sleep(bucket.silence)
                return
            self.wfile.write(data[first:])

        def _head(self, status: int, body: bytes, more: Mapping[str, str | None] | None = None) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **(more or {})}.items():
                if value is not None:
                    self.send_header(name, value)
            self.end_headers()

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: Any) -> None:
            """Nothing: connections are broken on purpose."""

    server = Server(("127.0.0.1", 0), Handler)
    bucket.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield bucket
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
