"""One shard, verified to its last byte: what is in it, what is broken and where, and hashes of its contents.

    found = check_shard("train-0000.tar", Wanted(need="pairs", caption="txt", max_pixels=50_000_000), cache=None)
    found.samples, found.problems[0]        # 10000, Problem(key='000017', member='000017.jpg', offset=9216, cause=...)

The judge is that of indexing (clipscale/data/shard/judge.py), but every picture is decoded, all JSON is looked into,
and a sample is told of every fault it has.
"""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal, NamedTuple

import numpy as np

from clipscale.config.data import Select
from clipscale.data.fetch.cache import ShardCache
from clipscale.data.fetch.urls import is_local
from clipscale.data.pixels.decode import picture_size
from clipscale.data.shard.captions import CaptionError, CaptionRule, caption_rules
from clipscale.data.shard.group import group, why_passed
from clipscale.data.shard.index_many import opened
from clipscale.data.shard.judge import IMAGE_SUFFIXES, Judge, picture_of
from clipscale.data.shard.tar import Listing, list_members, passed_member

DIGEST_BYTES = 16


@dataclass(frozen=True)
class Wanted:
    """What a sample should be."""

    need: Literal["any", "pairs", "labelled"]  # beside the picture: any: a caption or a label
    caption: str | tuple[str, ...]  # as a source of the config has it: txt, json:<field>; or several
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
    not_read: dict[str, int] = field(default_factory=dict)  # members that the loader passes over, by suffix or kind
    kinds: dict[str, int] = field(default_factory=dict)  # pictures by the suffix of their member
    pictures: np.ndarray = field(default_factory=lambda: np.empty((0, 4), np.int64))  # sample, bytes, width, height
    captions: np.ndarray = field(default_factory=lambda: np.empty((0, 2), np.int64))  # sample, characters
    picture_digests: np.ndarray = field(default_factory=lambda: np.empty((0, DIGEST_BYTES), np.uint8))
    caption_digests: np.ndarray = field(default_factory=lambda: np.empty((0, DIGEST_BYTES), np.uint8))


def check_shard(url: str, wanted: Wanted, cache: ShardCache | None) -> Checked:
    try:
        with opened(url, cache) as tar, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow on odd metadata of pictures that decode well
            return _Check(url, tar, wanted, copy="" if is_local(url) else cache.shown(url)).run()
    except OSError as error:
        return Checked(url, problems=[Problem("", "", 0, "shard cannot be read", str(error))])


class _Check:
    def __init__(self, url: str, tar: bytes, wanted: Wanted, copy: str) -> None:
        self.tar, self.listing, self.copy = tar, list_members(tar), copy
        self.rules = () if wanted.need == "labelled" else caption_rules(wanted.caption)
        self.judge = Judge(
            tar,
            self.listing,
            need=wanted.need,
            captions=caption_rules(wanted.caption),
            select=Select(check="decode"),
            max_pixels=wanted.max_pixels,
            every_json=True,
        )
        self.found = Checked(url, bytes=len(tar), members=len(self.listing.names))
        self.pictures, self.captions = [], []
        self.picture_digests, self.caption_digests = [], []

    def run(self) -> Checked:
        found, keys, not_read, kinds, passed = self.found, set(), Counter(), Counter(), []
        for number, (key, sample) in enumerate(group(self.listing.names, passed)):
            found.samples += 1
            before = len(found.problems)
            first = next(iter(sample.values()))
            if key in keys:
                self._problem(key, first, "key occurs twice", "readers would take the members for one sample, or stop")
            keys.add(key)
            if key.startswith("/") or ".." in key.split("/"):
                self._problem(key, first, "key leads out of its folder", "never unpack this archive")
            for suffix in sample.keys() - self.judge.allowed:
                not_read[suffix] += 1
                self._problem(key, sample[suffix], "member that is not read", f".{suffix[:40]}")
            kinds.update(suffix for suffix in IMAGE_SUFFIXES if suffix in sample)
            faulty = set()
            for fault in self.judge.faults(key, sample):
                faulty.add(fault.member)
                self._problem(key, first if fault.member is None else fault.member, fault.cause, fault.detail)
            self._measure(number, picture_of(sample), first_caption(self.tar, self.listing, sample, self.rules), faulty)
            found.usable += len(found.problems) == before
        for kind in self._passed_over(passed):
            not_read[kind] += 1
        if self.listing.cut:
            found.problems.append(Problem("", "", len(self.tar), "damaged archive", self.listing.cut + self.copy))
        found.not_read, found.kinds = dict(not_read), dict(kinds)
        found.pictures = np.array(self.pictures, np.int64).reshape(-1, 4)
        found.captions = np.array(self.captions, np.int64).reshape(-1, 2)
        found.picture_digests = _rows(self.picture_digests)
        found.caption_digests = _rows(self.caption_digests)
        return found

    def _passed_over(self, members: list[int]) -> Iterator[str]:
        """The kinds of what belongs to no sample; each is a problem."""
        for member in members:
            kind = why_passed(self.listing.names[member])
            self._problem("", member, "member that is not read", kind)
            yield kind
        for offset in self.listing.passed:
            name, kind = passed_member(self.tar, offset)
            self.found.problems.append(Problem("", name, offset, "member that is not read", kind))
            yield kind

    def _problem(self, key: str, member: int, cause: str, detail: str = "") -> None:
        name, offset = self.listing.names[member], self.listing.offsets[member]
        self.found.problems.append(Problem(key, name, offset, cause, detail))

    def _measure(self, number: int, picture: int | None, caption: str, faulty: set[int | None]) -> None:
        """Sizes and digests of what the sample has, where no fault was found in it."""
        if picture is not None and picture not in faulty:
            data = self.listing.data(self.tar, picture)
            height, width, _ = picture_size(data)
            self.pictures.append((number, len(data), width, height))
            self.picture_digests.append(digest(data))
        if caption:
            self.captions.append((number, len(caption)))
            self.caption_digests.append(digest(caption.encode()))


def _rows(digests: list[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, DIGEST_BYTES)


def digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()[:DIGEST_BYTES]


def look_up_sample(url: str, number: int, caption: str | tuple[str, ...], cache: ShardCache | None) -> tuple[str, str]:
    """(key, caption) of a sample by its number in the shard; an empty caption where there is none."""
    with opened(url, cache) as tar:
        listing = list_members(tar)
        key, sample = next(islice(group(listing.names), number, None))
        return key, first_caption(tar, listing, sample, caption_rules(caption))


def first_caption(tar: bytes, listing: Listing, sample: dict[str, int], rules: tuple[CaptionRule, ...]) -> str:
    """By the first of the rules that finds one; empty: none does."""
    for rule in rules:
        member = sample.get(rule.suffix)
        if member is not None and listing.sizes[member] <= rule.max_bytes:
            with suppress(CaptionError):
                return rule.pick(listing.data(tar, member))
    return ""
