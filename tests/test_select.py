"""clipscale/data/shard/select.py and uids.py: which samples are used, and what is counted of the others."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from shards import picture, write_shard, write_tar

from clipscale.config.data import Data, Select, SourceSettings
from clipscale.data.shard.select import Chosen, Rules, select_samples
from clipscale.data.shard.tar import Listing, list_members, mapped
from clipscale.data.shard.uids import UidList
from clipscale.errors import UserError

JPEG = picture(0, 16, 16)


def chosen(path: Path, need: str = "pairs", **settings) -> Chosen:
    select = Select(**{name: value for name, value in settings.items() if name != "caption"})
    source = SourceSettings(str(path), caption=settings.get("caption", "txt"), select=select)
    with mapped(str(path)) as tar:
        return select_samples(tar, list_members(tar), Rules.of(source, Data(), need))


def test_samples_that_cannot_be_used_are_counted_by_cause(tmp_path):
    samples = [
        ("good", {"jpg": JPEG, "txt": b"x"}),
        ("no-caption", {"jpg": JPEG, "cls": b"3"}),
        ("empty", {"jpg": JPEG, "txt": b" \n"}),
        ("latin", {"jpg": JPEG, "txt": "caf\xe9".encode("latin-1")}),
        ("long", {"jpg": JPEG, "txt": b"x" * 70_000}),
        ("text-only", {"txt": b"no picture"}),
        ("labelled", {"png": JPEG, "txt": "ünïcode".encode(), "cls": b"5"}),
        ("long-label", {"webp": JPEG, "txt": b"x", "cls": b"5" * 65}),
        ("odd-label", {"webp": JPEG, "txt": b"x", "cls": b"1_0"}),
    ]
    path = write_shard(tmp_path / "mixed.tar", samples)
    pairs = chosen(path)
    assert pairs.keys == ["good", "labelled", "long-label", "odd-label"]
    assert pairs.refused == {
        "no caption": 1,
        "empty caption": 1,
        "caption is not UTF-8": 1,
        "caption above 64 KiB": 1,
        "no picture": 1,
    }
    labelled = chosen(path, "labelled")
    assert labelled.keys == ["no-caption", "labelled"]
    assert labelled.refused == {
        "no label": 4,
        "no picture": 1,
        "label above 64 bytes": 1,
        "label is not a number": 1,
    }
    assert pairs.not_read == labelled.not_read == {}


def test_size_caps_count_what_the_header_says(tmp_path):
    """A member above its cap is refused by its size field: it is not looked into."""
    big = bytes((1 << 26) + 1)
    path = write_shard(tmp_path / "big.tar", [("0", {"jpg": big, "txt": b"x"}), ("1", {"jpg": big[:-1], "txt": b"x"})])
    assert chosen(path).refused == {"picture above 64 MiB": 1}
    assert chosen(path).keys == ["1"]


def test_what_is_not_on_the_allow_list_is_counted_by_suffix(tmp_path):
    extra = {"pyd": b"1", "seg.PYD": b"2", "pth": b"3", "json": b"{}", "txt": b"x", "thumb.jpg": b"no picture"}
    samples = [(str(i), {"jpg": JPEG, **extra}) for i in range(3)]
    found = chosen(write_shard(tmp_path / "extra.tar", samples))
    assert found.not_read == {".pyd": 3, ".seg.pyd": 3, ".pth": 3, ".thumb.jpg": 3}
    assert len(found.keys) == 3


def test_what_belongs_to_no_sample_is_counted_by_kind(tmp_path):
    path = tmp_path / "kinds.tar"
    names = ["._a.jpg", "a.jpg", "a.txt", "d/.DS_Store", "README", "d/Makefile", "__info__", "__meta__/x.txt", "b.jpg"]
    with tarfile.open(path, "w") as tar:
        for name in names:
            tar.addfile(tarfile.TarInfo(name))
        for kind in (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE):
            member = tarfile.TarInfo("b.txt")
            member.type = kind
            tar.addfile(member)
    found = chosen(path)
    assert found.not_read == {"hidden file": 2, "no suffix": 2, "link": 2, "device": 1}
    assert found.refused == {"empty caption": 1, "no caption": 1}  # b's caption is a link
    bad = path.read_bytes().replace(b"b.jpg", b"c.jpg")  # no longer the sum that its header says
    assert select_samples(bad, list_members(bad), Rules()).not_read == {"hidden file": 2, "no suffix": 2}


def test_members_of_one_key_that_lie_apart(tmp_path):
    """All pictures, then all captions, as `tar cf x.tar *.jpg *.txt` has them."""
    keys = ("a", "b", "c")
    members = [(f"{key}.jpg", JPEG) for key in keys] + [(f"{key}.txt", b"x") for key in keys]
    found = chosen(write_tar(tmp_path / "apart.tar", members))
    assert (found.keys, found.refused) == ([], {"members lie apart": 6})
    labelled = [("a.jpg", JPEG), ("b.jpg", JPEG), ("a.cls", b"1"), ("b.txt", b"x")]
    found = chosen(write_tar(tmp_path / "l.tar", labelled), "labelled")
    assert found.refused == {"members lie apart": 3, "no label": 1}
    twice = [("a.jpg", JPEG), ("a.jpg", JPEG), ("a.txt", b"x"), ("b.txt", b"x"), ("a.txt", b"x")]
    found = chosen(write_tar(tmp_path / "twice.tar", twice))  # the first and the last are one more sample
    assert (found.keys, found.refused) == (["a"], {"members lie apart": 2, "no picture": 1})


def test_a_key_in_a_million_places_takes_no_time(tmp_path):
    names = ["a.txt", "b.json"] * 20_000
    listing = Listing(names, [0] * len(names), [0] * len(names))
    assert select_samples(b"", listing, Rules()).refused == {"no picture": 40_000}


def test_pictures_of_other_formats(tmp_path):
    samples = [(suffix, {suffix: b"x", "txt": b"x"}) for suffix in ("gif", "tiff", "BMP", "img", "mp4")]
    found = chosen(write_shard(tmp_path / "other.tar", [*samples, ("both", {"gif": b"x", "jpg": JPEG, "txt": b"x"})]))
    assert found.keys == ["both"]
    assert found.refused == {"picture of another format": 3, "no picture": 2}
    assert found.not_read == {".gif": 2, ".tiff": 1, ".bmp": 1, ".img": 1, ".mp4": 1}


def test_suffixes_without_number_are_told_in_short(tmp_path):
    members = (
        [(f"k.{i}", b"") for i in range(500)] + [("k." + "x" * 90, b"")] + [(f"a{i}.common", b"") for i in range(7)]
    )
    found = chosen(write_tar(tmp_path / "many.tar", members)).not_read
    assert len(found) == 21
    assert found[".common"] == 7
    assert sum(found.values()) == 508
    assert max(map(len, found)) <= 41


@pytest.mark.parametrize("caption", ["text", ".TEXT", "en.txt", "json:a.b"])
def test_the_caption_may_be_any_member_or_a_json_field(tmp_path, caption):
    notes = {"text": b"one", "en.txt": b"two", "json": json.dumps({"a": {"b": ["three"]}}).encode(), "txt": b"four"}
    path = write_shard(tmp_path / "x.tar", [("0", {"jpg": JPEG, **notes}), ("1", {"jpg": JPEG, "txt": b"x"})])
    found = chosen(path, caption=caption)
    assert found.keys == ["0"]
    assert found.refused == {"no caption": 1}
    offset, size = found.spans[0, 2:]
    suffix = "json" if caption == "json:a.b" else caption.lower().removeprefix(".")
    assert path.read_bytes()[offset : offset + size] == notes[suffix]


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_sides_and_aspect_are_those_pillow_reads(tmp_path):
    rng = np.random.default_rng(0)
    samples, sizes = [], {}
    for i in range(40):
        height, width, kind = *rng.integers(1, 70, 2).tolist(), ["JPEG", "PNG", "WEBP"][i % 3]
        data = picture(i, height, width, kind)
        sizes[str(i)] = Image.open(io.BytesIO(data)).size
        samples.append((str(i), {"jpg": data, "txt": b"x"}))
    samples.append(("no picture", {"jpg": b"GIF89a" + bytes(50), "txt": b"x"}))
    path = write_shard(tmp_path / "sides.tar", samples)
    found = chosen(path, min_side=20, max_aspect=1.5)
    small = [key for key, size in sizes.items() if min(size) < 20]
    long = [key for key, size in sizes.items() if key not in small and max(size) > 1.5 * min(size)]
    assert found.keys == [key for key in sizes if key not in small and key not in long]
    assert found.refused == {"picture too small": len(small), "picture too long": len(long), "not JPEG, PNG or WebP": 1}
    assert min(len(found.keys), len(small), len(long)) > 3


def test_check_decode_refuses_what_decoding_would(tmp_path):
    whole = picture(1, 64, 64)
    pictures = {"whole": whole, "cut": whole[: len(whole) // 2], "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n", "empty": b""}
    path = write_shard(tmp_path / "x.tar", [(key, {"jpg": data, "txt": b"x"}) for key, data in pictures.items()])
    assert chosen(path).keys == list(pictures)
    found = chosen(path, check="decode")
    assert found.keys == ["whole"]
    assert found.refused == {"broken picture": 1, "not JPEG, PNG or WebP": 2}


# --- uids and scores --------------------------------------------------------------------------------------------------


UIDS = [f"{i * 0x9E3779B97F4A7C15F39CC0605CEDC834 % 2**128:032x}" for i in range(1, 60)]


@pytest.fixture(scope="module")
def scored(tmp_path_factory) -> Path:
    samples = [
        (str(i), {"jpg": JPEG, "txt": b"x", "json": json.dumps({"uid": uid, "score": {"l14": i / 100}}).encode()})
        for i, uid in enumerate(UIDS)
    ]
    samples += [
        ("no json", {"jpg": JPEG, "txt": b"x"}),
        ("broken", {"jpg": JPEG, "txt": b"x", "json": b"{"}),
        ("nan", {"jpg": JPEG, "txt": b"x", "json": b'{"uid": 3, "score": {"l14": NaN}}'}),
        ("true", {"jpg": JPEG, "txt": b"x", "json": b'{"uid": null, "score": {"l14": true}}'}),
        ("large", {"jpg": JPEG, "txt": b"x", "json": b" " * ((1 << 20) + 1)}),
    ]
    return write_shard(tmp_path_factory.mktemp("uids") / "scored.tar", samples)


@pytest.mark.parametrize("kind", ["npy", "npy, other byte order", "txt"])
def test_a_subset_by_uids(scored, tmp_path, kind):
    """DataComp's way: its subset files are made exactly so (README of mlfoundations/datacomp)."""
    wanted = UIDS[5:40:3]
    elsewhere = ["f" * 32, "0" * 32, "12" * 16]
    path = tmp_path / f"uids.{kind[:3]}"
    if kind == "txt":
        path.write_text("\n".join([*wanted[::-1], "", *elsewhere]) + "\n")
    else:
        pairs = [(int(uid[:16], 16), int(uid[16:32], 16)) for uid in wanted + elsewhere]
        order = ">" if "other" in kind else "<"
        np.save(path, np.sort(np.array(pairs, np.dtype("u8,u8"))).astype(np.dtype(f"{order}u8,{order}u8")))
    found = chosen(scored, uids=str(path))
    assert [UIDS[int(key)] for key in found.keys] == wanted
    assert found.refused == {"uid not in the list": 47, "no uid": 3, "broken JSON": 1, "JSON above 1 MiB": 1}


