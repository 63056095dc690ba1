"""Shards made to harm: what is in them is never run, unpacked or followed, and is counted by the rule that stopped it.

Each shard goes through the index, reading and decoding in a process of its own, which tells what it found and by how
much its memory grew at most.
"""

import gzip
import io
import json
import pickle
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from forks import start
from shards import picture, write_tar

from clipscale.config.data import SourceSettings
from clipscale.data.shard import sidecar
from clipscale.data.shard.captions import Captions
from clipscale.data.shard.index import Index
from clipscale.data.source import Source

JPEG = picture(0, 16, 16)
GOOD = [("good.jpg", JPEG), ("good.txt", b"a caption")]
LIMIT_BYTES = 200_000_000

PROBE = """
import json, os, re, sys
from collections import Counter
from clipscale.config.data import Data, Select, SourceSettings
from clipscale.data.pixels.decode import decode
from clipscale.data.bad import BadSample
from clipscale.data.source import open_source
from clipscale.errors import UserError

def peak_bytes():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])

def walk(path, **settings):
    found = Counter()
    try:
        source = open_source("hostile", SourceSettings(path, **settings), Data(index_dir=sys.argv[2]), need="pairs")
    except UserError as error:
        return {"error": str(error)}
    for index in range(source.samples):
        try:
            sample = source.read(0, index)
            source.caption(sample.note)
            decode(sample.image, 90_000_000)
            found["fine"] += 1
        except BadSample as bad:
            found[bad.cause] += 1
    cut = source.shards[0].cut
    return {"refused": source.refused(), "not read": source.not_read(), "decoded": found, "cut": cut,
            "keys": [source.where(0, i)[1] for i in range(source.samples)]}

os.chdir(sys.argv[4])
walk(sys.argv[1])  # everything is imported and warm
before = peak_bytes()
answers = [walk(sys.argv[3], **settings) for settings in (
    {}, {"caption": "json:caption"}, {"caption": "pyd"}, {"select": Select(check="decode")}
)]
print(json.dumps([answers, peak_bytes() - before]))
"""


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    return write_tar(tmp_path_factory.mktemp("good") / "good.tar", GOOD)


@pytest.fixture
def probe(good, tmp_path):
    """A function: path -> what was found with a .txt, with JSON captions, with .pyd captions, and when all pictures
    are decoded at once. The process stands in an empty folder, which it leaves empty."""

    def run(path: Path) -> list[dict]:
        work = tmp_path / "work"
        work.mkdir()
        with start(PROBE, good, tmp_path / "index", path, work) as child:
            answers, grown_bytes = json.loads(child.stdout.read() or child.stderr.read())
        assert grown_bytes < LIMIT_BYTES
        assert not (tmp_path / "mark").exists()
        assert list(work.iterdir()) == []
        return answers

    return run


class Mark:
    """Unpickled, it leaves a file behind."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self):
        return open, (str(self.place), "w")


RUN_BY_WEBDATASET = [
    f"{stem}{suffix}{packed}"
    for stem in ("", "seg.")
    for suffix in ("pkl", "pickle", "pyd", "pth", "PKL", "Pyd")
    for packed in ("", ".gz")
]


def payload(suffix: str, mark: Path) -> bytes:
    buffer = io.BytesIO()
    if "pth" in suffix:
        torch.save(Mark(mark), buffer)
    else:
        pickle.dump(Mark(mark), buffer)
    return gzip.compress(buffer.getvalue()) if suffix.endswith(".gz") else buffer.getvalue()


def test_pickles_under_every_extension(tmp_path, probe):
    mark = tmp_path / "mark"
    members = [*GOOD, ("good.json", b'{"caption": "x"}')]
    members += [(f"good.{suffix}", payload(suffix, mark)) for suffix in RUN_BY_WEBDATASET]
    code = payload("pkl", mark)  # under the suffixes that are read, too
    members += [("p.jpg", code), ("p.txt", b"x"), ("q.jpg", JPEG), ("q.txt", code), ("r.jpg", JPEG), ("r.json", code)]
    members = list({name.lower(): (name, data) for name, data in members}.values())  # webdataset lets none come twice
    txt, in_json, as_text, decoded = probe(write_tar(tmp_path / "pickles.tar", members))
    unread = {f".{suffix.lower()}": 1 for suffix in RUN_BY_WEBDATASET}
    assert len(unread) == 16
    assert txt["not read"] == in_json["not read"] == decoded["not read"] == unread
    assert txt["decoded"] == {"fine": 1, "not JPEG, PNG or WebP": 1}
    assert txt["refused"] == {"caption is not UTF-8": 1, "no caption": 1}
    assert (in_json["decoded"], in_json["refused"]) == ({"fine": 1}, {"no caption": 2, "broken JSON": 1})
    assert "no caption: 3" in as_text["error"]
    assert "caption is not UTF-8: 1" in as_text["error"]  # taken for text, at the user's own wish
    assert decoded["refused"] == txt["refused"] | {"not JPEG, PNG or WebP": 1}


DECODE = """
import webdataset
for path in sys.argv[1:]:
    try:
        list(webdataset.WebDataset(path, shardshuffle=False).decode("pil"))
    except Exception as error:
        print(error)
