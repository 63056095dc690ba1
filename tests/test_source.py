"""clipscale/data/source.py and counts.py: samples by number, local and remote, with known and with declared counts."""

import errno
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import webdataset
from http_server import Fault, Server
from shards import picture, write_pairs, write_shard

from clipscale.config.data import Data, Fetch, Select, SourceSettings
from clipscale.data.bad import BadSample
from clipscale.data.fetch.cache import ShardCache
from clipscale.data.shard import handles
from clipscale.data.shard.index import Index
from clipscale.data.source import Source, open_source
from clipscale.errors import UserError

JPEG = picture(0, 16, 16)
QUICK = Fetch(stall_seconds=2, retries=1, backoff_seconds=0.05, again_seconds=100.0)


def pair(caption: bytes = b"a caption") -> dict[str, bytes]:
    return {"jpg": JPEG, "txt": caption}


def opened(urls: object, need: str = "pairs", data: Data | None = None, findings=False, ahead=False, **settings):
    source = SourceSettings(str(urls), **settings)
    return open_source("mine", source, data or Data(), need=need, findings=findings, ahead=ahead)


def read_all(source: Source) -> list[tuple[str, bytes, bytes]]:
    return [source.read(s, i)[:3] for s in range(len(source.shards)) for i in range(source.counts[s])]


# --- local shards -----------------------------------------------------------------------------------------------------


def test_samples_are_webdatasets(tmp_path):
    """Members that are neighbours and members that are not; notes before pictures; empty pictures."""
    samples = []
    for i in range(40):
        parts = {"jpg": os.urandom(i * 97 % 3000), "json": b"{}" + b" " * (i * 701 % 9000), "txt": b"text %d" % i}
        order = sorted(parts, key=lambda suffix, i=i: hash((suffix, i)))
        samples.append((f"{i:04d}", {suffix: parts[suffix] for suffix in order}))
    write_shard(tmp_path / "0.tar", samples[:15])
    write_shard(tmp_path / "1.tar", samples[15:])
    source = opened(tmp_path / "{0..1}.tar")
    expected = [
        (sample["__key__"], sample["jpg"], sample["txt"])
        for path in ("0.tar", "1.tar")
        for sample in webdataset.WebDataset(str(tmp_path / path), shardshuffle=False)
    ]
    assert (source.counts.tolist(), source.samples) == ([15, 25], 40)
    assert read_all(source) == expected
    assert source.where(1, 3) == (str(tmp_path / "1.tar"), "0018")


def test_labels(tmp_path):
    samples = [(str(i), {"png": JPEG, "cls": b"%d" % i, "txt": b"x"}) for i in range(3)]
    source = opened(write_shard(tmp_path / "x.tar", samples), need="labelled")
    assert [sample[2] for sample in read_all(source)] == [b"0", b"1", b"2"]


def test_threads_and_pickled_copies_read_the_same_with_few_open_files(tmp_path, monkeypatch):
    monkeypatch.setattr(handles, "_MAX_OPEN_FILES", 2)
    source = opened(write_pairs(tmp_path, 7, 9, size=8))
    expected = read_all(source)
    copy = pickle.loads(pickle.dumps(source))
    assert copy.fingerprint() == source.fingerprint()
    before = len(os.listdir("/proc/self/fd"))
    for reader in (source, copy):
        with ThreadPoolExecutor(8) as pool:
            numbers = [(s, i) for _ in range(5) for i in range(9) for s in range(7)]
            found = list(pool.map(lambda n, reader=reader: reader.read(*n)[:3], numbers))
        assert found == [expected[s * 9 + i] for s, i in numbers]
    assert len(os.listdir("/proc/self/fd")) <= before + 4
    source.close()
    copy.close()
    assert read_all(source) == expected  # opens them again


def test_a_spawned_process_reads_it(tmp_path):
    source = opened(write_pairs(tmp_path, 2, 3, size=8))
    code = (
        "import pickle, sys; source = pickle.load(sys.stdin.buffer); sample = source.read(1, 2); "
        "print(sample.key, source.caption(sample.note))"
    )
    done = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(source), capture_output=True, timeout=300)
    assert (done.stdout, done.returncode) == (b"000005 number 2 of shard 1\n", 0), done.stderr


