import gzip
import io
import json
import os
import random
import shutil
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from shards import picture, write_shard, write_tar

from clipscale.data import index as index_module
from clipscale.data.index import IMAGE_SUFFIXES, index_shard
from clipscale.data.source import Source, open_source
from clipscale.data.tar import list_members
from clipscale.errors import UserError

JPEG = picture(0, 16, 16)


def pair(caption: bytes = b"a caption", image: bytes = JPEG) -> dict[str, bytes]:
    return {"jpg": image, "txt": caption}


def read_all(path: Path, need: str = "pairs") -> list[tuple[str, bytes, bytes]]:
    source = Source("test", [index_shard(str(path))], need)
    samples = [tuple(source.read(0, i)) for i in range(source.samples)]
    source.close()
    return samples


# --- webdataset's reader is the oracle --------------------------------------------------------------------------------


def read_with_webdataset(path: Path) -> list[tuple[str, bytes, bytes]]:
    samples = []
    for sample in webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False):
        image = next((sample[suffix] for suffix in IMAGE_SUFFIXES if suffix in sample), None)
        text = sample.get("txt", b"")
        if image is not None and text.strip():
            samples.append((sample["__key__"], image, text))
    return samples


keys = st.builds(
    "".join,
    st.tuples(
        st.sampled_from(["", "", "a/", "a/b.c/", "./", "/abs/", "__x/", "__meta__/", "é/", "long/" * 40]),
        st.text("ab01_-é ", min_size=1, max_size=4) | st.sampled_from(["k" * 120, "__k__", "ключ" * 30]),
    ),
)
suffixes = st.sampled_from(
    ["jpg", "JPG", "jpeg", "png", "webp", "txt", "Txt", "cls", "json", "thumb.jpg", "txt.gz", ""]
)
members = st.permutations(["JPG", "txt", "cls"]) | st.lists(suffixes, min_size=1, max_size=4, unique_by=str.lower)
formats = st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(keys, members)), formats, st.randoms())
def test_the_index_reads_what_webdataset_reads(tmp_path_factory, groups, format, random):
    path = tmp_path_factory.mktemp("fuzz") / "shard.tar"
    with tarfile.open(path, "w", format=format) as tar:
        for name in [f"{key}.{suffix}" if suffix else key for key, parts in groups for suffix in parts]:
            member = tarfile.TarInfo(name)
            data = random.randbytes(random.choice([0, 1, 511, 512, 513, 1300]))
            if name.lower().endswith("txt"):
                data = data.hex().encode()
            member.size = len(data)
            try:
                tar.addfile(member, io.BytesIO(data))
            except ValueError:  # ustar cannot hold the name
                continue
            if random.random() < 0.2:
                other = tarfile.TarInfo(f"folder{random.random()}")
                other.type = random.choice([tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
                other.linkname = "elsewhere"
                tar.addfile(other)
    try:
        expected = read_with_webdataset(path)
    except ValueError:  # two samples of one key in a row
        reject()
    assert read_all(path) == expected
    assert index_shard(str(path)).cut == ""


def test_long_names_directories_and_odd_members(tmp_path):
    """The same without chance: each feature is there and each sample is found."""
    key = "folder/" * 30 + "k" * 90
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = tmp_path / f"{format}.tar"
        members = [
            ("__meta__/shards.txt", b"x"),
            ("__info__", b"x"),
            (f"{key}.JPG", b"image 1"),
            (f"{key}.txt", b"text 1"),
            ("readme", b"no suffix"),
            ("b.thumb.jpg", b"not the picture"),
            ("b.txt", b"text 2"),
            ("b.png", b"image 2"),
            ("b.json", b"{}"),
        ]
        write_tar(path, members, format)
        assert read_all(path) == [(key, b"image 1", b"text 1"), ("b", b"image 2", b"text 2")]
        assert read_with_webdataset(path) == read_all(path)


def test_an_apple_double_or_hidden_file_does_not_split_a_sample(tmp_path):
    members = [("d/._1.jpg", b"x"), ("d/1.jpg", b"image"), ("d/._1.txt", b"x"), ("d/1.txt", b"text")]
    assert read_all(write_tar(tmp_path / "mac.tar", members)) == [("d/1", b"image", b"text")]


def test_names_that_are_not_utf8_stay_apart(tmp_path):
    path = tmp_path / "latin.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT, encoding="latin-1") as tar:
        for name in ("é.jpg", "é.txt", "è.jpg", "è.txt"):
            member = tarfile.TarInfo(name)
            member.size = 5
            tar.addfile(member, io.BytesIO(name.encode()[:2] + b"txt"))
    samples = read_all(path)
    assert [key for key, _, _ in samples] == ["\\xe9", "\\xe8"]
    assert [text for _, _, text in samples] == ["étxt".encode(), "ètxt".encode()]


def test_a_key_twice_in_a_row_is_two_samples(tmp_path):
    samples = [("a", pair(b"first")), ("a", pair(b"second"))]
    assert [text for _, _, text in read_all(write_shard(tmp_path / "twice.tar", samples))] == [b"first", b"second"]


def test_keys_may_hold_anything(tmp_path):
    path = tmp_path / "odd.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for suffix in ("jpg", "txt"):
            member = tarfile.TarInfo("plain")
            member.pax_headers = {"path": f"a\0b\nc.{suffix}"}
            member.size = 1
            tar.addfile(member, io.BytesIO(b"x"))
    assert read_all(path) == [("a\0b\nc", b"x", b"x")]


# --- damaged archives: what lies before the damage is used, and the damage is told ------------------------------------


@pytest.fixture
def whole(tmp_path) -> bytes:
    return write_shard(tmp_path / "whole.tar", [(f"{i:03d}", pair(b"caption %d" % i)) for i in range(4)]).read_bytes()


def index_bytes(folder: Path, data: bytes):
    path = folder / "shard.tar"
    path.write_bytes(data)
    return index_shard(str(path))


def test_cut_inside_a_member(tmp_path, whole):
    end = whole.index(b"002.jpg") + 512 + 100
    shard = index_bytes(tmp_path, whole[:end])
    assert shard.pairs == 2
    assert shard.cut == f"cut short at byte {end}, inside 002.jpg"


def test_cut_at_every_member_boundary(tmp_path, whole):
    for i in range(1, 4):
        end = whole.index(b"%03d.jpg" % i)
        shard = index_bytes(tmp_path, whole[:end])
        assert shard.pairs == i
        assert shard.cut == f"cut short at byte {end}: no end-of-archive marker"


def test_cut_between_picture_and_caption(tmp_path, whole):
    shard = index_bytes(tmp_path, whole[: whole.index(b"002.txt")])
    assert (shard.pairs, shard.refused) == (2, {"no caption": 1})
    assert "no end-of-archive marker" in shard.cut


def test_bad_header(tmp_path, whole):
    data = bytearray(whole)
    place = whole.index(b"002.jpg")
    data[place + 2] ^= 1
    shard = index_bytes(tmp_path, bytes(data))
    assert shard.pairs == 2
    assert shard.cut == f"bad tar header at byte {place}: checksum does not match"


def test_gzip_empty_and_garbage(tmp_path, whole):
    assert "gzip-compressed" in index_bytes(tmp_path, gzip.compress(whole)).cut
    assert index_bytes(tmp_path, b"").cut == "cut short at byte 0: no end-of-archive marker"
    assert index_bytes(tmp_path, bytes(10_240)).cut == ""  # a whole archive of nothing
    assert "bad tar header at byte 0" in index_bytes(tmp_path, random.Random(0).randbytes(4096)).cut


def test_bytes_behind_the_end_are_told(tmp_path, whole):
    end = (whole.index(b"caption 3") // 512 + 1) * 512
    shard = index_bytes(tmp_path, whole + whole)
    assert shard.pairs == 4
    assert shard.cut == f"{2 * len(whole) - end} bytes follow the end-of-archive marker at byte {end}"
    start = whole.index(b"002.jpg")
    shard = index_bytes(tmp_path, whole[:start] + bytes(512) + whole[start + 512 :])  # a hole
    assert shard.pairs == 2
    assert f"end-of-archive marker at byte {start}" in shard.cut
    assert "bytes follow" in index_bytes(tmp_path, whole + bytes(2 << 20)).cut  # a download whose space was laid out


def header(name: bytes, size: bytes, kind: bytes) -> bytes:
    block = bytearray(512)
    block[: len(name)], block[124 : 124 + len(size)], block[156:157] = name, size, kind
    block[148:156] = b"%06o\0 " % (sum(block) + 8 * 32)
    return bytes(block)


@pytest.mark.parametrize(
    ("size", "cause"),
    [
        (b"-0000001000", "a size of -512"),  # would turn the walk back on itself, for ever
        (b"77777777777", "inside x.jpg"),
        (b"\x80" + bytes(3) + b"\xff" * 8, "inside x.jpg"),
        (b"\xff" * 12, "inside x.jpg"),
        (b"12x4", "bad tar header"),
    ],
)
def test_hostile_sizes_end_the_listing(size, cause):
    listing = list_members(header(b"x.jpg", size, b"0") + bytes(2048))
    assert not listing.members
    assert cause in listing.cut


@pytest.mark.parametrize(
    ("records", "cause"),
    [
        (b"13 size=-512\n", "a size of -512"),
        (b"12 size=abc\n", "bad pax header"),
        (b"0 size=5\n", "a record of 0 bytes"),
        (b"-5 size=5\n", "a record of -5 bytes"),
        (b"size=5\n", "bad pax header"),
        (b"22 GNU.sparse.major=1\n", "sparse member"),
    ],
)
def test_hostile_pax_records_end_the_listing(records, cause):
    data = records + bytes(-len(records) % 512)
    tar = header(b"pax", b"%o" % len(records), b"x") + data + header(b"x.jpg", b"1", b"0") + bytes(2048)
    listing = list_members(tar)
    assert not listing.members
    assert cause in listing.cut


def test_the_size_field_of_a_folder_or_link_is_no_data():
    for kind in b"123456":
        tar = header(b"folder", b"1000", bytes([kind])) + header(b"x.jpg", b"1", b"0") + bytes(2048)
        listing = list_members(tar)
        assert ([member.name for member in listing.members], listing.cut) == (["x.jpg"], "")


def test_sparse_members_and_large_metadata_allocate_nothing(tmp_path):
    sparse = header(b"bomb.jpg", b"0", b"S") + bytes(1024)
    metadata = header(b"bomb", b"77777777777", b"L") + bytes(1024)
    tracemalloc.start()
    assert "sparse member" in index_bytes(tmp_path, sparse).cut
    assert "bytes of metadata" in index_bytes(tmp_path, metadata).cut
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_damage_gives_members_that_lie_inside_the_file(data):
    tar = bytearray(_SMALL)
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(tar) - 1))
        new = data.draw(st.binary(min_size=1, max_size=12))
        tar[start : start + len(new)] = new
    if data.draw(st.booleans()):  # with sums that hold, so that the damage is believed
        for block in range(0, len(tar) - 511, 512):
            tar[block + 148 : block + 156] = b" " * 8
            tar[block + 148 : block + 156] = b"%06o\0 " % sum(tar[block : block + 512])
    listing = list_members(bytes(tar))
    assert all(0 <= m.offset <= m.offset + m.size <= len(tar) for m in listing.members)
    assert [m.offset for m in listing.members] == sorted({m.offset for m in listing.members})


def _small() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("a.jpg", "a.txt", "b" * 120 + ".jpg"):
            member = tarfile.TarInfo(name)
            member.size = 3
            tar.addfile(member, io.BytesIO(b"abc"))
    return buffer.getvalue()


_SMALL = _small()

# --- selection --------------------------------------------------------------------------------------------------------


def test_samples_that_cannot_be_used_are_counted_by_cause(tmp_path):
    samples = [
        ("good", pair()),
        ("no-caption", {"jpg": JPEG, "cls": b"3"}),
        ("empty", pair(b" \n")),
        ("latin", pair("caf\xe9".encode("latin-1"))),
        ("long", pair(b"x" * 70_000)),
        ("text-only", {"txt": b"no picture"}),
        ("labelled", {"png": JPEG, "txt": "ünïcode".encode(), "cls": b"5"}),
    ]
    path = write_shard(tmp_path / "mixed.tar", samples)
    shard = index_shard(str(path))
    assert (shard.pairs, shard.labelled) == (2, 2)
    assert shard.refused == {
        "no caption": 1,
        "empty caption": 1,
        "caption is not UTF-8": 1,
        "caption above 64 KiB": 1,
        "no picture": 1,
    }
    assert [key for key, _, _ in read_all(path)] == ["good", "labelled"]
    assert [(key, note) for key, _, note in read_all(path, "labelled")] == [("no-caption", b"3"), ("labelled", b"5")]
    told = []
    source = open_source("mine", str(path), need="pairs", warn=told.append)
    assert source.samples == 2
    assert told[0].startswith("source 'mine': 5 samples refused (")


def test_damage_is_told(tmp_path, whole):
    (tmp_path / "cut.tar").write_bytes(whole[: whole.index(b"002.jpg")])
    told = []
    assert open_source("mine", f"{tmp_path}/{{whole,cut}}.tar", need="pairs", warn=told.append).samples == 6
    assert len(told) == 1
    assert "cut.tar is damaged, 2 samples are usable: cut short at byte" in told[0]


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "cut short at byte 0"),
        (bytes(10_240), "empty archives"),
        (gzip.compress(b"x"), "gzip"),
        ([("a", {"jpg": JPEG})], "no caption: 1"),
        ([("a", {"json": b"{}"})], "no picture: 1"),
    ],
)
def test_no_usable_sample_is_one_clear_error(tmp_path, content, found):
    path = tmp_path / "shard.tar"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        write_shard(path, content)
    with pytest.raises(UserError, match="holds a sample with a picture and a caption") as error:
        open_source("mine", str(path), need="pairs")
    assert found in str(error.value)
    assert "\n" not in str(error.value)