def test_the_key_can_be_the_uid(scored, tmp_path):
    (tmp_path / "keys.txt").write_text("7\nno json\n12\n")
    found = chosen(scored, uids=str(tmp_path / "keys.txt"), uid_field="__key__")
    assert found.keys == ["7", "12", "no json"]


def test_a_subset_by_score(scored):
    found = chosen(scored, score_field="score.l14", min_score=0.1, max_score=0.3)
    assert found.keys == [str(i) for i in range(10, 31)]
    assert found.refused == {"score out of bounds": 38, "no score": 3, "broken JSON": 1, "JSON above 1 MiB": 1}
    assert chosen(scored, score_field="score.l14", min_score=0.5).keys == [str(i) for i in range(50, 59)]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text("0123456789abcdefABCDEF", min_size=31, max_size=33) | st.text(max_size=4), min_size=1), st.data()
)
def test_a_uid_list_is_a_set(tmp_path_factory, uids, data):
    path = tmp_path_factory.mktemp("uids") / "uids.txt"
    uids = [uid for uid in ("".join(uid.split()) for uid in uids) if uid] or ["x"]
    path.write_text("\n".join(uids), encoding="utf-8")
    found = UidList.open(str(path))
    normal = {uid.lower() if len(uid) == 32 else uid for uid in uids}
    for uid in [*uids, data.draw(st.text(max_size=33))]:
        alike = uid.lower() if len(uid) == 32 and not set(uid.lower()) - set("0123456789abcdef") else uid
        assert (uid in found) == (alike in normal)


