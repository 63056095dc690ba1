"""A web server on this machine, over the files of a folder, that fails as it is told.

with serve(folder) as server:
    server.faults["/00.tar"] = [Fault(status=503)] * 3               # one per request, afterwards all is well
    server.faults["/01.tar"] = repeat(Fault(send_bytes=500, then="stall"))
    ...                                                              # f"{server.url}/00.tar"
    assert server.requests["/00.tar"] == 4
"""

import email.utils
import hashlib
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal
from urllib.parse import unquote

BLOCK_BYTES = 1 << 16


@dataclass(frozen=True)
class Fault:
    """What is wrong with one answer."""

    status: int = 200  # another one comes without the file
    headers: dict[str, str] = field(default_factory=dict)  # in addition, or instead; '' leaves one out
    before: Literal["", "close", "stall"] = ""  # ... anything is said
    send_bytes: int | None = None  # of the body; then:
    then: Literal["close", "stall"] = "close"
    drip_seconds: float | None = None  # a byte of the body every so often; what is late is made up for
    chunked: bool = False  # no Content-Length
    body: bytes | None = None  # instead of the file


class Server(ThreadingHTTPServer):
    """`ranges`, `etags`, `if_range`, `dates`: what it can do (`dates`: Last-Modified).

    `log`: (path with query, headers) of each request in turn.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = Path(folder)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.faults: dict[str, Iterable[Fault]] = {}
        self.ranges = self.etags = self.if_range = True
        self.dates = False
        self.log: list[tuple[str, dict[str, str]]] = []
        self.ended = threading.Event()
        self._lock = threading.Lock()
        self._iterators: dict[str, tuple[Iterable[Fault], Iterator[Fault]]] = {}

    @property
    def requests(self) -> Counter[str]:
        """Requests by path."""
        return Counter(path.partition("?")[0] for path, _ in self.log)

    def next_fault(self, path: str) -> Fault:
        with self._lock:
            faults = self.faults.get(path, ())
            if path not in self._iterators or self._iterators[path][0] is not faults:
                self._iterators[path] = faults, iter(faults)
            return next(self._iterators[path][1], Fault())

    def handle_error(self, request, client_address) -> None:
        """A client that goes away in the middle is no error."""


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        server, path = self.server, self.path.partition("?")[0]
        server.log.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
        self.close_connection = True
        fault = server.next_fault(path)
        if fault.before == "stall":
            server.ended.wait(60)
        if fault.before:
            return
        file = server.folder / unquote(path).lstrip("/")
        if fault.status != 200 or not file.is_file():
            self._say(fault.status if fault.status != 200 else 404, {"Content-Length": "0"} | fault.headers)
            return
        data = file.read_bytes() if fault.body is None else fault.body
        headers = {"Content-Length": str(len(data)), "Connection": "close"}
        status, etag = 200, f'"{hashlib.md5(data).hexdigest()}"'
        if server.etags:
            headers["ETag"] = etag
            if self.headers.get("If-None-Match") == etag:
                self._say(304, {"ETag": etag})
                return
        if server.dates:
            headers["Last-Modified"] = email.utils.formatdate(file.stat().st_mtime, usegmt=True)
        if server.ranges:
            headers["Accept-Ranges"] = "bytes"
            span = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            if span and (not server.if_range or self.headers.get("If-Range", etag) == etag):
                start, total = int(span[1]), len(data)
                if start >= total:
                    self._say(416, {"Content-Length": "0", "Content-Range": f"bytes */{total}"})
                    return
                data, status = data[start:], 206
                headers |= {"Content-Length": str(len(data)), "Content-Range": f"bytes {start}-{total - 1}/{total}"}
        if fault.chunked:
            headers |= {"Content-Length": "", "Transfer-Encoding": "chunked"}
        self._say(status, headers | fault.headers)
        self._send(data, fault)

    def _say(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if value:
                self.send_header(name, value)
        self.end_headers()

    def _send(self, data: bytes, fault: Fault) -> None:
        part = data[: fault.send_bytes]
        step, begun = 1 if fault.drip_seconds else BLOCK_BYTES, time.monotonic()
        for place in range(0, len(part), step):
            block = part[place : place + step]
            self.wfile.write(b"%x\r\n%s\r\n" % (len(block), block) if fault.chunked else block)
            if fault.drip_seconds:
                due = begun + fault.drip_seconds * (place + 1)
                if self.server.ended.wait(max(0.0, due - time.monotonic())):
                    return
        whole = len(part) == len(data)
        if fault.chunked and whole:
            self.wfile.write(b"0\r\n\r\n")
        if fault.then == "stall" and not whole:
            self.server.ended.wait(60)

    def log_message(self, *_) -> None:
        pass


@contextmanager
def serve(folder: Path) -> Iterator[Server]:
    """The server, until the block ends; no proxy stands between."""
    before = os.environ.get("no_proxy")
    os.environ["no_proxy"] = "127.0.0.1"
    with Server(folder) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield server
        finally:
            server.ended.set()
            server.shutdown()
            if before is None:
                del os.environ["no_proxy"]
            else:
                os.environ["no_proxy"] = before