def test_the_captions_policy(tmp_path):
    samples = [("0", {"jpg": JPEG, "json": json.dumps({"c": ["one", "two"]}).encode()})]
    path = write_shard(tmp_path / "x.tar", samples)
    sources = [opened(path, caption="json:c", captions=policy) for policy in ("whole", "first", "random")]
    note = sources[0].read(0, 0).note
    assert [source.caption(note, 3) for source in sources] == ["one\ntwo", "one", "two"]
    assert len({source.fingerprint() for source in sources}) == 3
    for note, cause in ((b"{}", "caption cannot be used"), (b'{"c": "\\ud800"}', "caption is not UTF-8")):
        with pytest.raises(BadSample) as error:
            sources[0].caption(note, 0)
        assert error.value.cause == cause


def test_the_fingerprint_follows_content_and_rules_not_places(tmp_path):
    samples = [(str(i), {"jpg": picture(i, 8 + i, 20), "txt": b"caption %d" % i}) for i in range(3)]
    here = opened(write_shard(tmp_path / "here" / "a.tar", samples)).fingerprint()
    (tmp_path / "there").mkdir()
    shutil.copy(tmp_path / "here" / "a.tar", tmp_path / "there" / "b.tar")
    assert opened(tmp_path / "there" / "b.tar").fingerprint() == here
    changed = write_shard(tmp_path / "changed.tar", [*samples[:2], ("2", samples[2][1] | {"txt": b"caption X"})])
    assert changed.stat().st_size == (tmp_path / "here" / "a.tar").stat().st_size
    assert opened(changed).fingerprint() != here
    (tmp_path / "a.txt").write_text("0\n")
    (tmp_path / "b.txt").write_text("1\n")
    subsets = [
        opened(tmp_path / "here" / "a.tar", select=Select(uids=str(tmp_path / name), uid_field="__key__"))
        for name in ("a.txt", "b.txt")
    ]
    assert [source.samples for source in subsets] == [1, 1]
    assert len({here, *(source.fingerprint() for source in subsets)}) == 3


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_damage_change_and_refusals_are_told(tmp_path, told):
    whole = write_shard(tmp_path / "whole.tar", [(str(i), pair()) for i in range(4)]).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: whole.index(b"2.jpg")])
    write_shard(tmp_path / "odd.tar", [("a", pair()), ("b", {"jpg": JPEG}), ("c", pair(b" "))])
    source = opened(tmp_path / "{whole,cut,odd}.tar", findings=True)
    assert source.counts.tolist() == [4, 2, 1]
    assert len(told) == 2
    assert f"cut.tar is damaged, 2 samples are usable: cut short at byte {whole.index(b'2.jpg')}" in told[0]
    assert told[1] == "source 'mine': 2 samples refused (no caption: 1, empty caption: 1); 7 are usable"
    assert source.refused() == {"no caption": 1, "empty caption": 1}
    write_shard(tmp_path / "whole.tar", [("0", pair(b"other"))])
    told.clear()
    opened(tmp_path / "whole.tar", findings=True)
    assert len(told) == 1
    assert "whole.tar changed since it was indexed last: " in told[0]


def test_what_is_lost_is_told(tmp_path, told):
    path = write_shard(tmp_path / "x.tar", [(str(i), pair()) for i in range(8)])
    whole = path.read_bytes()
    start, about = whole.index(b"5.jpg"), f"source 'mine': {path} is damaged, 5 samples are usable: "
    path.write_bytes(whole[:start])
    opened(path, findings=True)
    assert (
        told[-1]
        == f"{about}cut short at byte {start}: no end-of-archive marker; how many samples are lost is not known"
    )
    path.write_bytes(whole[:start] + b"?" * 1000)
    opened(path, findings=True)
    assert told[-1].endswith(f" of its {start + 1000} bytes were not read, how many samples is not known")
    path.write_bytes(whole)
    opened(path)
    path.write_bytes(whole[:start])
    opened(path, findings=True)
    assert told[-1].endswith("no end-of-archive marker; of 8 samples that are known of, 3 are lost")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "cut short at byte 0"),
        (bytes(10_240), "empty archives"),
        (bytes(30_720), "cut short at byte 0: 30720 bytes follow, all zeros: never filled"),
        (b"\x1f\x8b" + bytes(600), "gzip"),
        ([("a", {"jpg": JPEG})], "no caption: 1"),
        ([("a", {"json": b"{}"})], "no picture: 1"),
        (
            [("a", {"img": JPEG, "txt": b"x"})],
            "no picture: 1; members that are not read: .img: 1; pictures are read from",
        ),
        (
            [("a", {"gif": b"", "txt": b"x"})],
            "picture of another format: 1; members that are not read: .gif: 1; pictures",
        ),
        ([("v1", {"0.jpg": JPEG, "0.txt": b"x"})], "take the dots out of the names"),
        ([("a", {"jpg": b""}), ("b", {"jpg": b""}), ("a", {"txt": b"x"})], "sort the tar (tar --sort=name"),
        ([(".a", {"jpg": JPEG, "txt": b"x"})], "members that are not read: hidden file: 2"),
    ],
)
def test_no_usable_sample_is_one_clear_error(tmp_path, content, found):
    path = tmp_path / "shard.tar"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        write_shard(path, content)
    with pytest.raises(UserError, match="holds no sample with a picture and a caption") as error:
        opened(path)
    assert found in str(error.value)
    assert "\n" not in str(error.value)


