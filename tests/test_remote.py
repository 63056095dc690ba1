import base64
import email.utils
import hashlib
import importlib
import inspect
import os
import pickle
import socket
import ssl
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from itertools import repeat
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry
from http_server import Fault, serve
from processes import wait_until

from clipscale.config.data import Fetch
from clipscale.data.fetch import open_fsspec, open_http
from clipscale.data.fetch.download import Expected, FetchError, Stopped, download
from clipscale.data.fetch.streams import Refused, Seen, TryAgain, look, open_body
from clipscale.data.fetch.urls import OPENERS

DATA = bytes(hashlib.shake_256(b"shard").digest(300_000))
FAST = Fetch(stall_seconds=1.0, retries=4, backoff_seconds=0.01)
STALL = Fetch(stall_seconds=0.4, retries=1, backoff_seconds=0.01)


class Memory:
    """A part that is kept in memory."""

    def __init__(self) -> None:
        self.data, self.reserved = bytearray(), []

    @property
    def written_bytes(self) -> int:
        return len(self.data)

    def restart(self) -> None:
        self.data.clear()

    def reserve(self, total_bytes: int) -> None:
        self.reserved.append(total_bytes)

    def write(self, block: bytes) -> None:
        self.data += block

    def facts(self) -> dict:
        return {
            "bytes": len(self.data),
            "crc32": zlib.crc32(self.data),
            "sha256": hashlib.sha256(self.data).hexdigest(),
        }

    def look_over(self, check: Callable[[bytes, bool], str], vouched: bool) -> str:
        return check(bytes(self.data), vouched)


@pytest.fixture
def server(tmp_path):
    (tmp_path / "00.tar").write_bytes(DATA)
    with serve(tmp_path) as running:
        yield running


def fetched(url: str, fetch: Fetch = FAST, expect: Expected | None = None) -> bytes:
    part = Memory()
    download(url, part, fetch, expect=expect)
    return bytes(part.data)


def failure(url: str, fetch: Fetch = FAST, expect: Expected | None = None) -> FetchError:
    with pytest.raises(FetchError) as error:
        fetched(url, fetch, expect)
    assert "\n" not in str(error.value)
    return error.value


def refused(url: str, fetch: Fetch = FAST, expect: Expected | None = None) -> str:
    return str(failure(url, fetch, expect))


@pytest.mark.parametrize("scheme", OPENERS)
def test_every_scheme_has_its_opener(scheme):
    module = importlib.import_module(f"clipscale.data.fetch.open_{OPENERS[scheme].kind}")
    assert inspect.signature(module.open_body) == inspect.signature(open_body)
    assert inspect.signature(module.look) == inspect.signature(look)


# --- http -------------------------------------------------------------------------------------------------------------


def test_a_shard_is_fetched_by_one_plain_request(server):
    part = Memory()
    download(f"{server.url}/00.tar", part, FAST)
    assert bytes(part.data) == DATA
    assert part.reserved == [len(DATA)]
    assert server.requests == {"/00.tar": 1}
    assert "range" not in server.log[0][1]
    assert server.log[0][1]["accept-encoding"] == "identity"


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 451])
def test_a_refusal_is_final(server, status):
    server.faults["/00.tar"] = repeat(Fault(status=status))
    message = refused(f"{server.url}/00.tar")
    assert message.startswith(f"{server.url}/00.tar: HTTP {status} ")
    assert message.endswith("(1 attempt)")
    assert server.requests["/00.tar"] == 1


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_what_may_pass_is_tried_again(server, status):
    server.faults["/00.tar"] = [Fault(status=status)] * 3
    assert fetched(f"{server.url}/00.tar") == DATA
    assert server.requests["/00.tar"] == 4


@pytest.mark.parametrize(
    ("missing", "status"),
    [*((True, status) for status in (400, 401, 403, 404, 410)), *((False, s) for s in (302, 408, 425, 429, 500, 503))],
)
def test_what_the_server_says_is_missing(server, missing, status):
    """By what happened, not by words: those of the URL are in the message too."""
    path = "/Permission-FileNotFound-HTTP 404/00.tar"
    server.faults[path.replace(" ", "%20")] = repeat(Fault(status=status))
    assert failure(server.url + path, Fetch(retries=0)).missing == missing


