import errno
import hashlib
import json
import multiprocessing
import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import repeat
from pathlib import Path

import pytest
from http_server import Fault, serve
from processes import wait_until
from shards import write_tar

from clipscale.config.data import Fetch
from clipscale.data.fetch import cache as cache_module
from clipscale.data.fetch import copies
from clipscale.data.fetch.cache import Expected, FetchError, ShardCache
from clipscale.data.shard.whole import check_copy
from clipscale.errors import UserError

FAST = Fetch(stall_seconds=5.0, retries=2, backoff_seconds=0.01, again_seconds=100.0)
CHILD = multiprocessing.get_context("spawn")


def data(name: str, size: int = 100_000) -> bytes:
    return hashlib.shake_256(name.encode()).digest(size)


@pytest.fixture
def served(tmp_path):
    """A server of a/0.tar, b/0.tar and 0.tar to 9.tar."""
    root = tmp_path / "served"
    for name in ("a/0.tar", "b/0.tar", *(f"{i}.tar" for i in range(10))):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data(name))
    with serve(root) as server:
        yield server


@pytest.fixture
def cache(tmp_path):
    made = ShardCache(str(tmp_path / "cache"), 10**8, FAST, False)
    yield made
    made.close()


def read(cache: ShardCache, url: str, expect: Expected | None = None) -> bytes:
    file = cache.open(url, expect=expect)
    try:
        return os.pread(file, 10**8, 0)
    finally:
        os.close(file)


def files(cache: ShardCache) -> set[str]:
    """The kinds of files in the cache's folder."""
    return {path.suffix or path.parent.name for path in Path(cache.folder).rglob("*") if path.is_file()}


def fill(cache: ShardCache, server, numbers) -> None:
    for number in numbers:
        assert read(cache, f"{server.url}/{number}.tar") == data(f"{number}.tar")


def present(cache: ShardCache, server) -> list[int]:
    return [number for number in range(10) if cache.path(f"{server.url}/{number}.tar")]


# --- identity ---------------------------------------------------------------------------------------------------------


def test_shards_of_one_name_do_not_collide_as_webdatasets_do(served, cache, tmp_path):
    """webdataset's own cache names files by basename: it reads the first shard twice and the second never."""
    from webdataset.cache import FileCache

    urls = [f"{served.url}/a/0.tar", f"{served.url}/b/0.tar"]
    theirs = FileCache(cache_dir=str(tmp_path / "theirs"), validator=None)
    names = {theirs.get_file(url) for url in urls}
    assert len(names) == 1  # the trap
    assert [read(cache, url) for url in urls] == [data("a/0.tar"), data("b/0.tar")]
    assert len({cache.path(url) for url in urls}) == 2


def test_a_copy_is_fetched_once_and_outlives_the_cache(served, cache):
    url = f"{served.url}/0.tar"
    assert cache.path(url) is None
    assert [read(cache, url) for _ in range(3)] == [data("0.tar")] * 3
    assert Path(cache.path(url)).read_bytes() == data("0.tar")
    assert read(ShardCache(cache.folder, 10**8, FAST, False), url) == data("0.tar")
    assert served.requests == {"/0.tar": 1}
    assert files(cache) == {".tar", ".json"}  # no lock, no part


def test_nothing_secret_reaches_the_disk(served, cache):
    url = f"{served.url.replace('//', '//me:passw0rd@')}/0.tar?token=s3cr3t"
    assert read(cache, url) == data("0.tar")
    served.faults["/1.tar"] = repeat(Fault(status=403))
    with pytest.raises(FetchError, match=r"token=\*\*\*: HTTP 403"):
        cache.open(url.replace("/0.tar", "/1.tar"))
    for path in Path(cache.folder).rglob("*"):
        words = str(path).encode() + (path.read_bytes() if path.is_file() else b"")
        assert b"s3cr3t" not in words
        assert b"passw0rd" not in words
    assert files(cache) == {".tar", ".json", "locks"}


def test_constructing_makes_no_folder(tmp_path):
    made = ShardCache(str(tmp_path / "deep/er"), None, FAST, False)
    assert made.path("https://h/x.tar") is None
    made.prefetch([])
    made.close()
    assert not (tmp_path / "deep").exists()


def test_what_is_expected_of_a_copy_that_is_there(served, cache):
    url, content = f"{served.url}/0.tar", data("0.tar")
    right = Expected(len(content), zlib.crc32(content), hashlib.sha256(content).hexdigest())
    read(cache, url)
    assert read(cache, url, right) == content  # sha256 was not asked for when it came: computed once
    assert read(cache, url, right) == content
    assert served.requests["/0.tar"] == 1