def test_one_sample_in_one_shard(tmp_path):
    source = opened(write_shard(tmp_path / "x.tar", [("k", pair(b"only"))]))
    assert read_all(source) == [("k", JPEG, b"only")]


def test_a_shard_that_changes_or_goes_while_it_is_used(tmp_path):
    source = opened(write_pairs(tmp_path, 3, 2, size=8))
    os.unlink(tmp_path / "0000.tar")
    write_shard(tmp_path / "0001.tar", [("other", pair()), ("more", pair())])
    with pytest.raises(OSError, match=r"shard .*0000.tar, 000001: .*No such file"):
        source.read(0, 1)
    with pytest.raises(OSError, match=r"shard .*0001.tar, 000002: the shard changed since this run began"):
        source.read(1, 0)
    assert source.read(2, 0).key == "000004"
    os.truncate(tmp_path / "0002.tar", 600)  # while it is open
    with pytest.raises(OSError, match=r"0002.tar, 000005: \d+ bytes at \d+ were expected, 0 are there"):
        source.read(2, 1)


def test_an_index_that_goes_or_is_damaged_while_it_is_used(tmp_path):
    source = opened(write_pairs(tmp_path, 2, 3, size=8))
    os.unlink(tmp_path / "0000.tar.index")
    place = tmp_path / "0001.tar.index"
    data = bytearray(place.read_bytes())
    data[-20] ^= 1  # of a key
    place.write_bytes(data)
    with pytest.raises(OSError, match=r"0000.tar, number 1: .*No such file"):
        source.read(0, 1)
    assert source.where(0, 1) == (str(tmp_path / "0000.tar"), "number 1")
    found = []
    for i in range(3):
        try:
            found.append(source.read(1, i).key)
        except OSError as error:
            found.append("is damaged" in str(error))
    assert sorted(map(str, found)) in (["000003", "000004", "True"], ["000003", "000005", "True"])


# --- remote shards ----------------------------------------------------------------------------------------------------


@pytest.fixture
def remote(tmp_path) -> Data:
    return Data(cache_dir=str(tmp_path / "cache"), fetch=QUICK)


def evict(data: Data) -> None:
    """The copies, not their folder: a thread that reads ahead may still write into it."""
    for path in Path(data.cache_dir, "shards").glob("*.tar"):
        path.unlink(missing_ok=True)


def test_a_remote_shard_is_read_as_its_local_copy(server, remote):
    here = opened(write_pairs(server.folder, 2, 3, size=8))
    there = opened(f"{server.url}/{{0000..0001}}.tar", data=remote)
    assert there.fingerprint() == here.fingerprint()
    assert read_all(there) == read_all(here)
    assert there.where(1, 0) == (f"{server.url}/0001.tar", "000003")
    assert opened(f"{server.url}/{{0000..0001}}.tar", data=remote).fingerprint() == here.fingerprint()
    assert (server.requests["/0000.tar"], server.requests["/0001.tar"]) == (1, 1)
    evict(remote)  # the index outlives the copies
    again = opened(f"{server.url}/{{0000..0001}}.tar", data=remote)
    assert server.requests["/0001.tar"] == 1
    assert read_all(again) == read_all(here)
    assert server.requests["/0001.tar"] == 2