# --- sidecars ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def builds(monkeypatch) -> list[str]:
    """The shards indexed from their bytes so far."""
    done = []
    build = index_module._build
    monkeypatch.setattr(index_module, "_build", lambda path, *rest: done.append(path) or build(path, *rest))
    return done


@pytest.fixture
def shard_path(tmp_path) -> str:
    return str(write_shard(tmp_path / "shard.tar", [(str(i), pair()) for i in range(3)]))


def test_a_current_sidecar_is_used_again(shard_path, builds):
    first = index_shard(shard_path)
    assert index_shard(shard_path) == first
    assert builds == [shard_path]
    assert Path(first.sidecar) == Path(shard_path + ".index.npz")
    assert first.table().keys == ["0", "1", "2"]


def test_a_changed_shard_is_indexed_again(shard_path, builds):
    first = index_shard(shard_path)
    first.table()
    write_shard(Path(shard_path), [("other", pair())])
    second = index_shard(shard_path)
    assert (second.pairs, second.table().keys) == (1, ["other"])
    os.utime(shard_path, ns=(1, 1))
    index_shard(shard_path)
    assert builds == [shard_path] * 3


def test_the_table_of_a_run_is_not_exchanged_under_it(shard_path):
    shard = index_shard(shard_path)  # its table is not loaded yet
    write_shard(Path(shard_path), [("other", pair())])
    index_shard(shard_path)
    with pytest.raises(OSError, match="was built again while this run was using it"):
        shard.table()