@pytest.mark.parametrize("what", ["bytes", "crc32", "sha256"])
def test_a_copy_that_is_not_as_expected_is_fetched_again(served, cache, what):
    url, content = f"{served.url}/0.tar", data("new", 100_000 if what != "bytes" else 99_999)
    read(cache, url)
    (served.folder / "0.tar").write_bytes(content)
    facts = {"bytes": len(content), "crc32": zlib.crc32(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert read(cache, url) != content  # nobody asked
    assert read(cache, url, Expected(**{what: facts[what]})) == content
    assert read(cache, url, Expected(**facts)) == content
    assert served.requests["/0.tar"] == 2


def test_a_shard_that_is_not_as_expected_is_refused(served, cache):
    url = f"{served.url}/0.tar"
    for _ in range(2):
        with pytest.raises(FetchError, match=r"0\.tar: its crc32 is \d+, 7 was expected.*\(2 attempts\)"):
            cache.open(url, expect=Expected(crc32=7))
    assert served.requests["/0.tar"] == 2
    assert cache.path(url) is None


def test_copies_without_facts_are_hashed(served, cache):
    url = f"{served.url}/0.tar"
    read(cache, url)
    Path(cache.path(url)).with_suffix(".json").write_text("{half")
    assert read(cache, url, Expected(crc32=zlib.crc32(data("0.tar")))) == data("0.tar")
    assert served.requests["/0.tar"] == 1


# --- failures ---------------------------------------------------------------------------------------------------------


def test_ten_thousand_samples_of_a_dead_shard_ask_once(served, cache, monkeypatch):
    url, messages = f"{served.url}/none.tar", set()
    for _ in range(10_000):
        with pytest.raises(FetchError) as error:
            cache.open(url)
        messages.add(str(error.value))
        assert error.value.missing
    assert messages == {f"{url}: HTTP 404 Not Found (1 attempt)"}
    assert served.requests["/none.tar"] == 1
    (served.folder / "none.tar").write_bytes(b"here now")
    later = time.monotonic() + FAST.again_seconds
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert read(cache, url) == b"here now"


def test_a_shard_over_the_bound_is_refused_with_the_arithmetic(served, tmp_path):
    small = ShardCache(str(tmp_path / "cache"), 99_999, FAST, False)
    with pytest.raises(FetchError, match=r"0\.tar: its 100,000 bytes are more than .* \(99,999 bytes\); raise data\."):
        small.open(f"{served.url}/0.tar")
    served.faults["/1.tar"] = repeat(Fault(chunked=True))  # not known beforehand
    with pytest.raises(FetchError, match=r"1\.tar: its 1[\d,]+ bytes are more than"):
        small.open(f"{served.url}/1.tar")
    assert files(small) == {"locks"}
    assert read(ShardCache(str(tmp_path / "cache"), 100_000, FAST, False), f"{served.url}/1.tar") == data("1.tar")


def test_a_full_disk_is_told_with_path_and_free_bytes(served, cache, monkeypatch):
    monkeypatch.setattr(copies.Copies, "free_bytes", lambda self: 99_999)
    with pytest.raises(FetchError) as error:
        cache.open(f"{served.url}/0.tar")
    for word in (f"{served.url}/0.tar", cache.folder, "No space left", "100,000 bytes are needed", "99,999 bytes are"):
        assert word in str(error.value)
    assert files(cache) == {"locks"}


def test_a_full_disk_takes_from_the_copies_first(served, cache, monkeypatch):
    fill(cache, served, [0, 1, 2])
    here = Path(cache.folder) / "shards"
    taken = lambda: sum(path.stat().st_size for path in here.glob("*.tar"))  # noqa: E731
    monkeypatch.setattr(copies.Copies, "free_bytes", lambda self: 350_000 - taken())
    fill(cache, served, [3])
    assert present(cache, served) == [1, 2, 3]


def test_a_disk_that_fills_while_a_shard_is_written(served, cache, monkeypatch):
    """What others write cannot be reckoned with beforehand."""
    fill(cache, served, [0, 1])
    real, failed = os.pwrite, []

    def pwrite(file, block, place):
        if len(present(cache, served)) > 1:
            failed.append(place)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(file, block[:1000], place)  # and writes may be short

    monkeypatch.setattr(os, "pwrite", pwrite)
    fill(cache, served, [2])
    assert failed
    assert present(cache, served) == [1, 2]
    monkeypatch.setattr(copies.Copies, "evict", lambda self, wanted: 0)
    with pytest.raises(FetchError, match=r"No space left on device: 0 of 100,000 bytes are written, [\d,]+ bytes"):
        cache.open(f"{served.url}/3.tar")
    assert present(cache, served) == [1, 2]


def limited(folder: str, url: str) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    try:
        ShardCache(folder, 10**8, FAST, False).open(url)
    except FetchError as error:
        print(error)


def test_a_disk_that_refuses_large_files(served, tmp_path):
    code = f"from test_cache import *; limited({str(tmp_path / 'cache')!r}, '{served.url}/0.tar')"
    done = python(code).communicate(timeout=300)
    assert "File too large" in done[0]
    assert "0.tar: " in done[0]
    assert not list((tmp_path / "cache").rglob("parts/*"))


@pytest.mark.parametrize("bound_bytes", [10**8, None])
def test_folders_that_cannot_be_used(served, tmp_path, bound_bytes):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=r"data\.cache_dir: .*file/cache/shards cannot be made \(Not a directory\)"):
        ShardCache(str(tmp_path / "file/cache"), bound_bytes, FAST, False).open(f"{served.url}/0.tar")


def test_a_file_system_without_locks(served, cache, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(copies.fcntl, "flock", flock)
    with pytest.raises(UserError, match=r"No locks available; files cannot be locked there: .* a local disk"):
        cache.open(f"{served.url}/0.tar")


@pytest.mark.parametrize("url", ["ftp://h/x.tar", "pipe:touch ran", "c:/x.tar"])
def test_schemes_are_checked_here_too(cache, url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError):
        cache.open(url)
    assert not (tmp_path / "ran").exists()


def test_pipes_where_they_are_allowed(served, tmp_path):
    piped = ShardCache(str(tmp_path / "cache"), 10**8, FAST, True)
    url = f"pipe:cat {served.folder}/0.tar"
    assert read(piped, url) == data("0.tar") == read(piped, url)
    with pytest.raises(FetchError, match="ended with status 3"):
        piped.open("pipe:head -c 5000 /dev/zero; exit 3")


# --- outages ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def wait(monkeypatch) -> Callable[[float], None]:
    """Lets so many seconds pass."""
    real, passed = time.monotonic, [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: real() + passed[0])
    return lambda seconds: passed.append(passed.pop() + seconds)


def fails(cache: ShardCache, url: str) -> bool:
    try:
        os.close(cache.open(url))
        return False
    except FetchError:
        return True


@pytest.mark.parametrize("status", [404, 503])
def test_a_shard_that_failed_is_asked_for_again_after_pauses_that_grow(served, tmp_path, wait, status):
    """By one attempt each, whatever number of samples wants it; once it is back, all is as in the beginning."""
    patient = ShardCache(str(tmp_path / "cache"), 10**8, Fetch(retries=2, backoff_seconds=0.01), False)
    url = f"{served.url}/0.tar"
    served.faults["/0.tar"] = repeat(Fault(status=status))
    assert fails(patient, url)
    requests = 1 if status == 404 else 3
    for pause in (10, 20, 40, 80, 160, 300, 300):
        wait(pause - 5)
        assert all(fails(patient, url) for _ in range(100))
        assert served.requests["/0.tar"] == requests
        wait(5)
        assert all(fails(patient, url) for _ in range(100))
        requests += 1
        assert served.requests["/0.tar"] == requests
    served.faults["/0.tar"] = ()
    wait(299)
    assert fails(patient, url)
    wait(1)
    assert read(patient, url) == data("0.tar")
    os.unlink(patient.path(url))
    served.faults["/0.tar"] = [Fault(status=503)] * 2
    assert read(patient, url) == data("0.tar")  # three attempts again


def test_who_gets_the_lock_of_a_failure_does_not_ask_again(served, cache, monkeypatch):
    """Between a look at what failed and the lock, another thread may have failed and let go of it."""
    url = f"{served.url}/0.tar"
    served.faults["/0.tar"] = repeat(Fault(status=404))
    real, nested = copies.Lock.take, []

    def take(path: Path) -> copies.Lock | None:
        if not nested:
            nested.append(url)
            assert fails(cache, url)
        return real(path)

    monkeypatch.setattr(copies.Lock, "take", take)
    assert fails(cache, url)
    assert nested
    assert served.requests["/0.tar"] == 1


def test_a_prefetch_asks_again_too(served, cache, wait):
    url = f"{served.url}/0.tar"
    served.faults["/0.tar"] = [Fault(status=404)]
    assert fails(cache, url)
    wait(FAST.again_seconds)
    cache.prefetch([url])
    wait_until(lambda: cache.path(url))


def test_the_processes_of_a_node_ask_by_turns(served, tmp_path, wait):
    """One request a pause for all of them, by whoever comes first; and when one ends, another one asks."""
    url, quick = f"{served.url}/0.tar", Fetch(retries=0)
    first, second = (ShardCache(str(tmp_path / "cache"), 10**8, quick, False) for _ in range(2))
    served.faults["/0.tar"] = repeat(Fault(status=503))

    def ask(*caches: ShardCache) -> int:
        before = served.requests["/0.tar"]
        for one in caches:
            assert fails(one, url)
            time.sleep(0.02)  # so that the times of two notes differ
        return served.requests["/0.tar"] - before

    assert ask(first, second) == 2  # each on its own, as in two runs one after the other
    for pause in (10, 20, 40):
        wait(pause)
        assert ask(first, second) == 1
    wait(300)
    assert ask(first) <= 1
    wait(300)
    assert ask(first) == 1  # alone
    served.faults["/0.tar"] = ()
    wait(300)
    assert read(first, url) == data("0.tar") == read(second, url)


# --- what is no shard -------------------------------------------------------------------------------------------------

PAGE = b"<!DOCTYPE html>\n<title>503</title>"


@pytest.fixture
def tar(served) -> bytes:
    """/t.tar, of three members."""
    members = [(f"{i}.txt", b"text") for i in range(3)]
    return write_tar(served.folder / "t.tar", members).read_bytes()


def boundary(tar: bytes) -> int:
    """Where the third member begins."""
    return tar.index(b"2.txt")


@pytest.mark.parametrize("length", ["with its length", "without"])
@pytest.mark.parametrize(
    ("body", "shown"),
    [
        (PAGE, r"it is no tar: it begins with b'<!DOCTYPE html>\\n<title>503</title>' \(HTTP 200 OK, text/html\)"),
        (b'<?xml version="1.0"?><Error/>' + b" " * 1000, r"it is no tar: it begins with b'<\?xml version=.* text/html"),
        (b'{"error": "slow down"}', r"it is no tar: it begins with b'{\"error\": \"slow down\"}'"),
        (b"\x1b[2J" + b"x" * 999, r"it is no tar: it begins with b'\\x1b\[2Jxxx"),
        (b"", r"it is empty \(HTTP 200 OK, text/html\)"),
    ],
    ids=["html", "xml", "json", "bytes", "empty"],
)
def test_an_answer_that_is_no_tar_is_never_kept(served, cache, tar, body, shown, length):
    url = f"{served.url}/t.tar"
    headers = {"Content-Type": "text/html"} | ({"Content-Length": ""} if length == "without" else {})
    served.faults["/t.tar"] = [Fault(body=body, headers=headers)] * 3
    with pytest.raises(FetchError, match=rf"t\.tar: {shown}.*: try again \(3 attempts\)"):
        cache.open(url, check=check_copy)
    assert cache.path(url) is None
    os.close(ShardCache(cache.folder, 10**8, FAST, False).open(url, check=check_copy))  # another run
    assert Path(cache.path(url)).read_bytes() == tar


def test_an_error_page_is_told_as_such_where_a_shard_of_known_bytes_is_expected(served, cache, tar):
    served.faults["/t.tar"] = [Fault(body=PAGE)] * 3
    expect = Expected(len(tar), zlib.crc32(tar))
    with pytest.raises(FetchError, match="it is no tar: it begins with b'<!DOCTYPE html>"):
        cache.open(f"{served.url}/t.tar", expect=expect, check=check_copy)
    served.faults["/t.tar"] = [Fault(body=PAGE)]
    again = ShardCache(cache.folder, 10**8, FAST, False)
    os.close(again.open(f"{served.url}/t.tar", expect=expect, check=check_copy))


def test_a_body_cut_at_a_boundary_without_a_length_is_never_kept(served, cache, tar):
    url = f"{served.url}/t.tar"
    cut = Fault(send_bytes=boundary(tar), headers={"Content-Length": ""})
    served.faults["/t.tar"] = [cut] * 3
    with pytest.raises(FetchError, match=rf"cut short at byte {boundary(tar)}: .* no Content-Length says .*3 attempts"):
        cache.open(url, check=check_copy)
    assert cache.path(url) is None
    served.faults["/t.tar"] = [cut, cut, Fault(chunked=True)]  # whole, but no length vouches for it
    for _ in range(2):
        again = ShardCache(cache.folder, 10**8, FAST, False)
        os.close(again.open(url, check=check_copy))
    assert Path(cache.path(url)).read_bytes() == tar
    assert served.requests["/t.tar"] == 6


def test_a_shard_that_lies_cut_on_its_server_is_kept_and_fetched_once(served, cache, tar):
    (served.folder / "t.tar").write_bytes(tar[: boundary(tar)])
    for _ in range(3):
        again = ShardCache(cache.folder, 10**8, FAST, False)
        os.close(again.open(f"{served.url}/t.tar", check=check_copy))
    assert served.requests["/t.tar"] == 1


@pytest.mark.parametrize(("bad", "requests"), [("page", 1), ("cut", 1), ("whole", 0)])
def test_copies_of_an_earlier_version_are_checked(served, cache, tar, bad, requests):
    """Their facts say neither an etag nor whether a length came with them. Once is enough."""
    url = f"{served.url}/t.tar"
    os.close(cache.open(url))
    served.log.clear()
    old = {"page": PAGE, "cut": tar[: boundary(tar)], "whole": tar}[bad]
    Path(cache.path(url)).write_bytes(old)
    facts = {"url": url, "bytes": len(old), "crc32": zlib.crc32(old), "sha256": None}
    Path(cache.path(url)).with_suffix(".json").write_text(json.dumps(facts))
    assert read(cache, url, Expected(crc32=zlib.crc32(old))) == old  # what an index was made of is what it wants
    for _ in range(2):
        os.close(cache.open(url, check=check_copy))
    assert Path(cache.path(url)).read_bytes() == tar
    assert served.requests["/t.tar"] == requests


def test_a_bad_copy_goes_although_no_better_one_comes(served, cache, tar):
    url = f"{served.url}/t.tar"
    os.close(cache.open(url))
    Path(cache.path(url)).write_bytes(PAGE)
    served.faults["/t.tar"] = repeat(Fault(status=503))
    with pytest.raises(FetchError, match="HTTP 503"):
        cache.open(url, check=check_copy)
    assert cache.path(url) is None


def test_a_prefetch_keeps_no_page(served, cache, tar):
    served.faults["/t.tar"] = repeat(Fault(body=PAGE))
    cache.prefetch([f"{served.url}/t.tar"], check_copy)
    wait_until(lambda: not cache._workers)
    assert cache.path(f"{served.url}/t.tar") is None


# --- what changes on its server ---------------------------------------------------------------------------------------


def test_what_a_server_says_of_a_copy(served, cache):
    url = f"{served.url}/0.tar"
    assert cache.facts(url) == {}
    read(cache, url)
    facts = cache.facts(url)
    assert facts["bytes"] == 100_000
    known = facts["etag"], facts["bytes"]
    assert not cache.changed(url, *known)
    (served.folder / "0.tar").write_bytes(data("other"))
    assert cache.changed(url, *known)
    assert not cache.changed(url, None, 100_000)  # all that facts without an etag can tell
    assert cache.changed(url, None, 99_999)
    served.faults["/0.tar"] = repeat(Fault(status=503))
    with pytest.raises(FetchError, match=r"0\.tar: HTTP 503"):
        cache.changed(url, *known)
    with pytest.raises(UserError):
        cache.changed("pipe:cat x", None, None)


def test_anew(served, cache):
    url = f"{served.url}/0.tar"
    read(cache, url)
    (served.folder / "0.tar").write_bytes(data("other"))
    served.faults["/0.tar"] = [Fault(status=404)]
    with pytest.raises(FetchError, match="HTTP 404"):
        cache.open(url, anew=True)
    assert read(cache, url) == data("0.tar")  # what was there stays until a better one has come
    file = cache.open(url, anew=True)
    assert os.pread(file, 200_000, 0) == data("other") == read(cache, url)
    os.close(file)


# --- bound and order --------------------------------------------------------------------------------------------------


def test_those_used_longest_ago_go_first(served, tmp_path):
    small = ShardCache(str(tmp_path / "cache"), 350_000, FAST, False)
    fill(small, served, [0, 1, 2])
    fill(small, served, [0])  # used again
    fill(small, served, [3])
    assert present(small, served) == [0, 2, 3]
    fill(small, served, [2, 4])
    assert present(small, served) == [2, 3, 4]
    assert served.requests["/0.tar"] == 1
    assert len(list((tmp_path / "cache").rglob("*.json"))) == 3


def test_the_bound_holds_at_every_moment(served, tmp_path):
    small = ShardCache(str(tmp_path / "cache"), 350_000, Fetch(parallel=3), False)
    ended, most = threading.Event(), [0]

    def sizes() -> dict[int, int]:
        """By inode, for a copy that is renamed may be seen under both its names."""
        found = {}
        for path in (tmp_path / "cache").rglob("*"):
            if path.suffix == ".tar" or path.parent.name == "parts":
                with suppress(FileNotFoundError):
                    facts = path.stat()
                    found[facts.st_ino] = facts.st_size
        return found

    def watch() -> None:
        while not ended.is_set():
            before, after = sizes(), sizes()
            if before.keys() == after.keys():  # else a look has taken in what never lay there together
                most[0] = max(most[0], sum(before.values()))

    with ThreadPoolExecutor(5) as pool:
        watching = pool.submit(watch)
        urls = [f"{served.url}/{number}.tar" for number in range(10)] * 3
        assert list(pool.map(lambda url: len(read(small, url)), urls)) == [100_000] * 30
        ended.set()
        watching.result(10)
    assert 200_000 <= most[0] <= 350_000


def test_a_reader_keeps_what_is_evicted(served, tmp_path):
    small = ShardCache(str(tmp_path / "cache"), 150_000, FAST, False)
    file = small.open(f"{served.url}/0.tar")
    fill(small, served, [1])
    assert present(small, served) == [1]
    assert os.pread(file, 200_000, 0) == data("0.tar")
    os.close(file)


def test_a_shard_under_way_is_not_evicted(served, tmp_path):
    small = ShardCache(str(tmp_path / "cache"), 250_000, Fetch(stall_seconds=30), False)
    served.faults["/0.tar"] = [Fault(send_bytes=99_999, then="stall")]
    small.prefetch([f"{served.url}/0.tar"])
    wait_until(lambda: served.log and list((tmp_path / "cache").rglob("parts/*")))
    (part,) = (tmp_path / "cache").rglob("parts/*")
    wait_until(lambda: part.stat().st_size == 100_000)
    fill(small, served, [1, 2, 3])  # in what room is left
    assert part.exists()
    assert present(small, served) == [3]
    small.close()
    assert not part.exists()


def test_a_download_waits_for_the_room_that_others_hold(served, tmp_path):
    small = ShardCache(str(tmp_path / "cache"), 150_000, Fetch(stall_seconds=1.0, backoff_seconds=0.01), False)
    served.faults["/0.tar"] = [Fault(send_bytes=50_000, then="stall")]
    start = time.monotonic()
    small.prefetch([f"{served.url}/0.tar"])
    wait_until(lambda: list((tmp_path / "cache").rglob("parts/*")))
    time.sleep(0.2)
    fill(small, served, [1])
    assert time.monotonic() - start > 1.0  # the stall's seconds
    assert present(small, served) == [1]
    small.close()


def test_room_that_never_comes_is_an_error(served, tmp_path, monkeypatch):
    monkeypatch.setattr(copies, "_PATIENCE_SECONDS", 0.3)
    small = ShardCache(str(tmp_path / "cache"), 150_000, Fetch(stall_seconds=30), False)
    served.faults["/0.tar"] = [Fault(send_bytes=50_000, then="stall")]
    small.prefetch([f"{served.url}/0.tar"])
    wait_until(lambda: list((tmp_path / "cache").rglob("parts/*")))
    time.sleep(0.2)
    with pytest.raises(FetchError, match=r"other downloads hold 100,000 of 150,000 bytes; raise data\.cache_bytes"):
        small.open(f"{served.url}/1.tar")
    small.close()


def test_the_default_bound(tmp_path, served, monkeypatch):
    monkeypatch.setattr(copies.Copies, "free_bytes", lambda self: 1_000_000)
    first = ShardCache(str(tmp_path / "cache"), None, FAST, False)
    assert first.bound_bytes == 800_000
    fill(first, served, [0, 1])
    assert ShardCache(str(tmp_path / "cache"), None, FAST, False).bound_bytes == 960_000  # what is there may stay


# --- several at once --------------------------------------------------------------------------------------------------


def test_threads_share_one_download(served, cache):
    served.faults["/0.tar"] = [Fault(status=503)]
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda _: read(cache, f"{served.url}/0.tar"), range(16)))
    assert got == [data("0.tar")] * 16
    assert served.requests["/0.tar"] == 2