def test_shards_of_one_name_in_two_folders_do_not_collide(server, remote):
    for name in ("a", "b"):
        write_shard(server.folder / name / "00.tar", [(name, pair(b"in " + name.encode()))])
    source = opened(f"{server.url}/{{a,b}}/00.tar", data=remote)
    assert [source.read(shard, 0).note for shard in range(2)] == [b"in a", b"in b"]


def test_a_remote_shard_that_is_another_one_after_eviction(server, remote):
    urls = write_pairs(server.folder, 1, 3, size=8)
    source = opened(f"{server.url}/0000.tar", data=remote)
    evict(remote)
    shutil.rmtree(server.folder)
    write_pairs(server.folder, 1, 3, size=8, seed=9)
    with pytest.raises(OSError, match=r"0000.tar, 000001: .*expected"):
        source.read(0, 1)
    assert opened(urls).samples == 3


def test_a_missing_remote_shard_is_a_clear_error(server, remote):
    write_pairs(server.folder, 1, 3, size=8)
    with pytest.raises(UserError, match=r"shard 'http.*0001.tar\?token=...': .*404") as error:
        opened(f"{server.url}/{{0000..0001}}.tar?token=secret", data=remote)
    assert "secret" not in str(error.value)
    assert "\n" not in str(error.value)


def test_prefetch_is_for_remote_shards(server, remote, tmp_path):
    write_pairs(server.folder, 2, 3, size=8)
    urls = f"{write_pairs(tmp_path / 'here', 1, 1, size=8)}::{server.url}/0001.tar"
    (tmp_path / "counts.json").write_text('{"0001.tar": 3}')
    source = opened(urls, data=remote, counts=str(tmp_path / "counts.json"))
    assert server.requests["/0001.tar"] == 0
    source.prefetch([0])
    source.prefetch([1, 0])
    assert [sample[0] for sample in read_all(source)] == ["000000", "000003", "000004", "000005"]
    assert server.requests["/0001.tar"] == 1


# --- what a server sends instead of a shard, and what changes there ---------------------------------------------------


def index(data: Data, urls: str, renew: str = "changed") -> Source:
    """As `clipscale index` does."""
    return open_source("mine", SourceSettings(urls), data, need="pairs", ahead=True, renew=renew, findings=True)


@pytest.mark.parametrize("body", [b"<!DOCTYPE html><title>503</title>", b""])
def test_an_error_page_is_no_shard(server, remote, body):
    """It was indexed as a damaged tar without samples, for ever."""
    write_pairs(server.folder, 1, 4, size=8)
    url = f"{server.url}/0000.tar"
    server.faults["/0000.tar"] = [Fault(body=body, headers={"Content-Type": "text/html"})] * 2
    with pytest.raises(UserError, match=r"shard 'http.*/0000\.tar': it is .*text/html.*try again \(2 attempts\)"):
        opened(url, data=remote)
    assert opened(url, data=remote).counts.tolist() == [4]


def test_a_shard_cut_on_its_server_is_used_as_a_local_one(server, remote, told):
    """And is not fetched again each time. Its copy is named, that one may look at it."""
    whole = Path(write_pairs(server.folder, 1, 4, size=8).replace("{0000..0000}", "0000"))
    whole.write_bytes(whole.read_bytes()[: whole.read_bytes().index(b"000002.jpg")])
    here = opened(whole)
    url = f"{server.url}/0000.tar"
    for _ in range(3):
        there = index(remote, url)
        assert (there.counts.tolist(), read_all(there)) == ([2], read_all(here))
        assert there.fingerprint() == here.fingerprint()
    (copy,) = Path(remote.cache_dir, "shards").glob("*.tar")
    assert [line for line in told if "damaged" in line] == [
        f"source 'mine': {url} is damaged, 2 samples are usable: {here.damage(here.shards[0])} (its copy: {copy})"
    ] * 3
    assert [headers.get("if-none-match") is None for _, headers in server.log] == [True, False, False]


