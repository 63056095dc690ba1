"""clipscale/data/shard/judge.py and labels.py: indexing and checking find the same faults, by one judge."""

import gc
import io
import json
import re
import tarfile
import weakref
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from shards import picture, write_shard

from clipscale.config.data import Select
from clipscale.data.shard import judge as judge_module
from clipscale.data.shard.captions import caption_rules
from clipscale.data.shard.judge import Fault, Judge, picture_of
from clipscale.data.shard.labels import LabelError, label_of
from clipscale.data.shard.select import Rules, group, refused_samples, select_samples
from clipscale.data.shard.tar import Listing, list_members
from clipscale.shardkit.checks import Problem, Wanted, check_shard

JPEG = picture(0, 16, 16)
MAX_PIXELS = 1000
NUMBER = re.compile(rb"[ \t\n\r\x0b\x0c]*[0-9]+[ \t\n\r\x0b\x0c]*")
LABELS = {b"0": 0, b"17": 17, b"007": 7, b"3\n": 3, b" \t12\r\n": 12, b"5" * 64: int("5" * 64), b" " * 63 + b"1": 1}
NO_LABELS = [b"", b" \n", b"cat", b"1_0", b"-1", b"+4", b"1.5", b"1e3", b"0x1f", b"1 2", b"1\0", b"\x1c1", b"\xff"]
NO_LABELS += [digits.encode() for digits in ("١٢", "１", "²", "\u20091", "1\xa0")]  # what str.isdigit or int may take
LONG_LABELS = [b"5" * 65, b" " * 64 + b"1"]

# --- labels -----------------------------------------------------------------------------------------------------------


def fault_of(tar: bytes, need: str, **settings) -> Fault | None:
    """The first fault of the only sample."""
    listing = list_members(tar)
    judge = Judge(tar, listing, need=need, captions=caption_rules("txt"), select=Select(), max_pixels=1, **settings)
    ((key, sample),) = group(listing.names)
    return judge.first_fault(key, sample)


@pytest.mark.parametrize("note", [*LABELS, *NO_LABELS, *LONG_LABELS])
def test_every_form_of_a_label(tmp_path, note):
    tar = write_shard(tmp_path / "x.tar", [("a", {"jpg": JPEG, "cls": note})]).read_bytes()
    if note in LABELS:
        assert label_of(note) == LABELS[note]
        assert fault_of(tar, "labelled") is None
        return
    cause = "label above 64 bytes" if note in LONG_LABELS else "label is not a number"
    with pytest.raises(LabelError, match=cause):
        label_of(note)
    detail = f"{len(note)} bytes" if note in LONG_LABELS else repr(note)
    assert fault_of(tar, "labelled") == fault_of(tar, "any") == Fault(1, cause, detail)
    assert fault_of(tar, "pairs") == Fault(None, "no caption")


@given(st.binary(max_size=66) | st.text(st.characters(categories=["Nd", "Zs", "Cc"]), max_size=22).map(str.encode))
def test_a_label_is_ascii_digits_in_64_bytes(note):
    try:
        assert label_of(note) == int(note)
        usable = True
    except LabelError:
        usable = False
    assert usable == (len(note) <= 64 and NUMBER.fullmatch(note) is not None)


# --- one judge --------------------------------------------------------------------------------------------------------

PICTURES = [JPEG, JPEG[:200], b"GIF89a" + bytes(50), b"", picture(1, 40, 40), bytes(3000)]  # the last two: too large
CAPTIONS = [b"a caption", " größer\n".encode(), b"", b" \n", b"caf\xe9", b"x" * 70_000]
FACTS = [{"text": "a"}, {"text": [" ", "b"]}, {"text": 3}, {"text": ""}, {}, ["text"], {"text": "\ud800"}]
JSONS = [*(json.dumps(facts).encode() for facts in FACTS), b"{broken", b"[" * 5000, b"\xff", b" " * ((1 << 20) + 1)]
notes = {
    "jpg": st.just(JPEG) | st.sampled_from(PICTURES) | st.binary(max_size=40).map(lambda data: JPEG[:300] + data),
    "png": st.sampled_from(PICTURES),
    "txt": st.sampled_from(CAPTIONS) | st.binary(max_size=4),
    "cls": st.sampled_from([*LABELS, *NO_LABELS, *LONG_LABELS]) | st.binary(max_size=3),
    "json": st.sampled_from(JSONS) | st.binary(max_size=6),
    "pyd": st.just(b"1"),
    "gif": st.just(b"GIF89a"),
    "1.jpg": st.just(JPEG),
}
samples = st.lists(st.fixed_dictionaries({}, optional=notes).filter(bool), min_size=1, max_size=6)
odd_names = st.sampled_from(["README", "._1.jpg", "a/.hidden", "LINK", "FIFO", "__meta__", "d/__x__/1.jpg"])
odd = st.lists(st.tuples(st.integers(0, 30), odd_names), max_size=3)
flips = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), max_size=2)
UNDECODED = {"not JPEG, PNG or WebP", "broken picture", "too many pixels"}
CHECK_ONLY = {"key occurs twice", "key leads out of its folder", "member that is not read", "damaged archive"}


