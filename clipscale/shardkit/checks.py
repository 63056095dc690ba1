"""One shard, verified to its last byte: what is in it, what is broken and where, and hashes of its contents.

    found = check_shard("train-0000.tar", Wanted(need="pairs", caption="txt", max_pixels=50_000_000), cache=None)
    found.samples, found.problems[0]        # 10000, Problem(key='000017', member='000017.jpg', offset=9216, cause=...)

The rules are those of indexing (clipscale/data/shard/select.py), but every picture is decoded, and a sample is told of
every fault it has.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal, NamedTuple

import numpy as np

from clipscale.data.bad import BadSample
from clipscale.data.fetch.cache import ShardCache
from clipscale.data.fetch.urls import is_local
from clipscale.data.pixels.decode import decode
from clipscale.data.shard.captions import MAX_JSON_BYTES, CaptionError, CaptionRule, parse_json
from clipscale.data.shard.select import IMAGE_SUFFIXES, MAX_LABEL_BYTES, MAX_PICTURE_BYTES, group
from clipscale.data.shard.tar import Listing, list_members, mapped

DIGEST_BYTES = 16


@dataclass(frozen=True)
class Wanted:
    """What a sample should be."""

    need: Literal["any", "pairs", "labelled"]  # beside the picture: any: a caption or a label
    caption: str  # as a source of the config has it: txt, json:<field>
    max_pixels: int


class Problem(NamedTuple):
    """Something to mend. `key` and `member` are empty where the whole shard is meant; offset: of the member's data."""

    key: str
    member: str
    offset: int
    cause: str
    detail: str


@dataclass
class Checked:
    """What was found in one shard; n samples in the order of the tar, whatever they are worth."""

    url: str
    bytes: int = 0
    members: int = 0
    samples: int = 0
    usable: int = 0  # samples without any problem
    problems: list[Problem] = field(default_factory=list)
    not_read: dict[str, int] = field(default_factory=dict)  # members that the loader passes over, by suffix
    kinds: dict[str, int] = field(default_factory=dict)  # pictures by the suffix of their member
    pictures: np.ndarray = field(default_factory=lambda: np.empty((0, 4), np.int64))  # sample, bytes, width, height
    captions: np.ndarray = field(default_factory=lambda: np.empty((0, 2), np.int64))  # sample, characters
    picture_digests: np.ndarray = field(default_factory=lambda: np.empty((0, DIGEST_BYTES), np.uint8))
    caption_digests: np.ndarray = field(default_factory=lambda: np.empty((0, DIGEST_BYTES), np.uint8))


@contextmanager
def opened(url: str, cache: ShardCache | None) -> Iterator[bytes]:
    """The bytes of a local shard, or of the cache's copy of a remote one."""
    if is_local(url):
        with mapped(url) as tar:
            yield tar
        return
    file = cache.open(url)
    try:
        with mapped(file) as tar:
            yield tar
    finally:
        os.close(file)


def check_shard(url: str, wanted: Wanted, cache: ShardCache | None) -> Checked:
    try:
        with opened(url, cache) as tar, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow on odd metadata of pictures that decode well
            return _Check(url, tar, wanted).run()
    except OSError as error:
        return Checked(url, problems=[Problem("", "", 0, "shard cannot be read", str(error))])


class _Fault(Exception):
    def __init__(self, member: int, cause: str, detail: str = "") -> None:
        super().__init__(cause)
        self.member, self.cause, self.detail = member, cause, detail