"""


def test_the_same_members_run_in_webdatasets_default_decoder(tmp_path):
    """The control: these payloads do what the test above says was not done."""
    suffixes, paths = ["pkl", "pickle", "pyd", "pth", "pkl.gz", "seg.pyd"], []
    for suffix in suffixes:
        members = [*GOOD, (f"good.{suffix}", payload(suffix, tmp_path / f"{suffix}.mark"))]
        paths.append(str(write_tar(tmp_path / f"{suffix}.tar", members)))
    with start(DECODE, *paths) as child:
        child.stdout.read()
    assert {path.name for path in tmp_path.glob("*.mark")} == {f"{suffix}.mark" for suffix in suffixes}


def test_sparse_members_links_and_devices(tmp_path, probe):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, kind in (("a.jpg", tarfile.SYMTYPE), ("b.jpg", tarfile.LNKTYPE), ("c.jpg", tarfile.CHRTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
        for name, data in [("a.txt", b"x"), ("b.txt", b"x"), ("c.txt", b"x"), *GOOD]:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        place = tar.offset
    sparse = bytearray(tarfile.TarInfo("bomb.jpg").tobuf(tarfile.GNU_FORMAT))
    sparse[156:157] = b"S"
    sparse[386:410] = b"%011o\0%011o\0" % (0, 0)  # one hole
    sparse[483:495] = b"%011o\0" % (3 << 30)  # the size it would have
    sparse[148:156] = b" " * 8
    sparse[148:156] = b"%06o\0 " % sum(sparse)
    path = tmp_path / "sparse.tar"
    path.write_bytes(buffer.getvalue()[:place] + bytes(sparse) + bytes(1024))
    with tarfile.open(path) as tar:  # the control: Python sees three gigabytes in these bytes
        assert tar.getmember("bomb.jpg").size == 3 << 30
        assert path.stat().st_size < 10_000
    txt, *_ = probe(path)
    assert txt["cut"] == f"sparse member at byte {place}: shards must hold plain files"
    assert (txt["refused"], txt["decoded"]) == ({"no picture": 3}, {"fine": 1})


def test_gzip_bombs(tmp_path, probe):
    packed = gzip.compress(bytes(1 << 30), 1)
    assert len(packed) < 6_000_000
    members = [*GOOD, ("good.txt.gz", packed), ("good.jpg.gz", packed), ("z.jpg", packed), ("z.txt", packed[:60_000])]
    txt, *_ = probe(write_tar(tmp_path / "bombs.tar", members))
    assert txt["not read"] == {".txt.gz": 1, ".jpg.gz": 1}
    assert txt["refused"] == {"caption is not UTF-8": 1}
    assert txt["decoded"] == {"fine": 1}


def test_a_gzipped_shard(tmp_path, probe):
    path = tmp_path / "packed.tar"
    path.write_bytes(gzip.compress(bytes(1 << 30), 1))
    assert all("gzip-compressed; shards must be plain tars" in answer["error"] for answer in probe(path))


def test_keys_that_are_paths(tmp_path, probe):
    keys = ["../../x", "/etc/x", "a/../../../tmp/x", "~/x", "$HOME/x", "`touch mark`", "a\nb", "x" * 90, "é" * 40]
    members = [(f"{key}.{suffix}", data) for key in keys for suffix, data in (("jpg", JPEG), ("txt", b"x"))]
    path = write_tar(tmp_path / "keys.tar", members, tarfile.PAX_FORMAT)
    txt, *_ = probe(path)
    assert txt["keys"] == keys
    assert txt["decoded"] == {"fine": len(keys)}


def png(width: int, height: int) -> bytes:
    """A whole PNG of one colour: some hundred bytes a megapixel."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compressobj(1)
    row = bytes(1 + 3 * width)
    data = b"".join([*(rows.compress(row) for _ in range(height)), rows.flush()])
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def test_pictures_that_are_bombs_or_programs(tmp_path, probe):
    jpeg = bytearray(JPEG)
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 65_000, 65_000)
    pictures = {
        "png": png(13_000, 13_000),  # 169 megapixels: Pillow warns, and takes 1.3 GB
        "jpeg": bytes(jpeg),  # 4 gigapixels by its header
        "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(mark) (w) file closefile\n",
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
        "gif": b"GIF89a" + bytes(100),
        "empty": b"",
    }
    assert len(pictures["png"]) < 3_000_000
    members = [(f"{key}.{suffix}", d) for key, data in pictures.items() for suffix, d in (("jpg", data), ("txt", b"x"))]
    txt, *_, decoded = probe(write_tar(tmp_path / "pictures.tar", [*GOOD, *members]))
    causes = {"too many pixels": 2, "not JPEG, PNG or WebP": 4}
    assert txt["decoded"] == {"fine": 1} | causes
    assert (decoded["decoded"], decoded["refused"]) == ({"fine": 1}, causes)