def test_uid_files_that_cannot_be_used(tmp_path):
    np.save(tmp_path / "unsorted.npy", np.array([(2, 0), (1, 0)], "u8,u8"))
    np.save(tmp_path / "half.npy", np.array([(1, 2), (1, 1)], "u8,u8"))
    np.save(tmp_path / "flat.npy", np.arange(4))
    np.save(tmp_path / "pickle.npy", np.array([{}], dtype=object), allow_pickle=True)
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    for name, message in [
        ("unsorted.npy", "not sorted"),
        ("half.npy", "not sorted"),
        ("flat.npy", "cannot be read: dtype int64"),
        ("pickle.npy", "cannot be read: .*Python objects"),
        ("empty.txt", "is an empty list"),
        ("latin.txt", "cannot be read"),
        ("absent.txt", "cannot be read"),
    ]:
        with pytest.raises(UserError, match=message):
            UidList.open(str(tmp_path / name))


# --- names of selections ----------------------------------------------------------------------------------------------


def test_rules_that_differ_have_tags_that_differ(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(name)
    (tmp_path / "again.txt").write_text("a\n\n")
    every = [
        SourceSettings("x"),
        SourceSettings("x", caption="json:txt"),
        SourceSettings("x", caption="text"),
        *(
            SourceSettings("x", select=Select(**settings))
            for settings in (
                {"check": "decode"},
                {"min_side": 3},
                {"max_aspect": 3.0},
                {"uids": str(tmp_path / "a.txt")},
                {"uids": str(tmp_path / "a.txt"), "uid_field": "key"},
                {"uids": str(tmp_path / "b.txt")},
                {"score_field": "s", "min_score": 3.0},
                {"score_field": "s", "max_score": 3.0},
                {"score_field": "t", "max_score": 3.0},
            )
        ),
    ]
    tags = [Rules.of(source, Data(), "pairs").tag for source in every] + [Rules.of(every[0], Data(), "labelled").tag]
    assert len(set(tags)) == len(every) + 1
    assert tags[0] == ""
    same = SourceSettings("y", weight=3.0, captions="random", select=Select(uids=str(tmp_path / "again.txt")))
    assert Rules.of(same, Data(max_pixels=7), "pairs").tag == tags[6]
    decoded = SourceSettings("x", select=Select(check="decode"))
    assert Rules.of(decoded, Data(max_pixels=7), "pairs").tag != tags[3]


def test_sidecars_of_pairs_are_found_under_the_names_they_have(tmp_path):
    """Those of labelled pictures from before a label had to be a number are not."""
    selections = [Select(), Select(check="decode"), Select(score_field="s", min_score=3.0)]
    assert [Rules(select=select).tag for select in selections] == ["", "e7599fecf37c", "45cdaab26e3d"]
    assert Rules(caption="json:txt").tag == "ecac3707027c"
    assert Rules(need="labelled").tag != "5ee8b769080b"
    assert Rules(need="labelled", select=Select(min_side=3)).tag != "aba026955e84"