def python(code: str, **options) -> subprocess.Popen:
    place = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": place},
        stdout=subprocess.PIPE,
        text=True,
        **options,
    )


def in_child(cache: ShardCache, urls: list[str], begin, answers) -> None:
    begin.wait(60)
    for url in urls:
        try:
            answers.put(hashlib.sha256(read(cache, url)).hexdigest())
        except FetchError as error:
            answers.put(str(error))


def children(cache: ShardCache, urls: list[str], count: int) -> list[str]:
    begin, answers = CHILD.Event(), CHILD.Queue()
    processes = [CHILD.Process(target=in_child, args=(cache, urls, begin, answers)) for _ in range(count)]
    for process in processes:
        process.start()
    begin.set()
    got = [answers.get(timeout=60) for _ in range(count * len(urls))]
    for process in processes:
        process.join(20)
    return got


def test_processes_share_one_download(served, cache):
    urls = [f"{served.url}/{number}.tar" for number in range(5)]
    got = children(cache, urls, 3)
    assert sorted(got) == sorted([hashlib.sha256(data(f"{i}.tar")).hexdigest() for i in range(5)] * 3)
    assert set(served.requests.values()) == {1}
    assert files(cache) == {".tar", ".json"}


def test_processes_share_one_failure(served, tmp_path):
    """Else each rank of a node would spend its own budget, one after the other."""
    shared = ShardCache(str(tmp_path / "cache"), 10**8, Fetch(retries=2, backoff_seconds=1.0), False)
    served.faults["/0.tar"] = repeat(Fault(status=503))
    begin, answers = CHILD.Event(), CHILD.Queue()
    processes = [
        CHILD.Process(target=in_child, args=(shared, [f"{served.url}/0.tar"], begin, answers)) for _ in range(3)
    ]
    for process in processes:
        process.start()
    begin.set()
    got = {answers.get(timeout=60) for _ in range(3)}
    assert got == {f"{served.url}/0.tar: HTTP 503 Service Unavailable (3 attempts)"}
    served.faults["/0.tar"] = ()
    assert read(shared, f"{served.url}/0.tar") == data("0.tar")  # a new run tries anew
    for process in processes:
        process.join(20)