def among_the_indexs(problem: Problem, rules: Rules) -> bool:
    """Whether an index of these rules looks for such a fault."""
    if problem.cause in CHECK_ONLY or (rules.select.check == "fast" and problem.cause in UNDECODED):
        return False
    json_is_caption = rules.need == "pairs" and rules.caption.startswith("json")
    return json_is_caption or problem.cause not in ("broken JSON", "JSON above 1 MiB")


def write_odd(path: Path, members: list[tuple[str, bytes]], zeros_from: float | None) -> bytes:
    """A tar of names and bytes, where LINK and FIFO stand for such; from a member on filled with zeros."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            if name in ("LINK", "FIFO"):
                member.type, member.linkname = (tarfile.SYMTYPE if name == "LINK" else tarfile.FIFOTYPE), "0.jpg"
            else:
                member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        headers = [member.offset for member in tar.getmembers()]
    data = path.read_bytes()
    if zeros_from is not None:
        start = headers[int(zeros_from * len(headers))]
        data = data[:start] + bytes(len(data) - start)
    return data


@settings(max_examples=60, deadline=None)
@given(
    samples,
    flips,
    odd,
    st.sampled_from(["as packed", "by suffix", "reversed"]),
    st.none() | st.floats(0, 1, exclude_max=True),
    st.sampled_from(["pairs", "labelled"]),
    st.sampled_from(["txt", "json:text", "json"]),
    st.sampled_from(["fast", "decode"]),
)
@example(
    [{"jpg": JPEG, "cls": note} for note in (*LABELS, *NO_LABELS, *LONG_LABELS)],
    *([], [], "as packed", None, "labelled", "txt", "fast"),
)
@example(
    [{"jpg": JPEG[:200], "txt": b" ", "json": b"{"}, {"jpg": JPEG, "txt": b"x"}],
    *([], [(1, "LINK"), (2, "README"), (9, "._1.jpg")], "as packed", None, "pairs", "txt", "decode"),
)
@example(
    [{"jpg": data, "json": JSONS[0]} for data in PICTURES],
    *([], [], "as packed", None, "pairs", "json:text", "decode"),
)
@example([{"jpg": JPEG, "txt": b"x"}, {"gif": b"", "txt": b"x"}], [], [], "by suffix", None, "pairs", "txt", "fast")
@example([{"jpg": JPEG * 9, "txt": b"x"}] * 9, [], [], "as packed", 0.5, "pairs", "txt", "fast")
def test_indexing_and_checking_agree_on_every_sample(
    tmp_path_factory, drawn, flips, odd, order, zeros_from, need, caption, check
):
    members = [(f"{i}.{suffix}", data) for i, sample in enumerate(drawn) for suffix, data in sample.items()]
    for place, name in odd:
        members.insert(place, (name, b"odd"))
    if order != "as packed":
        members = (
            sorted(members, key=lambda member: member[0].split(".")[-1]) if order == "by suffix" else members[::-1]
        )
    path = tmp_path_factory.getbasetemp() / "judged.tar"
    tar = bytearray(write_odd(path, members, zeros_from))
    for place, change in flips:
        tar[int(place * len(tar))] ^= change
    path.write_bytes(tar)
    rules = Rules(need, caption, Select(check=check), MAX_PIXELS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judge_module, "MAX_PICTURE_BYTES", 2500)
        compare(path, rules)


def compare(path: Path, rules: Rules) -> None:
    """What the index leaves out, and why, is what checking finds: sample by sample, member by member, byte by byte."""
    tar = path.read_bytes()
    listing, found = list_members(tar), check_shard(str(path), Wanted(rules.need, rules.caption, MAX_PIXELS), None)
    problems: dict[int, list[Problem]] = {}  # by first member of their sample
    sample_of = {m: next(iter(s.values())) for _, s in group(listing.names) for m in s.values()}
    for problem in found.problems:
        if problem.key:
            problems.setdefault(sample_of[listing.offsets.index(problem.offset)], []).append(problem)
    causes: dict[int, str] = {}  # of the samples that checking would have the index leave out
    for first, faults in problems.items():
        among = [fault.cause for fault in faults if among_the_indexs(fault, rules)]
        causes |= {first: among[0]} if among else {}
    refused = {first: fault.cause for _, first, fault in refused_samples(tar, listing, rules)}
    assert refused == causes
    indexed = select_samples(tar, listing, rules)
    firsts = {next(iter(sample.values())): key for key, sample in group(listing.names)}
    assert indexed.keys == [key for first, key in firsts.items() if first not in refused]
    assert indexed.refused == Counter(refused.values())
    assert found.usable == len(firsts) - len(problems)
    not_read = Counter(problem.detail for problem in found.problems if problem.cause == "member that is not read")
    assert indexed.not_read == not_read
    damage = [problem.detail for problem in found.problems if problem.cause == "damaged archive"]
    assert damage == [listing.cut] * bool(listing.cut)
    pictures = sum(picture_of(sample) is not None for _, sample in group(listing.names))
    told = Counter(problem.cause for problem in found.problems)
    assert len(found.pictures) == pictures - sum(told[cause] for cause in (*UNDECODED, "picture above 64 MiB"))


@settings(max_examples=25, deadline=None)
@given(samples)
def test_any_takes_what_is_there(tmp_path_factory, drawn):
    """A caption or a label will do; of both, each must be whole."""
    path = tmp_path_factory.getbasetemp() / "any.tar"
    tar = write_shard(path, [(f"{i}", sample) for i, sample in enumerate(drawn)]).read_bytes()
    listing, rules = list_members(tar), caption_rules("txt")
    judges = [
        Judge(tar, listing, need=need, captions=rules, select=Select(), max_pixels=1)
        for need in ("pairs", "labelled", "any")
    ]
    for key, sample in group(listing.names):
        found = [judge.faults(key, sample) for judge in judges]
        assert [judge.first_fault(key, sample) for judge in judges] == [next(iter(faults), None) for faults in found]
        pairs, labelled, either = ({fault.cause for fault in faults} for faults in found)
        lacking = {"no caption", "no label"}
        expected = (pairs | labelled) - lacking | (
            {"neither caption nor label"} if lacking <= pairs | labelled else set()
        )
        assert either == expected


# --- what it costs ----------------------------------------------------------------------------------------------------


def test_nothing_is_looked_into_after_the_first_fault(tmp_path):
    parts = {"jpg": JPEG, "txt": b" ", "json": b"{}", "pyd": b"1"}
    listing = list_members(tar := write_shard(tmp_path / "x.tar", [("a", parts)]).read_bytes())
    looked = []

    class Watched(bytes):
        def __getitem__(self, where):
            looked.append(listing.offsets.index(where.start))
            return super().__getitem__(where)

    judge = Judge(
        Watched(tar),
        listing,
        need="pairs",
        captions=caption_rules("txt"),
        select=Select(check="decode", score_field="s", min_score=1.0),
        max_pixels=MAX_PIXELS,
    )
    ((key, sample),) = group(listing.names)
    assert (judge.first_fault(key, sample), looked) == (Fault(1, "empty caption"), [1])
    assert [fault.cause for fault in judge.faults(key, sample)] == ["empty caption", "no score"]
    assert looked == [1, 1, 2, 0]


def test_a_judge_goes_with_its_last_reference():
    """And with it the map of the tar: a run of ten thousand shards must not wait for the garbage collector."""
    judge = Judge(b"", Listing(), need="any", captions=caption_rules("txt"), select=Select(), max_pixels=1)
    gone = weakref.ref(judge)
    gc.disable()
    try:
        del judge
        assert gone() is None
    finally:
        gc.enable()