@pytest.mark.parametrize("damage", ["empty", "garbage", "cut", "flipped", "no meta", "other version", "a list"])
def test_a_damaged_sidecar_is_built_again(shard_path, builds, damage):
    shard = index_shard(shard_path)
    sidecar = Path(shard.sidecar)
    data = sidecar.read_bytes()
    if damage in ("no meta", "other version", "a list"):
        with np.load(sidecar) as arrays:
            kept = dict(arrays)
        meta = json.loads(kept.pop("meta").tobytes())
        if damage != "no meta":
            changed = meta | {"version": -1} if damage == "other version" else [1, 2]
            kept["meta"] = np.frombuffer(json.dumps(changed).encode(), np.uint8)
        np.savez(sidecar, **kept)
    else:
        flipped = bytearray(data)
        for place in range(0, len(data), 7):
            flipped[place] ^= 0x55
        new = {
            "empty": b"",
            "garbage": b"PK\3\4" + bytes(100),
            "cut": data[: len(data) // 2],
            "flipped": bytes(flipped),
        }
        sidecar.write_bytes(new[damage])
    assert index_shard(shard_path) == shard
    assert builds == [shard_path] * 2


def test_a_sidecar_whose_table_is_damaged_is_an_os_error(shard_path):
    shard = index_shard(shard_path)
    data = bytearray(Path(shard.sidecar).read_bytes())
    place = data.index(b"image.npy") + 200  # inside the offsets: the meta data stay whole
    data[place] ^= 1
    Path(shard.sidecar).write_bytes(data)
    index_module._load_table.cache_clear()
    with pytest.raises(OSError, match=r"is damaged .* delete it"):
        shard.table()


def test_index_dir_and_the_cache_are_used_where_the_folder_cannot_be_written(shard_path, tmp_path, builds, monkeypatch):
    elsewhere = index_shard(shard_path, index_dir=str(tmp_path / "index"))
    assert Path(elsewhere.sidecar).parent == tmp_path / "index"
    assert not Path(shard_path + ".index.npz").exists()

    write = index_module._write

    def write_but_not_beside(place, *rest):
        if place.parent == Path(shard_path).parent:
            raise PermissionError(place)
        write(place, *rest)

    monkeypatch.setattr(index_module, "_write", write_but_not_beside)
    cached = index_shard(shard_path, cache_dir=str(tmp_path / "cache"))
    assert Path(cached.sidecar).parent == tmp_path / "cache" / "index"
    assert index_shard(shard_path, cache_dir=str(tmp_path / "cache")) == cached
    assert builds == [shard_path] * 2
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="cannot write the index"):
        open_source("mine", shard_path, need="pairs", cache_dir=str(tmp_path / "file"))


def test_an_interrupted_write_leaves_no_sidecar(shard_path, tmp_path, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        index_shard(shard_path)
    assert [p.name for p in tmp_path.iterdir()] == ["shard.tar"]


def test_the_fingerprint_follows_the_content_not_the_place(tmp_path):
    samples = [(str(i), pair(b"caption %d" % i)) for i in range(3)]
    fingerprint = open_source("a", str(write_shard(tmp_path / "here" / "a.tar", samples)), need="pairs").fingerprint()
    (tmp_path / "there").mkdir()
    shutil.copy(tmp_path / "here" / "a.tar", tmp_path / "there" / "b.tar")
    assert open_source("b", str(tmp_path / "there" / "b.tar"), need="pairs").fingerprint() == fingerprint
    samples[1] = ("1", pair(b"caption X"))  # as long as before
    changed = write_shard(tmp_path / "changed.tar", samples)
    assert changed.stat().st_size == (tmp_path / "here" / "a.tar").stat().st_size
    assert open_source("c", str(changed), need="pairs").fingerprint() != fingerprint
