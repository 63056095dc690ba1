"""Which samples of a shard are used: settled at index time, from the tar's listing and a source's rules.

    rules = Rules.of(source, data, need="pairs")            # from the settings of a source
    chosen = select_samples(tar, list_members(tar), rules)
    chosen.keys[0], chosen.spans[0]                         # '000000', [512, 40123, 41472, 31]: picture and caption
    chosen.refused, chosen.not_read                         # {'no caption': 2}, {'.pyd': 3, 'hidden file': 1}

A sample is the run of members that share a key (everything up to the basename's first dot), as webdataset groups them.
It is used where the judge (judge.py) finds no fault; of the others the first fault is counted (`refused_samples` tells
which they are). Keys are text and never paths.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from clipscale.config.data import EXTRA, Data, Select, SourceSettings
from clipscale.data.shard.captions import caption_rules
from clipscale.data.shard.group import group, why_passed
from clipscale.data.shard.judge import Fault, Judge, picture_of
from clipscale.data.shard.tar import Listing, passed_member
from clipscale.data.shard.uids import UidList

_MAX_SUFFIXES_TOLD = 20
Need = Literal["pairs", "labelled"]


@dataclass(frozen=True)
class Rules:
    """What decides which samples of a shard are used. The rest of a source's settings do not matter here."""

    need: Need = "pairs"
    caption: str | tuple[str, ...] = "txt"  # as a source has it, or several; of no meaning to labelled pictures
    select: Select = field(default_factory=Select)
    max_pixels: int = Data.max_pixels  # of a picture, where all are decoded
    uids_hash: str | None = None  # of the content of `select.uids`
    extra_uid: str | None = None  # uid_field of extra shards; null: there are none

    @classmethod
    def of(cls, source: SourceSettings, data: Data, need: Need) -> Rules:
        """Raises UserError for a uid file that cannot be used."""
        uids = source.select.uids
        several = tuple(source.caption_shares) if need == "pairs" else ("txt",)
        caption = several if len(several) > 1 else several[0]
        extra_uid = source.extra.uid_field if need == "pairs" and source.extra is not None else None
        uids_hash = None if uids is None else UidList.open(uids).hash
        return cls(need, caption, source.select, data.max_pixels, uids_hash, extra_uid)

    @property
    def captions(self) -> tuple[str, ...]:
        return (self.caption,) if isinstance(self.caption, str) else self.caption

    @property
    def tag(self) -> str:
        """Names the sidecars of these rules; empty for pairs with a .txt and no further rule."""
        facts: dict[str, Any] = {"need": self.need, "caption": self.caption}
        facts |= {name: value for name, value in dataclasses.asdict(self.select).items() if name != "uids"}
        facts["uids"] = self.uids_hash
        if self.select.check == "decode":
            facts["max_pixels"] = self.max_pixels
        if self.need == "labelled":
            facts["label"] = "digits"  # sidecars without this hold labels that are no number
        if self.extra_uid is not None:
            facts["extra_uid"] = self.extra_uid
        if facts == {"need": "pairs", "caption": "txt", "uids": None} | _NO_SELECTION:
            return ""
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


_NO_SELECTION = {name: value for name, value in dataclasses.asdict(Select()).items() if name != "uids"}


class Chosen(NamedTuple):
    """The usable samples, in the shard's order; n of them."""

    keys: list[str]
    spans: np.ndarray  # int64 [n, 2 + 2 C]: offset and size of the picture, and of each note, 0 and 0 for none; bytes
    refused: dict[str, int]  # samples left out, by the first cause
    not_read: dict[str, int]  # members that nothing looks at, by suffix, or why they are in no sample
    captions: dict[str, int]  # usable samples that have each of several captions; empty: one is asked for
    uids: list[str | None]  # [n], by which extra captions are joined; empty: none are


def select_samples(tar: bytes, listing: Listing, rules: Rules) -> Chosen:
    """Raises UserError for a uid file that cannot be used."""
    judge = _judge(tar, listing, rules)
    several = rules.captions if rules.need == "pairs" and len(rules.captions) > 1 else ()
    note_suffix = "cls" if rules.need == "labelled" else caption_rules(rules.caption)[0].suffix
    uids: list[str | None] = []
    allowed = judge.allowed
    refused: Counter[str] = Counter()
    not_read: Counter[str] = Counter(passed_member(tar, offset)[1] for offset in listing.passed)
    passed: list[int] = []
    keys, members = [], []  # of each usable sample the numbers of its picture and its notes, -1 for none, in turn
    for key, sample in group(listing.names, passed):
        if not allowed.issuperset(sample):
            not_read.update(f".{suffix[:40]}" for suffix in sample if suffix not in allowed)
        fault = judge.first_fault(key, sample)
        if fault is not None:
            refused[fault.cause] += 1
            continue
        keys.append(key)
        members.append(picture_of(sample))
        if several:
            own = iter(judge.captions(sample))
            notes = (None if name.startswith(EXTRA) else next(own) for name in several)
            members += [note if isinstance(note, int) else -1 for note in notes]
        else:
            members.append(sample[note_suffix])
        if rules.extra_uid is not None:
            uids.append(judge.uid(key, sample, rules.extra_uid))
    not_read.update(why_passed(listing.names[number]) for number in passed)
    width = 1 + max(1, len(several))
    columns = np.array(members, np.int64).reshape(-1, width)
    facts = (np.array([*numbers, 0], np.int64) for numbers in (listing.offsets, listing.sizes))  # -1: the 0
    spans = np.stack([of_member[columns] for of_member in facts], axis=2).reshape(-1, 2 * width)
    having = dict(zip(several, (columns[:, 1:] >= 0).sum(axis=0).tolist(), strict=False))
    return Chosen(keys, spans, dict(refused), _told(not_read), having, uids)


def refused_samples(tar: bytes, listing: Listing, rules: Rules) -> Iterator[tuple[str, int, Fault]]:
    """Key, first member and first fault of each sample that `select_samples` leaves out, in the shard's order.

    Raises:
        UserError: a uid file that cannot be used.
    """
    judge = _judge(tar, listing, rules)
    for key, sample in group(listing.names):
        fault = judge.first_fault(key, sample)
        if fault is not None:
            yield key, next(iter(sample.values())), fault


def _judge(tar: bytes, listing: Listing, rules: Rules) -> Judge:
    captions = caption_rules(tuple(name for name in rules.captions if not name.startswith(EXTRA)))
    return Judge(tar, listing, need=rules.need, captions=captions, select=rules.select, max_pixels=rules.max_pixels)


def _told(not_read: Counter[str]) -> dict[str, int]:
    """Only so many kinds of them, for a hostile shard can have a suffix for each member."""
    told = dict(not_read.most_common(_MAX_SUFFIXES_TOLD))
    rest = not_read.total() - sum(told.values())
    return told | {"other suffixes": rest} if rest else told
