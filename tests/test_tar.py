"""clipscale/data/shard/tar.py: what lies in an archive, whole or damaged; webdataset's own reader is the oracle."""

import gzip
import io
import random
import subprocess
import tarfile
import tracemalloc
from pathlib import Path
from typing import NamedTuple

import pytest
import webdataset
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from shards import picture, write_shard, write_tar

from clipscale.data.shard.judge import IMAGE_SUFFIXES
from clipscale.data.shard.select import Rules, select_samples
from clipscale.data.shard.tar import list_members, mapped
from clipscale.data.shard.tar_end import why_no_end

JPEG = picture(0, 16, 16)


def pair(caption: bytes = b"a caption", image: bytes = JPEG) -> dict[str, bytes]:
    return {"jpg": image, "txt": caption}


def read_all(path: Path) -> list[tuple[str, bytes, bytes]]:
    """(key, picture, caption) of the samples that the index would hold."""
    with mapped(str(path)) as tar:
        keys, spans, *_ = select_samples(tar, list_members(tar), Rules())
        return [
            (key, tar[image : image + image_size], tar[note : note + note_size])
            for key, (image, image_size, note, note_size) in zip(keys, spans.tolist(), strict=True)
        ]


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


@settings(max_examples=100, deadline=None)
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
            member.mtime = random.choice([0, 1_700_000_000, 1_700_000_000.25])  # a fraction: pax writes a header for it
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
    assert list_members(path.read_bytes()).cut == ""


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


class Found(NamedTuple):
    pairs: int
    refused: dict[str, int]
    cut: str


