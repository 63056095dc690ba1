"""clipscale/data/shard/index.py, sidecar.py, index_many.py: sidecars whole, stale and damaged; many shards at once."""

import dataclasses
import hashlib
import json
import os
import random
import signal
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import alive, parent, wait_until
from shards import picture, write_pairs, write_shard

from clipscale.config.data import Data, Fetch, Select, SourceSettings
from clipscale.data.fetch.cache import ShardCache
from clipscale.data.shard import index as index_module
from clipscale.data.shard import index_many as indexing
from clipscale.data.shard import sidecar
from clipscale.data.shard.index import Index, Shard
from clipscale.data.shard.index_many import index_shards, write_refused
from clipscale.data.shard.select import Chosen, Rules
from clipscale.data.shard.writer import ShardWriter
from clipscale.data.source import open_source
from clipscale.errors import UserError

JPEG = picture(0, 16, 16)


def pair(caption: bytes = b"a caption", image: bytes = JPEG) -> dict[str, bytes]:
    return {"jpg": image, "txt": caption}


def index_shard(path: str, **settings) -> Shard:
    index = Index(**settings)
    return index.known(path) or index.build(path)


def rows(shard: Shard) -> list[sidecar.Row]:
    with open(shard.sidecar, "rb") as file:
        records = sidecar.Records.of(file.fileno(), shard.identity)
        return [records.read(i) for i in range(shard.samples)]


def keys(shard: Shard) -> list[str]:
    return [row.key for row in rows(shard)]


@pytest.fixture
def builds(monkeypatch) -> list[str]:
    """The shards indexed from their bytes so far."""
    done = []
    select_samples = index_module.select_samples

    def count(tar: bytes, *rest) -> Chosen:
        done.append(len(tar))
        return select_samples(tar, *rest)

    monkeypatch.setattr(index_module, "select_samples", count)
    return done


@pytest.fixture
def hashed(monkeypatch) -> list[str]:
    """The kinds of hash that were taken of whole shards so far."""
    done = []
    take = index_module.hash_file

    def hash_file(file, *, crc32: bool, sha256: bool) -> dict:
        assert crc32
        done.append("sha256" if sha256 else "crc32")
        return take(file, crc32=crc32, sha256=sha256)

    monkeypatch.setattr(index_module, "hash_file", hash_file)
    return done


@pytest.fixture
def shard_path(tmp_path) -> str:
    return str(write_shard(tmp_path / "shard.tar", [(str(i), pair()) for i in range(3)]))


# --- what a sidecar holds ---------------------------------------------------------------------------------------------


def test_a_sidecar_says_what_the_shard_holds(tmp_path):
    samples = [(f"k{i}" * (1 + 20 * (i % 2)), {"jpg": b"j" * i, "json": b"{}", "txt": b"t%d" % i}) for i in range(300)]
    path = write_shard(tmp_path / "x.tar", samples)
    data = path.read_bytes()
    shard = index_shard(str(path), hash="sha256")
    assert (shard.bytes, shard.crc32) == (len(data), zlib.crc32(data))
    assert shard.sha256 == hashlib.sha256(data).hexdigest()
    assert (shard.samples, shard.cut, shard.refused, shard.not_read, shard.changed) == (300, "", {}, {}, "")
    for (key, sample), row in zip(samples, rows(shard), strict=True):
        assert row.key == key
        assert data[row.image_offset : row.image_offset + row.image_size] == sample["jpg"]
        assert data[row.note_offset : row.note_offset + row.note_size] == sample["txt"]