def test_no_answer_is_not_missing(server):
    server.faults["/00.tar"] = repeat(Fault(before="close"))
    assert not failure(f"{server.url}/00.tar", Fetch(retries=0)).missing
    server.faults["/00.tar"] = ()
    assert not failure(f"{server.url}/00.tar", FAST, Expected(crc32=1)).missing


def test_the_budget_ends(server):
    server.faults["/00.tar"] = repeat(Fault(status=503))
    assert refused(f"{server.url}/00.tar").endswith("HTTP 503 Service Unavailable (5 attempts)")
    assert server.requests["/00.tar"] == 5  # retries=4
    assert refused(f"{server.url}/00.tar", Fetch(retries=0)).endswith("(1 attempt)")


def test_pauses_double(server, monkeypatch):
    server.faults["/00.tar"] = repeat(Fault(status=503))
    stop, pauses = threading.Event(), []
    monkeypatch.setattr(stop, "wait", lambda seconds: pauses.append(seconds))
    with pytest.raises(FetchError):
        download(f"{server.url}/00.tar", Memory(), Fetch(retries=9, backoff_seconds=1.0), stop=stop)
    for pause, whole in zip(pauses, (1, 2, 4, 8, 16, 32, 60, 60, 60), strict=True):
        assert 0.75 * whole <= pause <= whole


@pytest.mark.parametrize(
    ("value", "least", "most"),
    [
        ("1", 1, 1),
        ("7", 7, 7),
        ("1000000", 300, 300),  # bounded
        ("soon", 0, 0.01),
        (email.utils.formatdate(time.time() + 3600, usegmt=True), 300, 300),
        (email.utils.formatdate(time.time() - 3600, usegmt=True), 0, 0.01),
    ],
    ids=["1", "7", "bounded", "no date", "in an hour", "an hour ago"],
)
def test_retry_after(server, monkeypatch, value, least, most):
    server.faults["/00.tar"] = [Fault(status=429, headers={"Retry-After": value})]
    stop, pauses = threading.Event(), []
    monkeypatch.setattr(stop, "wait", lambda seconds: pauses.append(seconds))
    download(f"{server.url}/00.tar", part := Memory(), FAST, stop=stop)
    assert part.data == DATA
    assert len(pauses) == 1
    assert least <= pauses[0] <= most


def test_a_cut_body_is_resumed_where_it_was_cut(server):
    server.faults["/00.tar"] = [Fault(send_bytes=100_000), Fault(send_bytes=150_000)]
    assert fetched(f"{server.url}/00.tar") == DATA
    assert [headers.get("range") for _, headers in server.log] == [None, "bytes=100000-", "bytes=250000-"]
    assert server.log[1][1]["if-range"].startswith('"')


@pytest.mark.parametrize("lacks", ["ranges", "etags", "weak"])
def test_a_cut_body_begins_again_where_it_cannot_be_resumed(server, lacks):
    headers = {"ETag": 'W/"1"'} if lacks == "weak" else {}
    if lacks != "weak":
        setattr(server, lacks, False)
    server.faults["/00.tar"] = [Fault(send_bytes=100_000, headers=headers)] * 2 + [Fault(headers=headers)]
    assert fetched(f"{server.url}/00.tar") == DATA
    assert [headers.get("range") for _, headers in server.log] == [None] * 3


def test_a_server_that_forgets_ranges_meanwhile(server):
    def faults():
        yield Fault(send_bytes=100_000)
        server.ranges = False
        yield Fault()

    server.faults["/00.tar"] = faults()
    assert fetched(f"{server.url}/00.tar") == DATA
    assert server.log[1][1]["range"] == "bytes=100000-"  # answered with the whole


def cut_and_changed(path: Path, new: bytes) -> Iterator[Fault]:
    """The first answer is cut; before the second the file becomes another one."""
    yield Fault(send_bytes=100_000)
    path.write_bytes(new)
    yield Fault()


def test_a_shard_that_changes_meanwhile_is_the_new_one(server, tmp_path):
    new = DATA[::-1][:-7]
    server.faults["/00.tar"] = cut_and_changed(tmp_path / "00.tar", new)
    assert fetched(f"{server.url}/00.tar") == new
    assert [headers.get("range") for _, headers in server.log] == [None, "bytes=100000-"]


def test_a_server_that_resumes_another_version_is_noticed(server, tmp_path):
    """One that does not heed If-Range."""
    new = DATA[::-1]
    server.if_range = False
    server.faults["/00.tar"] = cut_and_changed(tmp_path / "00.tar", new)
    assert fetched(f"{server.url}/00.tar") == new
    assert [headers.get("range") for _, headers in server.log] == [None, "bytes=100000-", None]