def test_an_index_of_an_error_page_from_an_earlier_version_is_made_again(server, remote):
    write_pairs(server.folder, 1, 4, size=8)
    url, page = f"{server.url}/0000.tar", b"<html>" * 500
    cache = ShardCache(remote.cache_dir, 10**8, QUICK, False)
    server.faults["/0000.tar"] = [Fault(body=page)]
    file = cache.open(url)  # unchecked, as it was
    shard = Index(cache_dir=remote.cache_dir).build(url, file)
    os.close(file)
    assert shard.samples == 0
    with open(shard.sidecar, "r+b") as sidecar:
        sidecar.write(b"CSINDEX3")
    assert opened(url, data=remote).counts.tolist() == [4]


@pytest.mark.parametrize("by", ["etags", "dates", "size"])
@pytest.mark.parametrize("evicted", [False, True])
def test_content_that_changed_since_it_was_indexed_is_noticed(server, remote, told, by, evicted):
    server.etags, server.dates = by == "etags", by == "dates"
    url, shard, now = f"{server.url}/0000.tar", server.folder / "0000.tar", 3 if by == "size" else 4
    write_pairs(server.folder, 1, 4, size=8)
    os.utime(shard, (10**9, 10**9))
    before = index(remote, url)
    if evicted:
        evict(remote)
    write_pairs(server.folder, 1, now, size=8, seed=9)
    assert opened(url, data=remote).fingerprint() == before.fingerprint()  # a run does not ask
    server.log.clear()
    after = index(remote, url)
    assert server.requests["/0000.tar"] == 2  # asked, and fetched
    assert after.counts.tolist() == [now]
    assert read_all(after) == read_all(opened(shard))
    assert [line for line in told if "0000.tar changed since it was indexed last: " in line]
    assert index(remote, url).fingerprint() == after.fingerprint() != before.fingerprint()


def test_what_did_not_change_is_asked_for_once_and_not_sent(server, remote):
    write_pairs(server.folder, 1, 4, size=8)
    url = f"{server.url}/0000.tar"
    index(remote, url)
    server.log.clear()
    index(remote, url)
    assert [headers["if-none-match"][:1] for _, headers in server.log] == ['"']
    opened(url, data=remote)
    assert server.requests["/0000.tar"] == 1


def test_a_copy_without_an_index_is_compared_too(server, remote):
    """Such as one that other rules were applied to."""
    write_pairs(server.folder, 1, 4, size=8)
    url = f"{server.url}/0000.tar"
    index(remote, url)
    write_pairs(server.folder, 1, 5, size=8)
    shutil.rmtree(Path(remote.cache_dir, "index"))
    assert index(remote, url).counts.tolist() == [5]


def test_refresh_fetches_and_indexes_anew_whatever_is_said(server, remote):
    server.etags = False
    write_pairs(server.folder, 1, 4, size=8)
    url = f"{server.url}/0000.tar"
    before = index(remote, url)
    path = server.folder / "0000.tar"
    path.write_bytes(path.read_bytes().replace(b"number 1", b"number x"))
    assert index(remote, url).fingerprint() == before.fingerprint()  # nothing tells it: no etag, no date, the same size
    assert index(remote, url, "all").fingerprint() != before.fingerprint()
    assert index(remote, url, "all").read(0, 1).note == b"number x of shard 0"


def test_a_server_that_does_not_answer_leaves_the_index_as_it_is(server, remote, told):
    data, urls = replace(remote, index_jobs=1), f"{server.url}/{{0000..0029}}.tar"
    write_pairs(server.folder, 30, 1, size=8)
    index(data, urls)
    server.log.clear()
    server.faults = {f"/{i:04d}.tar": [Fault(status=503)] for i in range(30)}
    assert index(data, urls).samples == 30
    assert len(told) == 1
    assert re.search(r"could not be compared .* taken as they were: 30 \(http.*00..\.tar: HTTP 503", told[0])
    assert server.requests.total() < 16  # no more once it is clear


# --- outages ----------------------------------------------------------------------------------------------------------


def masked_reads(source: Source, shard: int, more: int = 0) -> int:
    """Reads the shard until it can be read; how often it could not."""
    failed = 0
    while True:
        try:
            source.read(shard, failed % int(source.counts[shard]))
            return failed
        except OSError:
            failed += 1


def outage_of(told: list[str], masked: int) -> str:
    """What was told of one shard that failed for so many reads, and of nothing else: why it failed."""
    begin, end = told
    where, _, why = begin.partition(" fails, its samples are masked until it is back: ")
    assert re.fullmatch(rf"{re.escape(where)} is read again after \d+ s; samples masked meanwhile: {masked:,}", end)
    return why


