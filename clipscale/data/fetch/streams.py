"""Opening a shard's bytes by scheme: http(s), fsspec's (s3, gs, gcs, hf), and pipes.

    body = open_body("https://host/x-00.tar", start=0, version=None, stall_seconds=30.0)
    for block in body.blocks: ...

What goes wrong is sorted here, into what may pass (`TryAgain`) and what will not (`Refused`).
"""

from __future__ import annotations

import base64
import email.utils
import functools
import http.client
import os
import re
import signal
import ssl
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import quote, unquote, urlsplit

import fsspec

from clipscale import __version__
from clipscale.data.fetch.urls import FSSPEC, HTTP, scheme_of

_BLOCK_BYTES = 2**18
_RANGE_BYTES = 2**22  # of one request through fsspec: none of it is seen before all of it is there
_PASSING = (408, 425, 429)  # and 5xx: HTTP statuses that may change by themselves
_NEVER = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ValueError, ImportError)


class TryAgain(Exception):
    """It failed in a way that may pass."""

    def __init__(self, cause: str, after_seconds: float = 0.0) -> None:
        super().__init__(cause)
        self.after_seconds = after_seconds  # the server wants to be left alone for so long


class Refused(Exception):
    """It failed in a way that will not pass."""


@dataclass(frozen=True)
class Body:
    start: int  # where in the shard the first byte lies
    total_bytes: int | None  # of the whole shard
    version: str | None  # names this content; None: once cut, it cannot be resumed
    blocks: Iterator[bytes]
    cancel: Callable[[], None] = lambda: None  # from any thread; unblocks a waiting reader where that is possible


def open_body(url: str, start: int, version: str | None, stall_seconds: float) -> Body:
    """The shard's bytes from `start` on if it still is of this version, else from 0 or from `start` (see Body.start).

    Raises:
        TryAgain, Refused: here and while the blocks are read.
    """
    scheme = scheme_of(url)
    try:
        if scheme in HTTP:
            body = _open_http(url, start, version, stall_seconds)
        elif scheme in FSSPEC:
            body = _open_fsspec(url, start, version)
        else:
            assert scheme == "pipe", scheme
            body = _open_pipe(url)
    except Exception as error:
        raise _sorted_out(error) from error
    return Body(body.start, body.total_bytes, body.version, _judged(body.blocks), body.cancel)


def _judged(blocks: Iterator[bytes]) -> Iterator[bytes]:
    try:
        yield from blocks
    except Exception as error:
        raise _sorted_out(error) from error


def _sorted_out(error: Exception) -> TryAgain | Refused:
    """TryAgain or Refused, for any kind that the clients raise."""
    if isinstance(error, TryAgain | Refused):
        return error
    if isinstance(error, urllib.error.HTTPError):
        error.close()
        cause = f"HTTP {error.code} {error.reason}"
        if error.code in _PASSING or error.code >= 500:
            return TryAgain(cause, _retry_after_seconds(error.headers.get("Retry-After")))
        return Refused(cause)
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    cause = f"{type(reason).__name__}: {reason}" if isinstance(reason, Exception) else str(reason)
    never = isinstance(reason, (*_NEVER, ssl.SSLCertVerificationError, http.client.InvalidURL))
    return Refused(cause) if never else TryAgain(cause)


def _retry_after_seconds(value: str | None) -> float:
    """A Retry-After header: seconds, or a date."""
    if value is None:
        return 0.0
    if value.strip().isdigit():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0


# --- http, https ------------------------------------------------------------------------------------------------------