def test_cut_for_good(server):
    server.faults["/00.tar"] = repeat(Fault(send_bytes=1000))
    server.ranges = False
    assert "the body ended at byte 1000 of 300000 (5 attempts)" in refused(f"{server.url}/00.tar")


@pytest.mark.parametrize("length", [300_001, 10**12])
def test_a_content_length_that_is_too_long(server, length):
    server.faults["/00.tar"] = repeat(Fault(headers={"Content-Length": str(length)}))
    server.ranges = False
    assert f"the body ended at byte 300000 of {length} (5 attempts)" in refused(f"{server.url}/00.tar")


def test_a_content_length_that_is_too_short_is_caught_by_what_is_expected(server):
    server.faults["/00.tar"] = repeat(Fault(headers={"Content-Length": "299999"}))
    message = refused(f"{server.url}/00.tar", expect=Expected(bytes=300_000))
    assert "its bytes is 299999, 300000 was expected" in message
    assert server.requests["/00.tar"] == 2


def test_chunked_bodies(server):
    server.faults["/00.tar"] = [Fault(chunked=True, send_bytes=100_000), Fault(chunked=True)]
    assert fetched(f"{server.url}/00.tar") == DATA
    server.faults["/00.tar"] = repeat(Fault(chunked=True, send_bytes=1000))
    server.ranges = False
    assert "IncompleteRead" in refused(f"{server.url}/00.tar")


def test_connections_that_are_closed_or_refused(server):
    server.faults["/00.tar"] = [Fault(before="close")] * 2
    assert fetched(f"{server.url}/00.tar") == DATA
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        assert "ConnectionRefusedError" in refused(f"http://127.0.0.1:{unused.getsockname()[1]}/x.tar")


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        (Fault(before="stall"), "stalled: no answer for 0.4 s (2 attempts)"),
        (Fault(send_bytes=150_000, then="stall"), "stalled: no byte for 0.4 s at byte 150000 of 300000 (2 attempts)"),
        (Fault(drip_seconds=0.02), "s at byte"),
    ],
)
def test_stalls_end(server, fault, cause):
    server.ranges = False
    server.faults["/00.tar"] = repeat(fault)
    start = time.monotonic()
    message = refused(f"{server.url}/00.tar", STALL)
    assert 0.8 <= time.monotonic() - start < 20
    assert "stalled: " in message
    assert cause in message
    assert server.requests["/00.tar"] == 2


def test_a_stall_is_resumed(server):
    server.faults["/00.tar"] = [Fault(send_bytes=200_000, then="stall")]
    assert fetched(f"{server.url}/00.tar", STALL) == DATA
    assert server.log[1][1]["range"] == "bytes=200000-"