def test_a_remote_shard_is_read_again_when_its_server_is_back(server, remote, told, tmp_path):
    """Errors, then error pages, then nothing at all."""
    write_pairs(server.folder, 2, 4, size=8)
    quick = replace(remote, fetch=Fetch(retries=1, backoff_seconds=0.01, again_seconds=0.02))
    source = opened(f"{server.url}/{{0000..0001}}.tar", data=quick, counts=declare(server, "file", [4, 4], tmp_path))
    faults = [Fault(status=503)] * 3 + [Fault(body=b"<html>")] * 2 + [Fault(before="close")] + [Fault(status=404)]
    server.faults["/0001.tar"] = faults
    masked = masked_reads(source, 1)
    assert "HTTP 503 Service Unavailable (2 attempts)" in outage_of(told, masked)
    assert masked >= 6
    assert server.requests["/0001.tar"] == len(faults) + 1
    assert [source.read(1, i).key for i in range(4)] == ["000004", "000005", "000006", "000007"]


def test_a_command_that_failed_is_run_again(told, tmp_path):
    write_pairs(tmp_path / "served", 1, 4, size=8)
    fetch = Fetch(retries=0, again_seconds=0.02)
    data = Data(cache_dir=str(tmp_path / "cache"), allow_pipe=True, fetch=fetch)
    (tmp_path / "counts.json").write_text('{"0000.tar": 4}')
    url = f"pipe:echo >> {tmp_path}/runs; test $(wc -l < {tmp_path}/runs) -gt 2 && cat {tmp_path}/served/0000.tar"
    source = opened(url, data=data, counts=str(tmp_path / "counts.json"))
    masked = masked_reads(source, 0)
    assert "ended with status 1" in outage_of(told, masked)
    assert len((tmp_path / "runs").read_text().splitlines()) == 3


@pytest.mark.parametrize("which", ["0000.tar", "0000.tar.index"])
def test_a_handle_that_went_stale_is_opened_again(told, tmp_path, which):
    """As on a network mount whose server was away: the old handle fails for ever (here it becomes a folder's)."""
    source = opened(write_pairs(tmp_path, 1, 4, size=8))
    source.read(0, 0)
    (handle,) = (int(link.name) for link in Path("/proc/self/fd").iterdir() if leads_to(link, tmp_path / which))
    folder = os.open(tmp_path, os.O_RDONLY)
    os.dup2(folder, handle)
    os.close(folder)
    assert masked_reads(source, 0) == 1
    assert "Is a directory" in outage_of(told, 1)


def leads_to(link: Path, path: Path) -> bool:
    with suppress(FileNotFoundError):  # of the listing itself
        return link.samefile(path)
    return False


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOENT])
def test_a_mount_that_fails_for_a_while(monkeypatch, told, tmp_path, number):
    source = opened(write_pairs(tmp_path, 1, 4, size=8))
    real, left = os.open, [5]

    def fail(path, *flags):
        if left[0]:
            left[0] -= 1
            raise OSError(number, os.strerror(number), path)
        return real(path, *flags)

    monkeypatch.setattr(os, "open", fail)
    assert masked_reads(source, 0) == 5
    assert os.strerror(number) in outage_of(told, 5)


def test_many_shards_that_fail_at_once_are_not_all_named(tmp_path, told):
    source = opened(write_pairs(tmp_path, 12, 2, size=8))
    for shard in range(12):
        (tmp_path / f"{shard:04d}.tar").rename(tmp_path / f"{shard:04d}.away")
    for shard in range(12):
        with pytest.raises(OSError, match="No such file"):
            source.read(shard, 1)
    assert len(told) == 8 + 1
    assert "more than 8 shards fail" in told[-1]
    for shard in range(12):
        (tmp_path / f"{shard:04d}.away").rename(tmp_path / f"{shard:04d}.tar")
    read_all(source)
    assert len(told) == 9 + 8 + 1
    assert told[-1].startswith("source 'mine': the shards that were not named are read again")
    assert told[-1].endswith("samples masked meanwhile: 4")
    read_all(source)
    assert len(told) == 18