def _open_http(url: str, start: int, version: str | None, stall_seconds: float) -> Body:
    parts = urlsplit(url)
    user, _, host = parts.netloc.rpartition("@")
    place = parts._replace(netloc=host, fragment="").geturl()
    request = urllib.request.Request(
        quote(place, safe="%/:?&=~+!$,;'@()*[]"), headers={"User-Agent": f"clipscale/{__version__}"}
    )
    if user:  # not sent on to where the server redirects
        token = base64.b64encode(unquote(user).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {token}")
    if start:
        assert version is not None
        request.add_header("Range", f"bytes={start}-")
        request.add_header("If-Range", version)
    try:
        response = _http_opener().open(request, timeout=stall_seconds + 1)  # ends a thread that was given up
    except urllib.error.HTTPError as error:
        if start and error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return _open_http(url, 0, None, stall_seconds)
        raise
    return _http_body(response)


def _http_body(response: http.client.HTTPResponse) -> Body:
    headers, status = response.headers, response.status
    if status == http.HTTPStatus.PARTIAL_CONTENT:
        place = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", headers.get("Content-Range", ""))
        if place is None:
            raise TryAgain(f"a Content-Range that says nothing: {headers.get('Content-Range')!r}")
        start, total = int(place[1]), int(place[2])
    elif status == http.HTTPStatus.OK:
        start, total = 0, response.length  # None: chunked, or until the connection ends
    else:
        raise Refused(f"HTTP {status} {response.reason}")
    etag = headers.get("ETag", "W/")
    resumable = "bytes" in (headers.get("Accept-Ranges"), "bytes" if start else None) and not etag.startswith("W/")
    return Body(start, total, etag if resumable else None, _http_blocks(response))


def _http_blocks(response: http.client.HTTPResponse) -> Iterator[bytes]:
    with response:
        while block := response.read1(_BLOCK_BYTES):
            yield block


class _Redirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, request, answer, code, message, headers, url):
        if scheme_of(url) not in HTTP:  # urllib would follow to ftp:
            raise Refused(f"HTTP {code} to {url}, which is neither http: nor https:")
        return super().redirect_request(request, answer, code, message, headers, url)


@functools.cache
def _http_opener() -> urllib.request.OpenerDirector:
    """urllib's own opener for http and https only."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        _Redirects,
        urllib.request.HTTPErrorProcessor,
        urllib.request.UnknownHandler,
    ):
        opener.add_handler(handler())
    return opener


# --- s3, gs, gcs, hf: through fsspec ----------------------------------------------------------------------------------


def _open_fsspec(url: str, start: int, version: str | None) -> Body:
    """Credentials and endpoints are what the clients read from the environment and their own files."""
    files, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
    info = files.info(path)
    if info.get("type") == "directory":
        raise IsADirectoryError("a folder")
    now = repr(sorted((key, repr(value)) for key, value in info.items()))
    start = start if now == version else 0

    def blocks() -> Iterator[bytes]:
        with files.open(path, "rb", block_size=_RANGE_BYTES, cache_type="none") as file:
            file.seek(start)
            while block := file.read(_RANGE_BYTES):
                yield block

    return Body(start, info.get("size"), now, blocks())


# --- pipe -------------------------------------------------------------------------------------------------------------


def _open_pipe(url: str) -> Body:
    """The output of a shell command, in a session of its own, so that all of it can be ended."""
    errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed when the blocks end)
    process = subprocess.Popen(
        url.partition(":")[2],
        shell=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=errors,
        start_new_session=True,
    )

    def cancel() -> None:
        if process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def blocks() -> Iterator[bytes]:
        silent = True
        try:
            while block := process.stdout.read1(_BLOCK_BYTES):
                silent = False
                yield block
            status = process.wait()
            errors.seek(0)
            last = errors.read().decode(errors="replace").strip().rpartition("\n")[2]
        finally:
            cancel()
            process.stdout.close()
            process.wait()
            errors.close()
        if status or silent:
            cause = f"the command ended with status {status}" if status else "the command wrote nothing"
            kind = Refused if status in (126, 127) else TryAgain  # not to be run, not found
            raise kind(f"{cause}: {last}" if last else cause)

    return Body(0, None, None, blocks(), cancel)