@pytest.mark.parametrize("status", [404, 503])
def test_who_waited_is_told_whether_the_shard_is_missing(served, tmp_path, status):
    """By another cache on the same folder, as another process would have."""
    patient = Fetch(retries=1, backoff_seconds=0.5)
    first, second = (ShardCache(str(tmp_path / "cache"), 10**8, patient, False) for _ in range(2))
    served.faults["/0.tar"] = [Fault(status=503), *[Fault(status=status)] * 3]
    first.prefetch([f"{served.url}/0.tar"])
    wait_until(lambda: served.log)
    for told in (second, second, first):
        with pytest.raises(FetchError, match=rf"0\.tar: HTTP {status} .* \(2 attempts\)$") as error:
            told.open(f"{served.url}/0.tar")
        assert error.value.missing == (status == 404)
    assert served.requests["/0.tar"] in (2, 4)


def test_a_killed_download_leaves_nothing_in_the_way(served, cache):
    served.faults["/0.tar"] = [Fault(send_bytes=50_000, then="stall")]
    url = f"{served.url}/0.tar"
    code = (
        f"from test_cache import *\nShardCache({cache.folder!r}, 10**8, Fetch(stall_seconds=60), False).open({url!r})\n"
    )
    process = python(code)
    shards = Path(cache.folder) / "shards"
    wait_until(lambda: any(path.stat().st_blocks for path in shards.glob("parts/*")))
    waiting = threading.Thread(target=lambda: got.append(read(cache, url)), daemon=True)
    got: list[bytes] = []
    waiting.start()
    time.sleep(0.3)
    assert not got  # it waits
    process.send_signal(signal.SIGKILL)
    process.wait(20)
    waiting.join(20)
    assert got == [data("0.tar")]
    assert files(cache) == {".tar", ".json"}  # the part it left is gone too
    assert served.requests["/0.tar"] == 2