def test_a_sample_that_cannot_be_read_is_no_outage(server, remote, tmp_path, told):
    write_pairs(server.folder, 1, 4, size=8)
    source = opened(f"{server.url}/0000.tar", data=remote, counts=declare(server, "file", [5], tmp_path))
    with pytest.raises(BadSample, match="4 are usable"):
        source.read(0, 4)
    assert told == []


# --- declared counts --------------------------------------------------------------------------------------------------


def declare(server: Server, kind: str, counts: list[int], tmp_path: Path) -> str | None:
    """Write the counts as `kind` has them; gives the source's `counts`."""
    if kind == "statistics":
        for i, count in enumerate(counts):
            facts = {"count": count + 5, "successes": count, "failed_to_download": 5}
            (server.folder / f"{i:04d}_stats.json").write_text(json.dumps(facts))
        return None
    sizes = json.dumps({f"{i:04d}.tar": count for i, count in enumerate(counts)})
    if kind == "sizes.json":
        (server.folder / "sizes.json").write_text(sizes)
        return None
    (tmp_path / "counts.json").write_text(sizes)
    return str(tmp_path / "counts.json")


@pytest.mark.parametrize("kind", ["sizes.json", "statistics", "file"])
def test_declared_shards_are_not_fetched_ahead(server, remote, tmp_path, kind):
    """But the first, where what declares them was found beside them."""
    expected = read_all(opened(write_pairs(server.folder, 3, 4, size=8)))
    counts = declare(server, kind, [4, 4, 4], tmp_path)
    urls = f"{server.url}/{{0000..0002}}.tar"
    source = opened(urls, data=remote, counts=counts)
    assert source.counts.tolist() == [4, 4, 4]
    fetched = [path for path in server.requests if path.endswith(".tar")]
    assert fetched == ([] if kind == "file" else ["/0000.tar"])
    assert source.where(1, 2) == (f"{server.url}/0001.tar", "number 2")
    assert read_all(pickle.loads(pickle.dumps(source))) == read_all(source) == expected
    assert source.where(1, 2) == (f"{server.url}/0001.tar", "000006")
    again = opened(urls, data=remote, counts=counts)
    assert again.fingerprint() == source.fingerprint()
    evict(remote)
    assert read_all(again) == expected
    assert server.requests["/0001.tar"] == 2


def test_fewer_or_more_than_declared(server, remote, tmp_path, told):
    write_pairs(server.folder, 3, 4, size=8)
    counts = declare(server, "file", [6, 4, 3], tmp_path)
    source = opened(f"{server.url}/{{0000..0002}}.tar", data=remote, counts=counts)
    before = source.fingerprint()
    assert source.read(0, 3).key == "000003"
    for index in (4, 5):
        with pytest.raises(BadSample, match="fewer than declared: 6 samples were declared, 4 are usable"):
            source.read(0, index)
        assert source.where(0, index) == (f"{server.url}/0000.tar", f"number {index}")
    source.read(1, 3)
    assert told == []
    assert source.read(2, 2).key == "000010"
    assert len(told) == 1
    assert "0002.tar: 3 samples were declared, the last 1 usable one stays unused" in told[0]
    assert source.samples == 13
    assert source.fingerprint() == before


def test_a_dead_declared_shard_is_an_error_that_names_it(server, remote, tmp_path):
    write_pairs(server.folder, 2, 4, size=8)
    source = opened(f"{server.url}/{{0000..0001}}.tar", data=remote, counts=declare(server, "file", [4, 4], tmp_path))
    os.unlink(server.folder / "0001.tar")
    for index in range(4):
        with pytest.raises(OSError, match=rf"0001.tar, number {index}: .*404"):
            source.read(1, index)
    assert server.requests["/0001.tar"] == 1
    assert source.read(0, 0).key == "000000"


def test_indexing_ahead_makes_found_counts_needless(server, remote, tmp_path):
    """`clipscale index` fetches what is declared; afterwards what is usable is known, and that counts."""
    write_pairs(server.folder, 2, 4, size=8)
    declare(server, "sizes.json", [4, 5], tmp_path)
    urls = f"{server.url}/{{0000..0001}}.tar"
    lazy = opened(urls, data=remote)
    lazy.read(0, 0)
    lazy.read(1, 0)
    assert opened(urls, data=remote).counts.tolist() == [4, 5]  # what reading found out changes nothing
    assert opened(urls, data=remote, ahead=True).counts.tolist() == [4, 4]
    assert opened(urls, data=remote).counts.tolist() == [4, 4]


