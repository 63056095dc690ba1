"""http and https.

    body = open_body("https://host/x-00.tar", start=0, version=None, stall_seconds=30.0)     # see `streams.open_body`

Certificates are verified; proxies are those of the environment; redirects lead to http and https only. What the URL
says is asked for as it stands, escapes and dots included, for signatures and names of objects depend on every character
of it: urllib3 and what is built on it tidy it up, which is why the standard library's client is used.
"""

from __future__ import annotations

import base64
import email.message
import email.utils
import functools
import http.client
import re
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from urllib.parse import quote, unquote, urlsplit

from clipscale import __version__
from clipscale.data.fetch.streams import BLOCK_BYTES, Body, Refused, Seen, TryAgain
from clipscale.data.fetch.urls import scheme_of

_PASSING = (408, 425, 429)  # and 5xx: statuses that may change by themselves
_ETAGS = ("ETag", "Last-Modified")
_NEVER = (PermissionError, ssl.SSLCertVerificationError, http.client.InvalidURL)


def open_body(url: str, start: int, version: str | None, stall_seconds: float) -> Body:
    request = _request(url)
    if start:
        assert version is not None
        request.add_header("Range", f"bytes={start}-")
        request.add_header("If-Range", version)
    try:
        response = _answer(request, stall_seconds)
    except urllib.error.HTTPError as error:
        if start and error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return open_body(url, 0, None, stall_seconds)
        raise _refusal(error.code, error.reason, error.headers) from error
    return _body(response)


def look(url: str, etag: str | None, stall_seconds: float) -> Seen:
    """By a GET for anything but what is known, given up after the headers: signed URLs are often good for no HEAD."""
    request = _request(url)
    name, _, value = (etag or "").partition(": ")
    if name == "ETag":  # an older file would pass as not modified since
        request.add_header("If-None-Match", value)
    try:
        with _answer(request, stall_seconds) as response:
            return Seen(_etag(response.headers), response.length)
    except urllib.error.HTTPError as error:
        if error.code == http.HTTPStatus.NOT_MODIFIED:
            return Seen(etag)
        raise _refusal(error.code, error.reason, error.headers) from error


def _request(url: str) -> urllib.request.Request:
    parts = urlsplit(url)
    user, _, host = parts.netloc.rpartition("@")
    place = parts._replace(netloc=host, fragment="").geturl()
    request = urllib.request.Request(
        quote(place, safe="%/:?&=~+!$,;'@()*[]"), headers={"User-Agent": f"clipscale/{__version__}"}
    )
    if user:  # not sent on to where the server redirects
        token = base64.b64encode(unquote(user).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {token}")
    return request


def _answer(request: urllib.request.Request, stall_seconds: float) -> http.client.HTTPResponse:
    """Raises HTTPError, closed, for a status above 299."""
    try:
        return _opener().open(request, timeout=stall_seconds + 1)  # ends a thread that was given up
    except urllib.error.HTTPError as error:
        error.close()
        raise
    except (urllib.error.URLError, http.client.InvalidURL) as error:
        raise _failure(getattr(error, "reason", error)) from error


def _refusal(status: int, reason: str, headers: email.message.Message) -> TryAgain | Refused:
    """What an answer without the shard means."""
    cause = f"HTTP {status} {reason}"
    if status in _PASSING or status >= 500:
        return TryAgain(cause, _retry_after_seconds(headers.get("Retry-After")))
    return Refused(cause, missing=400 <= status < 500)


def _failure(reason: Exception | str) -> TryAgain | Refused:
    """What it means that no answer came."""
    cause = f"{type(reason).__name__}: {reason}" if isinstance(reason, Exception) else reason
    return Refused(cause) if isinstance(reason, _NEVER) else TryAgain(cause)


def _retry_after_seconds(value: str | None) -> float:
    """A Retry-After header: seconds, or a date."""
    if value is None:
        return 0.0
    if value.strip().isdecimal():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0


def _body(response: http.client.HTTPResponse) -> Body:
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
    said = f"HTTP {status} {response.reason}, {headers.get('Content-Type', 'no Content-Type')}"
    version = etag if resumable else None
    return Body(start, total, version, _blocks(response), etag=_etag(headers), said=said)


def _etag(headers: email.message.Message) -> str | None:
    return next((f"{name}: {headers[name]}" for name in _ETAGS if headers[name]), None)


def _blocks(response: http.client.HTTPResponse) -> Iterator[bytes]:
    with response:
        while block := response.read1(BLOCK_BYTES):
            yield block


class _Redirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, request, answer, code, message, headers, url):
        if scheme_of(url) not in ("http", "https"):  # urllib would follow to ftp:
            raise Refused(f"HTTP {code} to {url}, which is neither http: nor https:")
        return super().redirect_request(request, answer, code, message, headers, url)


@functools.cache
def _opener() -> urllib.request.OpenerDirector:
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