spans = st.tuples(
    st.integers(0, 2**63 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**63 - 1), st.integers(0, 2**32 - 1)
)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.text(st.characters(exclude_categories=["Cs"]), max_size=40), spans), max_size=9))
def test_what_is_written_is_read(tmp_path_factory, samples):
    import numpy as np

    place = tmp_path_factory.mktemp("sidecar") / "x.index"
    found = [key for key, _ in samples], np.array([span for _, span in samples], np.int64).reshape(-1, 4)
    facts = sidecar.write(place, {"bytes": 7, "crc32": 9}, found[1], found[0])
    assert (
        sidecar.read_facts(place)
        == facts
        == {"bytes": 7, "crc32": 9, "samples": len(samples)} | {"identity": facts["identity"]}
    )
    with open(place, "rb") as file:
        records = sidecar.Records.of(file.fileno(), facts["identity"])
        assert [records.read(i) for i in range(len(samples))] == [(key, *span) for key, span in samples]
        with pytest.raises(OSError, match="is damaged"):
            records.read(len(samples))


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_a_damaged_sidecar_is_an_error_or_another_identity_never_another_sample(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("damage")
    shard = index_shard(str(write_shard(folder / "x.tar", [(f"k{i}", pair(b"%d" % i)) for i in range(5)])))
    expected, content = rows(shard), bytearray(Path(shard.sidecar).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    Path(shard.sidecar).write_bytes(content)
    for i in range(5):
        with open(shard.sidecar, "rb") as file, suppress(OSError):
            assert sidecar.Records.of(file.fileno(), shard.identity).read(i) == expected[i]
    facts = sidecar.read_facts(Path(shard.sidecar))
    assert facts == {} or (facts["samples"], facts["identity"]) == (5, shard.identity)


def test_nothing_is_kept_for_each_sample(tmp_path):
    shards = [write_shard(tmp_path / f"{n}.tar", [(f"{i}", pair(image=b"j")) for i in range(n)]) for n in (10, 4000)]
    held = []
    for path in shards:
        Index().build(str(path))
        tracemalloc.start()
        shard = Index().known(str(path))
        with open(shard.sidecar, "rb") as file:
            records = sidecar.Records.of(file.fileno(), shard.identity)
            found = [records.read(i).key for i in range(0, shard.samples, shard.samples // 10)]
            assert len(found) == 10
            held.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
    assert held[1] < held[0] + 1000


# --- when it is used again, and when not ------------------------------------------------------------------------------


def test_a_current_sidecar_is_used_again(shard_path, builds):
    first = index_shard(shard_path)
    assert index_shard(shard_path) == first
    assert len(builds) == 1
    assert Path(first.sidecar) == Path(shard_path + ".index")
    assert keys(first) == ["0", "1", "2"]


def test_a_changed_shard_is_indexed_again_and_told(shard_path, builds):
    first = index_shard(shard_path)
    os.utime(shard_path, ns=(1, 1))
    touched = index_shard(shard_path)
    assert (touched.changed, touched.identity) == ("", first.identity)
    write_shard(Path(shard_path), [("other", pair())])
    second = index_shard(shard_path)
    assert keys(second) == ["other"]
    assert (
        second.changed
        == f"{first.bytes} bytes, crc32 {first.crc32:08x} -> {second.bytes} bytes, crc32 {second.crc32:08x}"
    )
    assert len(builds) == 3
    assert index_shard(shard_path).changed == ""


def test_shards_keep_the_identity_they_had_under_the_sidecars_of_before(tmp_path, builds):
    """Else a checkpoint from then would not resume on them. The numbers are those of version 3."""
    with ShardWriter(tmp_path / "old", samples_per_shard=5) as writer:
        for i in range(10):
            writer.write(f"{i:03d}", {"jpg": b"picture %d" % i, "txt": f"caption {i}"})
    shards = [index_shard(str(path)) for path in writer.paths]
    for shard in shards:
        place = Path(shard.sidecar)
        place.write_bytes(place.read_bytes().replace(b"CSINDEX4", b"CSINDEX3"))
        assert index_shard(shard.url) == shard
    assert [shard.identity for shard in shards] == [4793332251221862904, 10882249558224812460]
    assert len(builds) == 4
    source = open_source("s", SourceSettings(f"{tmp_path}/*.tar"), Data(), need="pairs")
    assert source.fingerprint() == "7d9b3e9de187f76e"  # of a checkpoint's `content`


def test_a_shard_that_changes_while_it_is_indexed_is_an_error(shard_path, monkeypatch):
    select_samples = index_module.select_samples

    def grow(*arguments):
        with open(shard_path, "ab") as file:
            file.write(bytes(512))
        return select_samples(*arguments)

    monkeypatch.setattr(index_module, "select_samples", grow)
    with pytest.raises(OSError, match="written to while it was indexed"):
        index_shard(shard_path)
    assert not Path(shard_path + ".index").exists()


def test_the_index_of_a_run_is_not_exchanged_under_it(shard_path):
    shard = index_shard(shard_path)
    write_shard(Path(shard_path), [("other", pair())])
    index_shard(shard_path)
    with pytest.raises(OSError, match="was built again while this run was using it"):
        rows(shard)


@pytest.mark.parametrize("damage", ["empty", "garbage", "cut", "flipped", "other version", "old npz", "no records"])
def test_a_damaged_sidecar_is_built_again(shard_path, builds, damage):
    shard = index_shard(shard_path)
    place = Path(shard.sidecar)
    data = place.read_bytes()
    flipped = bytearray(data)
    flipped[40] ^= 0x55
    place.write_bytes(
        {
            "empty": b"",
            "garbage": random.Random(0).randbytes(500),
            "cut": data[:50],
            "flipped": bytes(flipped),
            "other version": data.replace(b"CSINDEX4", b"CSINDEX3"),
            "old npz": b"PK\3\4" + bytes(100),
            "no records": data[: struct.unpack_from("<I", data, 8)[0] + 32],
        }[damage]
    )
    assert index_shard(shard_path) == shard
    assert len(builds) == 2
    assert keys(shard) == ["0", "1", "2"]


def test_other_rules_have_a_sidecar_of_their_own_and_hash_nothing_again(shard_path, builds, hashed):
    first = index_shard(shard_path)
    small = Rules(select=Select(min_side=20))
    none = index_shard(shard_path, rules=small)
    assert (none.samples, none.refused) == (0, {"picture too small": 3})
    assert none.crc32 == first.crc32
    assert none.identity != first.identity
    assert index_shard(shard_path, rules=small) == none
    assert index_shard(shard_path) == first
    assert (len(builds), hashed) == (2, ["crc32"])
    assert sorted(path.name for path in Path(shard_path).parent.iterdir()) == sorted(
        ["shard.tar", "shard.tar.index", f"shard.tar.{small.tag}.index"]
    )


def test_sha256_is_added_where_it_is_wanted(shard_path, builds, hashed):
    plain = index_shard(shard_path)
    strong = index_shard(shard_path, hash="sha256")
    assert (plain.sha256, strong.sha256) == (None, hashlib.sha256(Path(shard_path).read_bytes()).hexdigest())
    assert strong.identity == plain.identity
    assert index_shard(shard_path) == strong
    assert hashed == ["crc32", "sha256"]


def test_without_a_home_folder_shards_are_indexed_beside_themselves(shard_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("os.getuid", lambda: 2**31 - 7)
    assert index_shard(shard_path).sidecar == shard_path + ".index"


def test_index_dir_and_the_cache_are_used_where_the_folder_cannot_be_written(shard_path, tmp_path, builds, monkeypatch):
    elsewhere = index_shard(shard_path, index_dir=str(tmp_path / "index"))
    assert Path(elsewhere.sidecar).parent == tmp_path / "index"
    assert not Path(shard_path + ".index").exists()

    write = sidecar.write

    def write_but_not_beside(place, *rest):
        if place.parent == Path(shard_path).parent:
            raise PermissionError(place)
        return write(place, *rest)

    monkeypatch.setattr(sidecar, "write", write_but_not_beside)
    cached = index_shard(shard_path, cache_dir=str(tmp_path / "cache"))
    assert Path(cached.sidecar).parent == tmp_path / "cache" / "index"
    assert index_shard(shard_path, cache_dir=str(tmp_path / "cache")) == cached
    assert len(builds) == 2
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match="cannot write the index to any of"):
        index_shard(shard_path, cache_dir=str(tmp_path / "file"))


def test_shards_of_one_name_do_not_share_a_sidecar(tmp_path):
    paths = [write_shard(tmp_path / name / "0.tar", [(name, pair())]) for name in ("a", "b")]
    shards = [index_shard(str(path), index_dir=str(tmp_path / "index")) for path in paths]
    assert [keys(shard) for shard in shards] == [["a"], ["b"]]


def test_an_interrupted_write_leaves_no_sidecar(shard_path, tmp_path, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        index_shard(shard_path)
    assert [p.name for p in tmp_path.iterdir()] == ["shard.tar"]


def test_the_identity_follows_the_content_not_the_place(tmp_path):
    samples = [(str(i), pair(b"caption %d" % i)) for i in range(3)]
    here = index_shard(str(write_shard(tmp_path / "here" / "a.tar", samples)))
    there = index_shard(str(write_shard(tmp_path / "there" / "b.tar", samples)))
    assert there.identity == here.identity
    samples[1] = ("1", pair(b"caption X"))  # as long as before
    changed = index_shard(str(write_shard(tmp_path / "changed.tar", samples)))
    assert (changed.bytes, changed.samples) == (here.bytes, here.samples)
    assert changed.identity != here.identity


# --- rewritten with its size and its time -----------------------------------------------------------------------------


def change_inode(path: str, change: Callable[[], None]) -> None:
    """Until its time is another: a file system's clock ticks every few milliseconds."""
    before = os.stat(path).st_ctime_ns
    while os.stat(path).st_ctime_ns == before:
        change()


def rewrite(path: str, samples: list[tuple[str, dict[str, bytes]]], *, in_place: bool) -> None:
    """Another content of the same size, and the time put back."""
    stat = os.stat(path)
    new = write_shard(Path(path + ".new"), samples)
    if in_place:
        Path(path).write_bytes(new.read_bytes())
        new.unlink()
    else:
        os.replace(new, path)
    change_inode(path, lambda: os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns)))
    assert (os.stat(path).st_size, os.stat(path).st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)


SAME, OTHER = [(str(i), pair()) for i in range(3)], [(f"{i}", pair(b"A CAPTION")) for i in range(3, 6)]


@pytest.mark.parametrize("in_place", [True, False])
def test_a_shard_rewritten_with_its_size_and_time_is_noticed(shard_path, in_place):
    first = index_shard(shard_path)
    rewrite(shard_path, OTHER, in_place=in_place)
    second = index_shards([shard_path], Index(), None)[0]
    assert keys(second) == ["3", "4", "5"]
    assert second.changed == (
        f"{first.bytes} bytes, crc32 {first.crc32:08x} -> {second.bytes} bytes, crc32 {second.crc32:08x}"
    )
    assert second.identity != first.identity


@pytest.mark.parametrize("in_place", [True, False])
def test_the_same_bytes_anew_are_hashed_once_and_nothing_is_built(shard_path, builds, hashed, in_place):
    first = index_shard(shard_path)
    rewrite(shard_path, SAME, in_place=in_place)
    for _ in range(3):
        assert index_shards([shard_path], Index(), None) == [first]
    assert (len(builds), hashed) == (1, ["crc32", "crc32"])
    assert [row.key for row in rows(first)] == ["0", "1", "2"]
    change_inode(shard_path, lambda: os.chmod(shard_path, 0o600))
    assert index_shard(shard_path, rules=Rules(select=Select(min_side=3))).samples == 3
    assert hashed == ["crc32"] * 3  # not by what the doubtful sidecar says
    assert index_shard(shard_path) == first
    assert (len(builds), hashed) == (2, ["crc32"] * 4)


def test_the_stamp_of_another_host_is_not_compared(shard_path, hashed, monkeypatch):
    """On a shared folder each host may see numbers of its own: they would index in turn, for ever."""
    first = index_shard(shard_path)
    content = Path(first.sidecar).read_bytes()
    monkeypatch.setattr(index_module, "_host", lambda: "another")
    change_inode(shard_path, lambda: os.chmod(shard_path, 0o600))
    assert index_shard(shard_path) == first
    monkeypatch.undo()
    assert Path(first.sidecar).read_bytes() == content
    assert b'"host"' in content


def test_a_stamp_that_cannot_be_written_is_remembered(shard_path, tmp_path, builds, monkeypatch):
    first = index_shard(shard_path)
    rewrite(shard_path, SAME, in_place=True)
    checked = []
    take = index_module.hash_file
    monkeypatch.setattr(index_module, "hash_file", lambda file, **kinds: checked.append(file) or take(file, **kinds))
    put = sidecar._put

    def put_elsewhere(place, *rest):
        if place.parent == Path(shard_path).parent:
            raise PermissionError(place)
        put(place, *rest)

    monkeypatch.setattr(sidecar, "_put", put_elsewhere)
    cached = index_shards([shard_path], Index(cache_dir=str(tmp_path / "cache")), None)
    assert Path(cached[0].sidecar).parent == tmp_path / "cache" / "index"
    assert rows(cached[0]) == rows(first)
    assert index_shards([shard_path], Index(cache_dir=str(tmp_path / "cache")), None) == cached
    assert len(checked) == 1
    (tmp_path / "file").write_bytes(b"")
    for _ in range(3):
        assert index_shards([shard_path], Index(cache_dir=str(tmp_path / "file")), None) == [first]
    assert (len(checked), len(builds)) == (2, 1)
    rewrite(shard_path, SAME, in_place=False)
    assert index_shards([shard_path], Index(cache_dir=str(tmp_path / "file")), None) == [first]
    assert (len(checked), len(builds)) == (3, 1)


# --- how much is lost -------------------------------------------------------------------------------------------------


def cut_at(path: str, name: bytes) -> None:
    data = Path(path).read_bytes()
    Path(path).write_bytes(data[: data.index(name)])


def test_what_a_shard_lost_is_known_from_its_former_index(tmp_path):
    samples = [(f"{i}", pair(b"" if i == 1 else b"x")) for i in range(8)]
    path = str(write_shard(tmp_path / "x.tar", samples))
    whole = index_shard(path)
    assert (whole.samples, whole.refused, whole.lost, whole.unread) == (7, {"empty caption": 1}, 0, 0)
    cut_at(path, b"6.txt")
    cut = index_shard(path)
    assert (cut.samples, cut.refused, cut.lost) == (5, {"empty caption": 1, "no caption": 1}, 1)
    assert index_shard(path) == dataclasses.replace(cut, changed="")
    cut_at(path, b"3.jpg")
    assert (index_shard(path).samples, index_shard(path).lost) == (2, 5)
    write_shard(Path(path), samples)
    assert (index_shard(path).samples, index_shard(path).lost) == (7, 0)
    cut_at(path, b"3.jpg")
    other_rules = index_shard(path, rules=Rules(select=Select(min_side=20)))
    assert (other_rules.samples, other_rules.lost) == (0, 0)  # nobody has counted by these


def test_the_index_of_before_knows_too(shard_path, hashed):
    place = Path(index_shard(shard_path).sidecar)
    place.write_bytes(place.read_bytes().replace(b"CSINDEX4", b"CSINDEX3"))
    assert index_shard(shard_path).samples == 3
    assert hashed == ["crc32"]  # of the same bytes: not read again
    place.write_bytes(place.read_bytes().replace(b"CSINDEX4", b"CSINDEX3"))
    cut_at(shard_path, b"1.jpg")
    assert (index_shard(shard_path).lost, index_shard(shard_path).samples) == (2, 1)


@pytest.mark.parametrize(
    ("name", "content", "lost"),
    [
        ("shard_stats.json", '{"count": 9, "successes": 7}', 5),
        ("sizes.json", '{"shard.tar": 4}', 2),
        ("sizes.json", '{"shard.tar": 1}', 0),
        ("sizes.json", '{"shard.tar": true}', 0),
        ("sizes.json", "[1]", 0),
        ("shard_stats.json", "no JSON", 0),
    ],
)
def test_a_file_beside_a_damaged_shard_knows(shard_path, name, content, lost):
    Path(shard_path).with_name(name).write_text(content)
    assert index_shard(shard_path).lost == 0
    Path(shard_path + ".index").unlink()
    cut_at(shard_path, b"2.jpg")
    assert (index_shard(shard_path).samples, index_shard(shard_path).lost) == (2, lost)


def test_bytes_behind_the_damage_are_counted(shard_path):
    data = bytearray(Path(shard_path).read_bytes())
    start = data.index(b"1.jpg")
    data[start] ^= 1
    Path(shard_path).write_bytes(data)
    shard = index_shard(shard_path)
    assert (shard.samples, shard.lost) == (1, 0)
    assert shard.unread == len(data) - start


# --- many shards ------------------------------------------------------------------------------------------------------


@pytest.fixture
def in_processes(monkeypatch) -> None:
    """As if the shards were large: workers at once."""
    monkeypatch.setattr(indexing, "_INLINE_BYTES", {"fast": 0, "decode": 0})


def paths_of(folder: Path, shards: int, **settings) -> list[str]:
    write_pairs(folder, shards, 3, size=8, **settings)
    return [f"{folder}/{i:04d}.tar" for i in range(shards)]


def test_processes_find_what_one_finds(tmp_path, in_processes):
    paths = paths_of(tmp_path, 5)
    rules = Rules(caption="TXT", select=Select(min_side=4))
    shown = []
    ours = index_shards(paths, Index(rules), None, jobs=2, track=lambda urls, label: shown.append(label) or urls)
    assert shown == ["indexing"]
    written = [Path(shard.sidecar).read_bytes() for shard in ours]
    assert [shard.url for shard in ours] == paths
    for shard in ours:
        os.unlink(shard.sidecar)
    assert [Index(rules).build(path) for path in paths] == ours
    assert [Path(shard.sidecar).read_bytes() for shard in ours] == written
    assert index_shards(paths, Index(rules), None, track=lambda *_: pytest.fail("nothing is left to do")) == ours


def test_only_what_is_missing_is_indexed(tmp_path, builds):
    paths = paths_of(tmp_path, 4)
    index_shards(paths[:2], Index(), None)
    index_shards(paths, Index(), None)
    assert len(builds) == 4


def test_the_readable_shards_are_indexed_before_the_others_are_told(tmp_path):
    paths = paths_of(tmp_path, 4)
    for path in paths[1:3]:
        os.unlink(path)
    with pytest.raises(UserError, match=r"0001.tar'.*No such file.*\(and 1 more of 4 shards\)"):
        index_shards(paths, Index(), None)
    assert Index().known(paths[3]) is not None


def killed(*_) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def ended(*_) -> None:
    os._exit(3)


def stuck(url: str, *_) -> None:
    Path(f"{url}.{os.getpid()}.pid").touch()
    time.sleep(600)


def test_a_killed_worker_is_one_clear_error(tmp_path, in_processes, monkeypatch):
    paths = paths_of(tmp_path, 6)
    monkeypatch.setattr(indexing, "_build", killed)
    with pytest.raises(UserError, match=r"shard '.*tar': the process that indexed it was killed by SIGKILL"):
        index_shards(paths, Index(), None, jobs=2)
    monkeypatch.setattr(indexing, "_build", ended)
    with pytest.raises(UserError, match="ended with status 3"):
        index_shards(paths, Index(), None, jobs=2)


def test_a_worker_that_is_killed_while_it_works(tmp_path, in_processes, monkeypatch):
    """It is busy (it never answers); the error comes with its death, names its shard, and the other worker is ended."""
    paths = paths_of(tmp_path, 6)
    monkeypatch.setattr(indexing, "_build", stuck)
    pids = {}

    def kill():
        while len(pids) < 2:
            time.sleep(0.01)
            pids.update(path.name.split(".")[::2] for path in tmp_path.glob("*.pid"))
        os.kill(int(pids["0001"]), signal.SIGTERM)

    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(UserError, match=r"0001.tar': the process that indexed it was killed by SIGTERM"):
        index_shards(paths, Index(), None, jobs=2)
    thread.join()
    assert not any(alive(int(pid)) for pid in pids.values())


def test_workers_are_no_part_of_the_main_program(tmp_path):
    """A script without a __main__ guard is not run again by them, and signals to its group do not reach them."""
    paths = paths_of(tmp_path, 30)
    script = tmp_path / "script.py"
    script.write_text(
        "import os, signal\n"
        "from clipscale.data.shard import index_many as indexing\n"
        "from clipscale.data.shard.index import Index\n"
        "for number in (signal.SIGUSR1, signal.SIGTERM):\n"
        "    signal.signal(number, lambda *_: None)\n"
        "indexing._INLINE_BYTES['fast'] = 0\n"
        "def track(urls, label):\n"
        "    for number, url in enumerate(urls):\n"
        "        if number:\n"  # the workers have been started
        "            os.killpg(0, signal.SIGUSR1)\n"
        "            os.killpg(0, signal.SIGTERM)\n"
        "        yield url\n"
        f"print(sum(s.samples for s in indexing.index_shards({paths!r}, Index(), None, jobs=2, track=track)))\n"
    )
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=300, start_new_session=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "90\n", "")


def test_a_remote_shard_that_cannot_be_had_does_not_end_the_others(tmp_path, in_processes):
    paths = paths_of(tmp_path, 3)
    cache = ShardCache(str(tmp_path / "cache"), None, Fetch(retries=0), allow_pipe=True)
    index = Index(cache_dir=str(tmp_path / "cache"))
    there, gone = f"pipe:cat {write_shard(tmp_path / 'x.tar', [('a', pair())])}", "pipe:exit 7"
    with pytest.raises(
        UserError, match=r"shard 'pipe:exit 7': (?!pipe).*ended with status 7.*; mend that, or take the shard out"
    ):
        index_shards([gone, paths[0], there, *paths[1:]], index, cache, jobs=2)
    again = index_shards([there, *paths], index, cache, track=lambda *_: pytest.fail("they are indexed"))
    assert [shard.samples for shard in again] == [1, 3, 3, 3]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nothing_goes_on_behind_an_indexing_that_is_ended(tmp_path, number):
    """No worker, no command of theirs, no file half written."""
    urls = [f"pipe:echo $$ > {tmp_path}/{i}.pid; exec sleep 600" for i in range(3)]
    code = (
        "import sys; from clipscale.data.shard.index import Index\n"
        "from clipscale.data.shard.index_many import index_shards\n"
        "from clipscale.config.data import Fetch; from clipscale.data.fetch.cache import ShardCache\n"
        "index_shards(sys.argv[2:], Index(), ShardCache(sys.argv[1], None, Fetch(), allow_pipe=True), jobs=2)"
    )
    main = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "cache", *urls],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_until(lambda: sum(path.stat().st_size > 0 for path in tmp_path.glob("*.pid")) == 2)
    commands = [int(path.read_text()) for path in tmp_path.glob("*.pid")]
    workers = [parent(pid) for pid in commands]
    assert len(set(workers)) == 2
    os.killpg(main.pid, number) if number == signal.SIGINT else main.kill()
    error = main.communicate(timeout=300)[1]
    wait_until(lambda: not any(map(alive, [*workers, *commands])))
    assert not [*(tmp_path / "cache" / "shards" / "parts").iterdir()]
    assert error.count("Traceback") == (number == signal.SIGINT)  # the program's own


def test_processes_that_index_the_same_shards_at_once_do_not_disturb_each_other(tmp_path):
    paths = paths_of(tmp_path / "shards", 4)
    code = (
        "import json, sys; from clipscale.data.shard.index import Index\n"
        "from clipscale.data.shard.index_many import index_shards\n"
        "print([s.identity for s in index_shards(json.loads(sys.argv[1]), Index(), None)])"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", code, json.dumps(paths)], stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    answers = {process.communicate(timeout=300)[0] for process in running}
    assert [process.returncode for process in running] == [0] * 4
    assert answers == {f"{[shard.identity for shard in index_shards(paths, Index(), None)]}\n"}
    assert len([*(tmp_path / "shards").iterdir()]) == 8  # no temporary file is left


def test_refused_samples_are_named_whoever_looks(tmp_path, in_processes):
    paths = [
        str(write_shard(tmp_path / "a.tar", [("1", pair()), ("2", pair(b" ")), ("3", {"jpg": JPEG})])),
        str(write_shard(tmp_path / "b.tar", [("1", pair(b"\xff")), ("x\n", {"gif": b"", "txt": b"x"})])),
    ]
    found = []
    for jobs in (1, 2):
        assert write_refused(str(tmp_path / "refused.jsonl"), paths, Index(), None, jobs=jobs) == 4
        found.append([json.loads(line) for line in (tmp_path / "refused.jsonl").read_text().splitlines()])
    assert found[0] == found[1]
    assert [(row["shard"], row["key"], row["member"], row["cause"]) for row in found[0]] == [
        (paths[0], "2", "2.txt", "empty caption"),
        (paths[0], "3", "3.jpg", "no caption"),
        (paths[1], "1", "1.txt", "caption is not UTF-8"),
        (paths[1], "x\n", "x\n.gif", "picture of another format"),
    ]
    assert Path(paths[0]).read_bytes()[found[0][0]["offset"] :][:2] == b" \0"


def test_an_error_of_a_worker_is_told_as_here(tmp_path, in_processes):
    paths = paths_of(tmp_path, 2)
    rules = Rules(select=Select(uids=str(tmp_path / "none.txt")), uids_hash="x")
    with pytest.raises(UserError, match=r"none\.txt' cannot be read"):
        index_shards(paths, Index(rules), None, jobs=2)