def index_bytes(folder: Path, data: bytes) -> Found:
    path = folder / "shard.tar"
    path.write_bytes(data)
    with mapped(str(path)) as tar:
        listing = list_members(tar)
        chosen = select_samples(tar, listing, Rules())
    return Found(len(chosen.keys), chosen.refused, listing.cut)


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


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT])
def test_the_first_of_several_damages_is_told_wherever_it_lies(tmp_path, format):
    """Sums are checked many at a time, behind the walk: what the walk found behind a bad one does not count."""
    path = tmp_path / "many.tar"
    with tarfile.open(path, "w", format=format) as tar:
        for i in range(9000):
            member = tarfile.TarInfo(f"{i // 3:05d}.{('jpg', 'txt', 'json')[i % 3]}")
            member.size, member.mtime = 3, i + 0.5
            tar.addfile(member, io.BytesIO(b"abc"))
    with tarfile.open(path) as tar:
        places = [member.offset for member in tar.getmembers()]
    whole = path.read_bytes()
    for number in (0, 1, 4095, 4096, 8191, 8192, 8999):
        place = places[number]
        data = bytearray(whole[: places[-1] + 600])
        data[place + 20] ^= 4  # of its name: no field is out of order
        listing = list_members(bytes(data))
        assert len(listing.members) == number
        assert listing.cut == f"bad tar header at byte {place}: checksum does not match"
    assert len(list_members(whole).members) == 9000


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.text("a/é\0", max_size=160), st.integers(0, 1500), st.sampled_from("0756L")), max_size=8))
def test_the_listing_is_that_of_the_tarfile_module(files):
    buffer = io.BytesIO()
    for name, size, kind in files:
        member = tarfile.TarInfo("folder/" + name)
        member.size, member.type = (0 if kind in "56" else size), kind.encode() if kind != "L" else b"0"
        format = tarfile.GNU_FORMAT if kind == "L" else tarfile.PAX_FORMAT
        buffer.write(member.tobuf(format) + bytes(-(-member.size // 512) * 512))
    buffer.write(bytes(1024))
    buffer.seek(0)
    with tarfile.open(fileobj=buffer) as tar:
        expected = [(member.name, member.offset_data, member.size) for member in tar if member.isreg()]
    listing = list_members(buffer.getvalue())
    assert listing.cut == ""
    assert [tuple(member) for member in listing.members] == expected


def test_odd_checksum_fields_are_read(tmp_path):
    """Spaces before the digits, or no NUL behind them, as old tars have them."""
    plain = header(b"x.jpg", b"1", b"0")
    total = int(plain[148:154], 8)
    for text in (b"%6o\0 ", b"%06o \0", b" %o\0", b"%07o\0", b"%o\0 "):
        tar = plain[:148] + (text % total).ljust(8, b"\0") + plain[156:] + bytes(2048)
        listing = list_members(tar)
        assert ([member.name for member in listing.members], listing.cut) == (["x.jpg"], ""), text


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


# --- zeros: the padding that writers add, or what was laid out and never filled ---------------------------------------


def test_zeros_from_a_member_on_are_a_cut(tmp_path):
    """At a member's boundary, where nothing else could tell; the file has the size it should have."""
    whole = write_shard(tmp_path / "w.tar", [(f"{i:03d}", pair(image=JPEG * 9)) for i in range(9)]).read_bytes()
    for name, pairs in (("001.jpg", 1), ("004.jpg", 4), ("005.txt", 5)):
        start = whole.index(name.encode())
        zeros = len(whole) - start
        shard = index_bytes(tmp_path, whole[:start] + bytes(zeros))
        assert shard.pairs == pairs
        assert shard.cut == f"cut short at byte {start}: {zeros} bytes follow, all zeros: never filled"
    start = whole.index(b"008.txt")
    zeros = start // 10_240 * 10_240 + 20_480 - start
    told = index_bytes(tmp_path, whole[:start] + bytes(zeros)).cut  # as tar -A may leave of two archives
    assert told == f"cut short at byte {start}: {zeros} bytes follow, all zeros: never filled, or left by tar -A"


@pytest.mark.parametrize("long_name", [False, True])
def test_a_member_in_which_the_zeros_begin_is_not_used(tmp_path, long_name):
    names = [f"{'long/' * 30 * long_name}{i}.{suffix}" for i in range(9) for suffix in ("jpg", "txt")]
    members = [(name, b"caption" if name.endswith("txt") else b"\xff" * 5000) for name in names]
    whole = write_tar(tmp_path / "w.tar", members, tarfile.GNU_FORMAT).read_bytes()
    start = list_members(whole).offsets[4] + 2000
    shard = index_bytes(tmp_path, whole[:start] + bytes((5 << 20) - start))
    assert (shard.pairs, shard.refused) == (2, {})
    told = f"cut short at byte {start}, inside {names[4]}: {(5 << 20) - start} bytes follow, all zeros: never filled"
    assert shard.cut == told


@pytest.mark.parametrize("size", [20_480, 1 << 20, (3 << 20) + 7])
def test_a_file_of_zeros_is_no_empty_archive(tmp_path, size):
    shard = index_bytes(tmp_path, bytes(size))
    assert (shard.pairs, shard.cut) == (0, f"cut short at byte 0: {size} bytes follow, all zeros: never filled")


@pytest.mark.parametrize("format", ["gnu", "ustar", "posix", "v7"])
@pytest.mark.parametrize("blocks", [1, 2, 3, 19, 20, 21, 64, 1001, 2048])
def test_what_tar_writes_is_whole_whatever_its_records(tmp_path, format, blocks):
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(JPEG * (1 + i))
    (tmp_path / "0.txt").write_bytes(b"x")
    command = ["tar", f"--format={format}", "-b", str(blocks), "-C", str(tmp_path)]
    path = tmp_path / "x.tar"
    subprocess.run([*command, "-cf", path, "0.jpg", "0.txt"], check=True)
    assert list_members(path.read_bytes()).cut == ""
    subprocess.run([*command, "-rf", path, "1.jpg"], check=True)
    subprocess.run([*command, "-cf", tmp_path / "more.tar", "2.jpg"], check=True)
    subprocess.run(["tar", "-b", str(blocks), "-Af", path, tmp_path / "more.tar"], check=True)
    listing = list_members(path.read_bytes())
    assert (listing.names, listing.cut) == (["0.jpg", "0.txt", "1.jpg", "2.jpg"], "")


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_fill_of_a_record_is_padding(tmp_path, format):
    for blocks in range(45):
        data = write_tar(tmp_path / "x.tar", [("a.jpg", b"\xff" * 512 * blocks)], format).read_bytes()
        end = 512 * (1 + blocks)
        assert list_members(data).cut == ""
        for zeros in (512, 1024, 1536):  # one block, which tar takes with a warning; two, as Go and Rust write; three
            assert list_members(data[:end] + bytes(zeros)).cut == ""
        assert "no end-of-archive marker" in list_members(data[:end]).cut


def test_a_longer_record_is_believed_of_a_program_that_has_the_option_and_only_where_it_fits():
    by_python, by_tar = bytearray(tarfile.TarInfo("x").tobuf(tarfile.USTAR_FORMAT)), bytearray(512)
    by_tar[257:265] = b"ustar  \0"
    for blocks in (1, 7, 20, 21, 45, 101, 512, 2047, 2048):
        for data in (0, 1, 18, 19, 20, 2046, 2047, 2048, 99_999):
            end = -(-(data + 2) // blocks) * blocks
            assert why_no_end(512 * data, 512 * end, by_tar) == ""
            assert (why_no_end(512 * data, 512 * end, by_python) == "") == (end - data <= 21)
    assert why_no_end(512 * 3950, 512 * 4051, by_tar) == "never filled"  # a prime number of blocks: no record fits
    assert why_no_end(512 * 5, 512 * 4104, by_tar) == "never filled"
    for records in range(3, 64):  # a file of usual records is no record of its own, whatever its size
        assert why_no_end(512 * 5, 512 * 20 * records, by_tar) == "never filled, or left by tar -b or -A"
    assert why_no_end(512 * 5, 512 * 20 * 64, by_python) == "never filled"
    assert why_no_end(0, 512 * 22, b"") == "never filled"
    assert why_no_end(512 * 18, 512 * 60, by_python) == "never filled, or left by tar -A"
    assert why_no_end(512 * 17, 512 * 60, by_python) == why_no_end(512 * 18, 512 * 59, by_python) == "never filled"


def test_what_follows_the_zeros_between_two_archives_is_told(tmp_path, whole):
    """cat a.tar b.tar: webdataset's reader stops at the zeros too, and says nothing."""
    path = tmp_path / "two.tar"
    path.write_bytes(whole + whole)
    assert len(read_with_webdataset(path)) == len(read_all(path)) == 4
    assert "bytes follow the end-of-archive marker" in list_members(path.read_bytes()).cut


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


@settings(max_examples=150, deadline=None)
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