def test_a_halted_holder_is_given_up(served, cache, monkeypatch):
    monkeypatch.setattr(cache_module, "MAX_RETRY_AFTER_SECONDS", -60.0)  # patience: 2 * stall_seconds = 10 s
    monkeypatch.setattr(cache, "fetch", Fetch(stall_seconds=0.3))
    served.faults["/0.tar"] = [Fault(send_bytes=50_000, then="stall")]
    url = f"{served.url}/0.tar"
    holder = ShardCache(cache.folder, 10**8, Fetch(stall_seconds=60), False)
    holder.prefetch([url])
    wait_until(lambda: any(path.stat().st_blocks for path in (Path(cache.folder) / "shards").glob("parts/*")))
    start = time.monotonic()
    with pytest.raises(FetchError, match=r"another process has its lock .* and did nothing for 1 s; end that process"):
        cache.open(url)
    assert 0.6 <= time.monotonic() - start < 30
    holder.close()


def test_parts_of_other_hosts_are_left_alone_for_a_while(served, cache):
    fill(cache, served, [0])
    theirs = Path(cache.folder) / "shards/parts" / f"{'0' * 32}.123.other-host.net"
    theirs.write_bytes(b"x")
    fill(cache, served, [1])
    assert theirs.exists()
    os.utime(theirs, (time.time() - 7200,) * 2)
    fill(cache, served, [2])
    assert not theirs.exists()