class _Check:
    def __init__(self, url: str, tar: bytes, wanted: Wanted) -> None:
        self.tar, self.wanted = tar, wanted
        self.listing: Listing = list_members(tar)
        self.rule = CaptionRule.of(wanted.caption)
        self.found = Checked(url, bytes=len(tar), members=len(self.listing.names))
        self.pictures, self.captions = [], []
        self.picture_digests, self.caption_digests = [], []

    def run(self) -> Checked:
        found, keys, not_read, kinds = self.found, set(), Counter(), Counter()
        allowed = {*IMAGE_SUFFIXES, "txt", "json", "cls", self.rule.suffix}
        for number, (key, sample) in enumerate(group(self.listing.names)):
            found.samples += 1
            before = len(found.problems)
            first = next(iter(sample.values()))
            if key in keys:
                self._problem(key, first, "key occurs twice", "readers would take the members for one sample, or stop")
            keys.add(key)
            if key.startswith("/") or ".." in key.split("/"):
                self._problem(key, first, "key leads out of its folder", "never unpack this archive")
            for suffix in sample.keys() - allowed:
                not_read[suffix] += 1
                self._problem(key, sample[suffix], "member that is not read", f".{suffix[:40]}")
            kinds.update(suffix for suffix in IMAGE_SUFFIXES if suffix in sample)
            for check in (self._picture, self._caption, self._label, self._json):
                try:
                    check(number, sample)
                except _Fault as fault:
                    self._problem(key, fault.member, fault.cause, fault.detail)
            found.usable += len(found.problems) == before
        if self.listing.cut:
            found.problems.append(Problem("", "", len(self.tar), "damaged archive", self.listing.cut))
        found.not_read, found.kinds = dict(not_read), dict(kinds)
        found.pictures = np.array(self.pictures, np.int64).reshape(-1, 4)
        found.captions = np.array(self.captions, np.int64).reshape(-1, 2)
        found.picture_digests = _rows(self.picture_digests)
        found.caption_digests = _rows(self.caption_digests)
        return found

    def _problem(self, key: str, member: int, cause: str, detail: str = "") -> None:
        name, offset = self.listing.names[member], self.listing.offsets[member]
        self.found.problems.append(Problem(key, name, offset, cause, detail))

    def _picture(self, number: int, sample: dict[str, int]) -> None:
        member = next((sample[suffix] for suffix in IMAGE_SUFFIXES if suffix in sample), None)
        if member is None:
            raise _Fault(next(iter(sample.values())), "no picture")
        if self.listing.sizes[member] > MAX_PICTURE_BYTES:
            raise _Fault(member, "picture above 64 MiB", f"{self.listing.sizes[member]} bytes")
        data = self.listing.data(self.tar, member)
        try:
            height, width, _ = decode(data, self.wanted.max_pixels).shape
        except BadSample as bad:
            raise _Fault(member, bad.cause, str(bad)) from bad
        self.pictures.append((number, len(data), width, height))
        self.picture_digests.append(digest(data))

    def _caption(self, number: int, sample: dict[str, int]) -> None:
        need, member = self.wanted.need, sample.get(self.rule.suffix)
        if need == "labelled":
            return
        if member is None:
            if need == "any" and "cls" in sample:
                return
            raise _Fault(next(iter(sample.values())), "no caption" if need == "pairs" else "neither caption nor label")
        if self.listing.sizes[member] > self.rule.max_bytes:
            raise _Fault(member, self.rule.too_large)
        try:
            text = self.rule.pick(self.listing.data(self.tar, member))
        except CaptionError as error:
            raise _Fault(member, str(error)) from error
        self.captions.append((number, len(text)))
        self.caption_digests.append(digest(text.encode()))

    def _label(self, number: int, sample: dict[str, int]) -> None:
        need, member = self.wanted.need, sample.get("cls")
        if need == "labelled" and member is None:
            raise _Fault(next(iter(sample.values())), "no label")
        if need == "pairs" or member is None:
            return
        note = self.listing.data(self.tar, member) if self.listing.sizes[member] <= MAX_LABEL_BYTES else b""
        if not note.strip().isdigit():
            raise _Fault(member, "label is not a number", repr(note))

    def _json(self, number: int, sample: dict[str, int]) -> None:
        member = sample.get("json")
        if member is None or member == sample.get(self.rule.suffix):  # a caption in JSON has been looked at
            return
        if self.listing.sizes[member] > MAX_JSON_BYTES:
            raise _Fault(member, "JSON above 1 MiB")
        try:
            parse_json(self.listing.data(self.tar, member))
        except ValueError as error:
            raise _Fault(member, "broken JSON", str(error)) from error


def _rows(digests: list[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, DIGEST_BYTES)


def digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()[:DIGEST_BYTES]


def look_up_sample(url: str, number: int, caption: str, cache: ShardCache | None) -> tuple[str, str]:
    """(key, caption) of a sample by its number in the shard; an empty caption where there is none."""
    rule = CaptionRule.of(caption)
    with opened(url, cache) as tar:
        listing = list_members(tar)
        key, sample = next(islice(group(listing.names), number, None))
        member = sample.get(rule.suffix)
        if member is None:
            return key, ""
        with suppress(CaptionError):
            return key, rule.pick(listing.data(tar, member))
        return key, ""