def test_members_above_their_caps_and_json_that_overflows(tmp_path, probe):
    """The sizes are real: 70 MB of picture, which must not be read to be refused."""
    deep = b'{"caption": ' + b"[" * 400_000
    members = [
        *GOOD,
        ("large.jpg", bytes(70_000_000)),
        ("large.txt", b"x"),
        ("text.jpg", JPEG),
        ("text.txt", b"x" * 70_000),
    ]
    members += [("deep.jpg", JPEG), ("deep.json", deep), ("big.jpg", JPEG), ("big.json", b" " * 2_000_000)]
    members += [("fine.jpg", JPEG), ("fine.json", b'{"caption": "x"}')]
    txt, in_json, *_ = probe(write_tar(tmp_path / "caps.tar", members))
    assert txt["refused"] == {"picture above 64 MiB": 1, "caption above 64 KiB": 1, "no caption": 3}
    assert in_json["refused"] == {"no caption": 2, "picture above 64 MiB": 1, "broken JSON": 1, "JSON above 1 MiB": 1}
    assert in_json["decoded"] == {"fine": 1}


def test_an_index_that_lies(tmp_path, good):
    """A sidecar that comes with the shards, right in form: it cannot make reading go beyond the shard or its caps."""
    built = Index(index_dir=str(tmp_path / "index")).build(str(good))
    facts = sidecar.read_facts(Path(built.sidecar))
    spans = [[0, 2**32 - 1, 0, 1], [2**62, 9, 2**62, 9], [0, 9, 0, 2**31], [2**63 - 1, 9, 0, 9]]
    sidecar.write(Path(built.sidecar), facts, np.array(spans, np.int64), ["a", "b", "c", "d"])
    index = Index(index_dir=str(tmp_path / "index"))
    source = Source("lies", [index.known(str(good))], index, Captions.of(SourceSettings("x")), None)
    for i, message in enumerate(["index claims", "were expected", "index claims", "index claims"]):
        with pytest.raises(OSError, match=message):
            source.read(0, i)