# --- prefetch, close, pickle ------------------------------------------------------------------------------------------


def test_prefetch_returns_at_once_and_fetches_each_once(served, tmp_path):
    cache = ShardCache(str(tmp_path / "cache"), 10**8, Fetch(stall_seconds=2.0, retries=2, backoff_seconds=0.01), False)
    served.faults["/0.tar"] = [Fault(before="stall")]
    urls = [f"{served.url}/{number}.tar" for number in range(10)]
    for _ in range(50):
        cache.prefetch(urls)
    assert 0 not in present(cache, served)  # nobody waited for it
    wait_until(lambda: present(cache, served) == list(range(10)))
    assert served.requests.total() == 11
    wait_until(lambda: not cache._workers)
    cache.prefetch(urls)  # all there
    wait_until(lambda: not cache._workers)
    assert served.requests.total() == 11


def test_prefetch_is_bounded_and_in_order(served, tmp_path):
    one = ShardCache(str(tmp_path / "cache"), 10**8, Fetch(parallel=1), False)
    one.prefetch(f"{served.url}/{number}.tar" for number in (3, 1, 2))
    one.prefetch([f"{served.url}/0.tar", f"{served.url}/3.tar"])
    assert len(one._workers) == 1
    wait_until(lambda: present(one, served) == [0, 1, 2, 3])
    assert [path for path, _ in served.log] == ["/3.tar", "/1.tar", "/2.tar", "/0.tar"]