def test_shards_that_a_found_file_lacks_are_indexed_at_once(server, remote):
    write_pairs(server.folder, 3, 4, size=8)
    (server.folder / "sizes.json").write_text('{"0000.tar": 4, "0001.tar": "many", "0002.tar": true}')
    source = opened(f"{server.url}/{{0000..0002}}.tar", data=remote)
    assert source.counts.tolist() == [4, 4, 4]
    assert [bool(shard.sidecar) for shard in source.shards] == [False, True, True]


@pytest.mark.parametrize("content", ["[1]", "no JSON", "[" * 5000, ""])
def test_found_files_of_another_form_are_passed_over(server, remote, content):
    write_pairs(server.folder, 1, 4, size=8)
    (server.folder / "sizes.json").write_text(content)
    assert opened(f"{server.url}/0000.tar", data=remote).counts.tolist() == [4]


def test_a_page_instead_of_counts_does_not_stick(server, remote):
    write_pairs(server.folder, 1, 4, size=8)
    (server.folder / "sizes.json").write_text('{"0000.tar": 4}')
    server.faults["/sizes.json"] = [Fault(body=b"<html>")]
    assert opened(f"{server.url}/0000.tar", data=remote).shards[0].sidecar
    shutil.rmtree(Path(remote.cache_dir, "index"))
    assert not opened(f"{server.url}/0000.tar", data=remote).shards[0].sidecar  # declared


def test_a_server_that_fails_says_nothing_about_counts(server, remote):
    """Else a node that reaches it and one that does not would disagree about the order."""
    (server.folder / "Permission").mkdir()  # a name that could be taken for what went wrong
    write_pairs(server.folder / "Permission", 1, 4, size=8)
    server.faults["/Permission/sizes.json"] = [Fault(status=503)] * 9
    with pytest.raises(UserError, match=r"sizes.json: HTTP 503 .*how many samples.*: try again later"):
        opened(f"{server.url}/Permission/0000.tar", data=remote)


@pytest.mark.parametrize("status", [403, 404])
def test_a_server_that_has_or_shows_no_counts(server, remote, status):
    write_pairs(server.folder, 1, 4, size=8)
    server.faults["/sizes.json"] = [Fault(status=status)] * 9
    assert opened(f"{server.url}/0000.tar", data=remote).counts.tolist() == [4]
    assert server.requests["/sizes.json"] == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "must be a JSON object"),
        ("{", "cannot be read"),
        (None, "cannot be read"),
        ('{"0000.tar": 4}', "has no number of samples for shard '0001.tar'"),
        ('{"0000.tar": 4, "0001.tar": -1}', "has no number of samples for shard '0001.tar'"),
        ('{"0000.tar": 4, "0001.tar": 1.5}', "has no number of samples for shard '0001.tar'"),
        ('{"0000.tar": 0, "0001.tar": 0}', "none of its 2 shards"),
    ],
)
def test_counts_files_that_cannot_be_used(server, remote, tmp_path, content, message):
    if content is not None:
        (tmp_path / "counts.json").write_text(content)
    with pytest.raises(UserError, match=message):
        opened(f"{server.url}/{{0000..0001}}.tar", data=remote, counts=str(tmp_path / "counts.json"))


def test_counts_by_url_where_names_are_the_same(server, remote, tmp_path):
    urls = f"{server.url}/{{a,b}}/0.tar"
    (tmp_path / "counts.json").write_text('{"0.tar": 3}')
    with pytest.raises(UserError, match="is the name of 2 shards"):
        opened(urls, data=remote, counts=str(tmp_path / "counts.json"))
    (tmp_path / "counts.json").write_text(
        json.dumps({f"{server.url}/{name}/0.tar": n for name, n in (("a", 1), ("b", 2))})
    )
    assert opened(urls, data=remote, counts=str(tmp_path / "counts.json")).counts.tolist() == [1, 2]


def test_local_shards_are_counted_not_declared(tmp_path):
    urls = write_pairs(tmp_path, 1, 4, size=8)
    (tmp_path / "sizes.json").write_text('{"0000.tar": 99}')
    assert opened(urls).counts.tolist() == [4]
    assert opened(urls, counts=str(tmp_path / "none.json")).counts.tolist() == [4]