def test_headers_that_drip_are_a_stall(tmp_path):
    """A byte now and then never times a socket out."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        ended = threading.Event()

        def drip() -> None:
            peer, _ = listener.accept()
            with peer:
                for byte in b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 50:
                    if ended.wait(0.1):
                        return
                    peer.send(bytes([byte]))

        thread = threading.Thread(target=drip, daemon=True)
        thread.start()
        start = time.monotonic()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/x.tar"
        assert "no answer for 0.4 s" in refused(url, Fetch(stall_seconds=0.4, retries=0))
        assert not ended.is_set()
        assert time.monotonic() - start < 9  # the whole header takes 11
        ended.set()
        thread.join(5)


def test_a_slow_server_above_the_floor_is_no_stall(server, tmp_path):
    (tmp_path / "slow.tar").write_bytes(DATA[:4000])
    server.faults["/slow.tar"] = [Fault(drip_seconds=0.0005)]
    start = time.monotonic()
    assert fetched(f"{server.url}/slow.tar", Fetch(stall_seconds=1.5, retries=0)) == DATA[:4000]
    assert time.monotonic() - start > 1.5


def test_a_slow_disk_is_no_stall(server):
    class Slow(Memory):
        def write(self, block: bytes) -> None:
            time.sleep(0.3)
            super().write(block)

    part = Slow()
    download(f"{server.url}/00.tar", part, Fetch(stall_seconds=0.2, retries=0))
    assert part.data == DATA


@pytest.mark.parametrize(
    "expect",
    [
        Expected(),
        Expected(bytes=300_000),
        Expected(crc32=zlib.crc32(DATA)),
        Expected(sha256=hashlib.sha256(DATA).hexdigest()),
        Expected(300_000, zlib.crc32(DATA), hashlib.sha256(DATA).hexdigest()),
    ],
)
def test_what_is_expected(server, expect):
    server.faults["/00.tar"] = [Fault(send_bytes=123_457)]
    assert fetched(f"{server.url}/00.tar", expect=expect) == DATA


@pytest.mark.parametrize(
    ("expect", "found"),
    [
        (Expected(bytes=299_999), "its bytes is 300000, 299999 was expected"),
        (Expected(crc32=1), f"its crc32 is {zlib.crc32(DATA)}, 1 was expected"),
        (Expected(sha256="00"), f"its sha256 is {hashlib.sha256(DATA).hexdigest()}, 00 was expected"),
    ],
)
def test_a_mismatch_is_tried_twice_and_told(server, expect, found):
    for fetch in (FAST, Fetch(retries=0, backoff_seconds=0.01)):
        server.log.clear()
        message = refused(f"{server.url}/00.tar", fetch, expect)
        assert message == f"{server.url}/00.tar: {found}: the shard or its index changed (2 attempts)"
        assert server.requests["/00.tar"] == 2


def test_a_mismatch_that_passes(server, tmp_path):
    def faults():
        (tmp_path / "00.tar").write_bytes(DATA[::-1])
        yield Fault()
        (tmp_path / "00.tar").write_bytes(DATA)

    server.faults["/00.tar"] = faults()
    assert fetched(f"{server.url}/00.tar", expect=Expected(crc32=zlib.crc32(DATA))) == DATA


def page(data: bytes, vouched: bool) -> str:
    """The check of these tests: what begins with '<' is an error page, and what is short and unvouched was cut."""
    if data.startswith(b"<"):
        return "a page"
    return "" if vouched or len(data) == len(DATA) else "cut"


@pytest.mark.parametrize(
    "faults",
    [
        [Fault(body=b"<html>")],
        [Fault(body=b"<html>", chunked=True)],
        [Fault(send_bytes=100_000, headers={"Content-Length": ""})],
        [Fault(body=DATA[:100_000], chunked=True)],
        [Fault(body=b"<html>"), Fault(status=503), Fault(send_bytes=9, headers={"Content-Length": ""})],
    ],
    ids=["page", "chunked page", "cut without a length", "cut where it came from", "one after the other"],
)
def test_what_is_no_shard_is_tried_again(server, faults):
    server.faults["/00.tar"] = faults
    part = Memory()
    said = download(f"{server.url}/00.tar", part, FAST, check=page)
    assert part.data == DATA
    assert said == {"etag": f'ETag: "{hashlib.md5(DATA).hexdigest()}"', "vouched": True}
    assert server.requests["/00.tar"] == len(faults) + 1
    assert not any("range" in headers for _, headers in server.log)  # nothing of it is gone on with


def test_what_is_no_shard_is_told_with_what_came(server):
    server.faults["/00.tar"] = repeat(Fault(body=b"<html>", headers={"Content-Type": "text/html"}))
    with pytest.raises(FetchError) as error:
        download(f"{server.url}/00.tar", Memory(), FAST, check=page)
    assert str(error.value) == (
        f"{server.url}/00.tar: a page (HTTP 200 OK, text/html); it may be another time: try again (5 attempts)"
    )
    assert not error.value.missing


def test_what_has_the_expected_hash_is_not_checked(server):
    server.faults["/00.tar"] = [Fault(body=b"<html>")]
    part = Memory()
    download(f"{server.url}/00.tar", part, FAST, expect=Expected(crc32=zlib.crc32(b"<html>")), check=page)
    assert part.data == b"<html>"


# --- looks ------------------------------------------------------------------------------------------------------------


def test_a_look_takes_no_bytes(server):
    url, etag = f"{server.url}/00.tar", f'ETag: "{hashlib.md5(DATA).hexdigest()}"'
    assert look(url, None, 5.0) == Seen(etag, len(DATA))
    assert look(url, etag, 5.0) == Seen(etag)  # not modified
    assert look(url, 'ETag: "other"', 5.0) == Seen(etag, len(DATA))
    server.etags = False
    assert look(url, etag, 5.0) == Seen(None, len(DATA))
    server.dates = True
    assert look(url, None, 5.0).etag.startswith("Last-Modified: ")
    server.faults["/00.tar"] = [
        Fault(chunked=True, headers={"Last-Modified": ""}),
        Fault(status=404),
        Fault(status=503),
    ]
    assert look(url, None, 5.0) == Seen()
    for kind in (Refused, TryAgain):
        with pytest.raises(kind, match="HTTP "):
            look(url, None, 5.0)


@pytest.mark.parametrize(
    ("etag", "size", "differs"),
    [("a", 5, False), ("b", 5, True), ("a", 6, True), (None, 5, False), (None, 6, True), ("b", None, True)],
)
def test_what_differs(etag, size, differs):
    assert Seen("a", 5).differs(etag, size) == differs
    assert not Seen().differs(etag, size)  # who says nothing says nothing new


# --- redirects, credentials, certificates -----------------------------------------------------------------------------


def test_redirects_are_followed_and_resumed(server):
    server.faults["/old.tar"] = repeat(Fault(status=302, headers={"Location": "/00.tar"}))
    server.faults["/00.tar"] = [Fault(send_bytes=100_000)]
    assert fetched(f"{server.url}/old.tar") == DATA
    assert server.log[-1][1]["range"] == "bytes=100000-"


@pytest.mark.parametrize("place", ["file:///etc/hostname", "ftp://127.0.0.1/x", "/loop.tar", "pipe:touch ran"])
def test_redirects_to_other_schemes_and_in_circles_are_refused(server, place, tmp_path):
    server.faults["/loop.tar"] = repeat(Fault(status=302, headers={"Location": place}))
    message = refused(f"{server.url}/loop.tar")
    assert "HTTP 302" in message
    assert message.endswith("(1 attempt)")
    assert not (tmp_path / "ran").exists()


def test_user_and_password_go_to_the_host_and_nowhere_else(server, tmp_path):
    with serve(tmp_path) as other:
        server.faults["/00.tar"] = [Fault(status=302, headers={"Location": f"{other.url}/00.tar"})]
        url = server.url.replace("http://", "http://me:p%40ss@") + "/00.tar"
        assert fetched(url) == DATA
        assert server.log[0][1]["authorization"] == "Basic " + base64.b64encode(b"me:p@ss").decode()
        assert "authorization" not in other.log[0][1]
        server.faults["/00.tar"] = [Fault(status=401)]
        message = refused(url)
        assert message.startswith("http://***@127.0.0.1")
        assert "p%40ss" not in message


def test_queries_are_sent_and_not_shown(server):
    server.faults["/00.tar"] = [Fault(), Fault(status=403)]
    url = f"{server.url}/00.tar?X-Signature=s3cr3t&part=1"
    assert fetched(url) == DATA
    assert server.log[0][0] == "/00.tar?X-Signature=s3cr3t&part=1"
    message = refused(url)
    assert "X-Signature=***" in message
    assert "s3cr3t" not in message


def test_names_with_blanks_and_letters_beyond_ascii(server, tmp_path):
    (tmp_path / "ein tär.tar").write_bytes(DATA)
    assert fetched(f"{server.url}/ein tär.tar") == DATA
    assert fetched(f"{server.url}/ein%20t%C3%A4r.tar") == DATA
    assert {path for path, _ in server.log} == {"/ein%20t%C3%A4r.tar"}


@pytest.mark.parametrize(
    "path",
    ["/a%2fb.tar?Signature=ab%2fc~d%3D&Key=", "/a/../b/./c.tar", "/a//b.tar", "/[1]+(2)@=&,;!$'*.tar", "/50%.tar"],
)
def test_what_the_url_says_is_asked_for_as_it_stands(server, path):
    """A signature can be of every character, and in a bucket `..` and `%2f` are names like others."""
    failure(server.url + path)
    assert [asked for asked, _ in server.log] == [path]


def test_a_body_is_kept_as_it_comes(server):
    """`Content-Encoding` says what the file is, as servers say it of x.tar.gz: nothing is unpacked here."""
    server.faults["/00.tar"] = [Fault(headers={"Content-Encoding": "gzip"})]
    assert fetched(f"{server.url}/00.tar") == DATA


def test_proxies_of_the_environment(server, tmp_path, monkeypatch):
    monkeypatch.setattr(open_http, "_opener", open_http._opener.__wrapped__)  # it reads the environment once
    monkeypatch.setenv("http_proxy", server.url.replace("//", "//me:p%40ss@"))
    monkeypatch.setenv("https_proxy", server.url)
    (tmp_path / "http:/shards.invalid").mkdir(parents=True)
    (tmp_path / "http:/shards.invalid/00.tar").write_bytes(DATA)
    assert fetched("http://shards.invalid/00.tar") == DATA
    assert server.log[0][0] == "http://shards.invalid/00.tar"
    assert server.log[0][1]["proxy-authorization"] == "Basic " + base64.b64encode(b"me:p@ss").decode()
    assert fetched(f"{server.url}/00.tar") == DATA  # no_proxy names its host
    assert server.log[1][0] == "/00.tar"
    assert "Unsupported method ('CONNECT')" in refused("https://shards.invalid/00.tar", Fetch(retries=0))


@pytest.mark.needs("openssl")
def test_an_untrusted_certificate_is_final(tmp_path):
    pem = tmp_path / "pem"
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    subprocess.run([*make, "-keyout", pem, "-out", tmp_path / "cert"], check=True, capture_output=True, timeout=300)
    with serve(tmp_path) as server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tmp_path / "cert", pem)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        message = refused(server.url.replace("http://", "https://") + "/00.tar")
    assert "SSLCertVerificationError" in message
    assert message.endswith("(1 attempt)")


# --- fsspec -----------------------------------------------------------------------------------------------------------


class Bucket(MemoryFileSystem):
    """An object store in memory. `plan`: what goes wrong, by read; `reads`: the places read from."""

    store, pseudo_dirs, protocol = {}, [""], ("s3",)
    plan, reads = [], []

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + path.removeprefix("s3://").strip("/")

    def _open(self, path, mode="rb", **options):
        assert options.get("cache_type") == "none" or mode != "rb"
        file = super()._open(path, mode, **options)
        return Reads(self, file) if mode == "rb" else file


class Reads:
    def __init__(self, files, file):
        self.files, self.file, self.place = files, file, 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def seek(self, place):
        self.place = place

    def read(self, size):
        self.files.reads.append(self.place)
        if self.files.plan:
            self.files.plan.pop(0)()
        self.file.seek(self.place)
        data = self.file.read(size)
        self.place += len(data)
        return data


@pytest.fixture
def bucket(monkeypatch):
    fsspec.register_implementation("s3", Bucket, clobber=True)
    monkeypatch.setattr(open_fsspec, "_RANGE_BYTES", 100_000)
    files = fsspec.filesystem("s3")
    Bucket.plan, Bucket.reads = [], []
    files.pipe("/bucket/00.tar", DATA)
    yield files
    Bucket.store.clear()
    _registry.pop("s3", None)


def fail(error):
    def act():
        raise error

    return act


def test_an_object_is_fetched_by_ranges(bucket):
    assert fetched("s3://bucket/00.tar", expect=Expected(bytes=300_000)) == DATA
    assert bucket.reads == [0, 100_000, 200_000, 300_000]


def test_a_failed_read_is_resumed(bucket):
    Bucket.plan = [lambda: None, fail(OSError("connection reset")), fail(RuntimeError("of the client's own kind"))]
    assert fetched("s3://bucket/00.tar") == DATA
    assert bucket.reads == [0, 100_000, 100_000, 100_000, 200_000, 300_000]


def test_an_object_that_changes_meanwhile_begins_again(bucket):
    def change():
        bucket.pipe("/bucket/00.tar", DATA[::-1])
        raise OSError("connection reset")

    Bucket.plan = [lambda: None, change]
    assert fetched("s3://bucket/00.tar") == DATA[::-1]
    assert bucket.reads == [0, 100_000, 0, 100_000, 200_000, 300_000]


def test_objects_that_cannot_be_had(bucket):
    assert refused("s3://bucket/none.tar").endswith("(1 attempt)")
    assert "IsADirectoryError" in refused("s3://bucket")
    Bucket.plan = [fail(PermissionError("Access Denied"))]
    assert "PermissionError: Access Denied" in refused("s3://bucket/00.tar")
    Bucket.plan = [fail(OSError("slow down"))] * 99
    assert "slow down at byte 0 of 300000 (5 attempts)" in refused("s3://bucket/00.tar")


def test_a_look_at_an_object(bucket):
    before = look("s3://bucket/00.tar", None, 5.0)
    assert before.total_bytes == len(DATA)
    assert look("s3://bucket/00.tar", before.etag, 5.0) == before
    bucket.pipe("/bucket/00.tar", DATA[::-1])
    assert look("s3://bucket/00.tar", before.etag, 5.0).differs(before.etag, before.total_bytes)
    assert bucket.reads == []
    with pytest.raises(Refused, match="FileNotFoundError"):
        look("s3://bucket/none.tar", None, 5.0)


def test_which_objects_are_missing(bucket):
    assert failure("s3://bucket/none.tar").missing
    assert not failure("s3://bucket").missing  # a folder
    for kind, missing in ((PermissionError, True), (NotADirectoryError, True), (ValueError, False), (OSError, False)):
        Bucket.plan = [fail(kind("no"))]
        assert failure("s3://bucket/00.tar", Fetch(retries=0)).missing == missing


def test_a_client_without_timeouts_is_given_up(bucket):
    ended = threading.Event()
    Bucket.plan = [lambda: None, lambda: ended.wait(60), lambda: ended.wait(60)]
    start = time.monotonic()
    assert "stalled: no byte for 0.4 s at byte 100000 of 300000" in refused("s3://bucket/00.tar", STALL)
    assert time.monotonic() - start < 30  # of 60
    ended.set()


# --- pipes ------------------------------------------------------------------------------------------------------------


def test_the_output_of_a_command(tmp_path):
    (tmp_path / "00.tar").write_bytes(DATA)
    assert fetched(f"pipe:cat '{tmp_path}/00.tar'", expect=Expected(bytes=300_000)) == DATA


@pytest.mark.parametrize(
    ("command", "cause"),
    [
        ("head -c 5000 /dev/zero; echo out of luck >&2; exit 3", "the command ended with status 3: out of luck"),
        ("true", "the command wrote nothing"),
        ("kill -9 $$", "the command ended with status -9"),
    ],
)
def test_a_command_that_fails(command, cause):
    message = refused(f"pipe:{command}")
    assert cause in message
    assert message.endswith("(5 attempts)")


def test_a_command_that_does_not_exist():
    assert refused("pipe:no-such-command-here x").endswith("(1 attempt)")


def test_a_silent_command_is_ended_with_all_its_children(tmp_path):
    marker = tmp_path / "pids"
    start = time.monotonic()
    message = refused(f"pipe:echo x; (sleep 98 & echo $! >> {marker}; wait); echo y", STALL)
    assert "stalled: no byte for 0.4 s" in message
    assert time.monotonic() - start < 30  # of 98
    pids = [int(line) for line in marker.read_text().split()]
    assert len(pids) == 2
    wait_until(lambda: not any(running(pid) for pid in pids))


def running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# --- stopping ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [Fault(before="stall"), Fault(send_bytes=1000, then="stall"), Fault(status=503)])
def test_stop_is_obeyed_at_once(server, fault):
    server.faults["/00.tar"] = repeat(fault)
    stop, ended = threading.Event(), []

    def run() -> None:
        try:
            download(f"{server.url}/00.tar", Memory(), Fetch(backoff_seconds=50), stop=stop)
        except Stopped:
            ended.append(time.monotonic())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    wait_until(lambda: server.log)
    time.sleep(0.1)
    start = time.monotonic()
    stop.set()
    thread.join(20)
    assert ended
    assert ended[0] - start < 20  # not the 30 seconds of a stall, nor the 50 of a pause


def test_an_abandoned_thread_does_not_keep_the_process(server):
    code = (
        "from test_remote import *\n"
        "fetch = Fetch(stall_seconds=0.3, retries=0)\n"
        f"try: download('{server.url}/00.tar', Memory(), fetch)\n"
        "except FetchError: print('given up')\n"
    )
    server.faults["/00.tar"] = repeat(Fault(drip_seconds=0.1))
    place = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": place},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout == "given up\n", done.stderr


def test_threads_end(server):
    server.faults["/00.tar"] = [Fault(send_bytes=100_000, then="stall")]
    assert fetched(f"{server.url}/00.tar", STALL) == DATA
    wait_until(lambda: not [thread for thread in threading.enumerate() if thread.name == "clipscale-fetch"])


def test_errors_are_bounded_and_travel(server):
    server.faults["/00.tar"] = repeat(Fault(status=302, headers={"Location": "ftp://" + "a" * 5000}))
    message = refused(f"{server.url}/00.tar")
    assert len(message) < 700
    for missing in (False, True):
        travelled = pickle.loads(pickle.dumps(FetchError(message, missing=missing)))
        assert (str(travelled), travelled.missing) == (message, missing)