def test_prefetch_keeps_what_is_there_from_being_evicted(served, tmp_path):
    small = ShardCache(str(tmp_path / "cache"), 350_000, FAST, False)
    fill(small, served, [0, 1, 2])
    small.prefetch([f"{served.url}/0.tar"])
    wait_until(lambda: not small._workers)
    fill(small, served, [3])
    assert present(small, served) == [0, 2, 3]


def test_open_tells_what_prefetch_met(served, cache):
    url = f"{served.url}/none.tar"
    cache.prefetch([url, f"{served.url}/0.tar"])
    wait_until(lambda: not cache._workers)
    assert cache.path(url) is None
    with pytest.raises(FetchError, match="HTTP 404"):
        cache.open(url)
    assert served.requests["/none.tar"] == 1
    assert present(cache, served) == [0]


def test_open_joins_a_prefetch_under_way(served, cache):
    served.faults["/0.tar"] = [Fault(status=503, headers={"Retry-After": "1"})]
    cache.prefetch([f"{served.url}/0.tar"])
    wait_until(lambda: served.log)
    fill(cache, served, [0])
    assert served.requests["/0.tar"] == 2


@pytest.mark.parametrize("fault", [Fault(before="stall"), Fault(send_bytes=500, then="stall"), Fault(status=503)])
def test_close_ends_downloads_and_waiters(served, tmp_path, fault):
    stuck = ShardCache(str(tmp_path / "cache"), 10**8, Fetch(backoff_seconds=60), False)
    for number in range(6):
        served.faults[f"/{number}.tar"] = repeat(fault)
    stuck.prefetch(f"{served.url}/{number}.tar" for number in range(5))
    told = []

    def wait() -> None:
        try:
            stuck.open(f"{served.url}/0.tar")
        except FetchError as error:
            told.append(str(error))

    waiter = threading.Thread(target=wait, daemon=True)
    waiter.start()
    wait_until(lambda: len(served.log) >= 4)
    time.sleep(0.2)
    start = time.monotonic()
    stuck.close()
    waiter.join(20)
    assert time.monotonic() - start < 20  # not the 30 seconds of a stall, nor the 60 of a pause
    assert told == [f"{served.url}/0.tar: the cache was closed"]
    assert "parts" not in files(stuck)
    served.faults.clear()
    fill(stuck, served, [0, 1])  # and it can be used again


def test_a_process_ends_although_a_prefetch_is_stuck(served, tmp_path):
    served.faults["/0.tar"] = repeat(Fault(send_bytes=500, then="stall"))
    code = (
        "from test_cache import *\n"
        f"cache = ShardCache({str(tmp_path / 'cache')!r}, 10**8, Fetch(), False)\n"
        f"cache.prefetch(['{served.url}/0.tar'])\n"
        "import time; time.sleep(1); print('done')\n"
    )
    assert python(code).communicate(timeout=300)[0] == "done\n"


def test_pickle_keeps_the_settings(served, cache):
    cache.prefetch([f"{served.url}/0.tar"])
    twin = pickle.loads(pickle.dumps(cache))
    assert (twin.folder, twin.bound_bytes, twin.fetch, twin.allow_pipe) == (cache.folder, 10**8, FAST, False)
    fill(twin, served, [0])
    default = ShardCache(cache.folder, None, FAST, True)
    assert pickle.loads(pickle.dumps(default)).bound_bytes == default.bound_bytes


def test_many_processes_under_a_tight_bound(served, tmp_path):
    """Every read is right although copies come and go under everybody's hands."""
    small = ShardCache(str(tmp_path / "cache"), 450_000, FAST, False)
    got = children(small, [f"{served.url}/{number}.tar" for number in (*range(10), *range(10))], 3)
    right = [hashlib.sha256(data(f"{number}.tar")).hexdigest() for number in range(10)] * 6
    assert sorted(got) == sorted(right)
    assert files(small) == {".tar", ".json"}
    assert sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*.tar")) <= 450_000
