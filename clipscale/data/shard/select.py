"""Which samples of a shard are used: settled at index time, from the tar's listing and a source's rules.

    rules = Rules.of(source, data, need="pairs")            # from the settings of a source
    chosen = choose(tar, list_members(tar), rules)
    chosen.keys[0], chosen.spans[0]                         # '000000', [512, 40123, 41472, 31]: picture and caption
    chosen.refused, chosen.not_read                         # {'no caption': 2}, {'.pyd': 3}

A sample is the run of members that share a key (everything up to the basename's first dot), as webdataset groups them.
Only members with a suffix of the allow-list, and below its cap, are ever looked into: pictures, the caption, JSON, the
label. Keys are text and never paths.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from clipscale.config_data import Data, Select, SourceSettings
from clipscale.data.shard.captions import MAX_JSON_BYTES, CaptionError, CaptionRule, look_up, parse_json
from clipscale.data.shard.tar import Listing
from clipscale.data.shard.uids import UidList

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
MAX_PICTURE_BYTES = 1 << 26
MAX_LABEL_BYTES = 64
_MAX_SUFFIXES_TOLD = 20
_META = re.compile(r"__[^/]*__($|/)")  # webdataset's `skip_meta`
Need = Literal["pairs", "labelled"]


@dataclass(frozen=True)
class Rules:
    """What decides which samples of a shard are used. The rest of a source's settings do not matter here."""

    need: Need = "pairs"
    caption: str = "txt"  # as a source has it; of no meaning to labelled pictures
    select: Select = field(default_factory=Select)
    max_pixels: int = Data.max_pixels  # of a picture, where all are decoded
    uids_hash: str | None = None  # of the content of `select.uids`

    @classmethod
    def of(cls, source: SourceSettings, data: Data, need: Need) -> Rules:
        """Raises UserError for a uid file that cannot be used."""
        uids = source.select.uids
        caption = source.caption if need == "pairs" else "txt"
        return cls(need, caption, source.select, data.max_pixels, None if uids is None else UidList.open(uids).hash)

    @property
    def tag(self) -> str:
        """Names the sidecars of these rules; empty for pairs with a .txt and no further rule."""
        facts: dict[str, Any] = {"need": self.need, "caption": self.caption}
        facts |= {name: value for name, value in dataclasses.asdict(self.select).items() if name != "uids"}
        facts["uids"] = self.uids_hash
        if self.select.check == "decode":
            facts["max_pixels"] = self.max_pixels
        if facts == {"need": "pairs", "caption": "txt", "uids": None} | _NO_SELECTION:
            return ""
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def looks_into_pictures(self) -> bool:
        select = self.select
        return select.check == "decode" or select.min_side > 0 or select.max_aspect is not None


_NO_SELECTION = {name: value for name, value in dataclasses.asdict(Select()).items() if name != "uids"}


class Chosen(NamedTuple):
    """The usable samples, in the shard's order; n of them."""

    keys: list[str]
    spans: np.ndarray  # int64 [n, 4]: offset and size of the picture, offset and size of the note; bytes
    refused: dict[str, int]  # samples with another fate, by cause
    not_read: dict[str, int]  # members whose suffix is not on the allow-list, by suffix


class _Refused(Exception):
    """The message is the cause."""


def choose(tar: bytes, listing: Listing, rules: Rules) -> Chosen:
    """Raises UserError for a uid file that cannot be used."""
    return _Selector(tar, listing, rules).run()


class _Selector:
    def __init__(self, tar: bytes, listing: Listing, rules: Rules) -> None:
        self.tar, self.listing, self.rules = tar, listing, rules
        self.caption = CaptionRule.of(rules.caption)
        self.note_suffix = self.caption.suffix if rules.need == "pairs" else "cls"
        self.allowed = {*IMAGE_SUFFIXES, "txt", "json", "cls", self.note_suffix}
        self.uids = None if rules.select.uids is None else UidList.open(rules.select.uids)
        self.asks_json = self.uids is not None or rules.select.score_field is not None

    def run(self) -> Chosen:
        refused: Counter[str] = Counter()
        not_read: Counter[str] = Counter()
        keys, pictures, notes = [], [], []
        note_of = self._caption if self.rules.need == "pairs" else self._label
        looks_into_pictures = self.rules.looks_into_pictures
        for key, sample in group(self.listing.names):
            if not self.allowed.issuperset(sample):
                not_read.update(suffix for suffix in sample if suffix not in self.allowed)
            try:
                picture, note = self._picture(sample), note_of(sample)
                if self.asks_json:
                    self._check_json(key, sample)
                if looks_into_pictures:
                    self._check_picture(picture)
            except _Refused as cause:
                refused[str(cause)] += 1
                continue
            keys.append(key)
            pictures.append(picture)
            notes.append(note)
        offsets, sizes = np.array(self.listing.offsets, np.int64), np.array(self.listing.sizes, np.int64)
        columns = [column[rows] for rows in (pictures, notes) for column in (offsets, sizes)] if keys else []
        spans = np.stack(columns, axis=1) if keys else np.empty((0, 4), np.int64)
        return Chosen(keys, spans, dict(refused), _told(not_read))

    def _picture(self, sample: dict[str, int]) -> int:
        for suffix in IMAGE_SUFFIXES:
            if suffix in sample:
                member = sample[suffix]
                if self.listing.sizes[member] > MAX_PICTURE_BYTES:
                    raise _Refused("picture above 64 MiB")
                return member
        raise _Refused("no picture")

    def _caption(self, sample: dict[str, int]) -> int:
        member = sample.get(self.note_suffix)
        if member is None:
            raise _Refused("no caption")
        if self.listing.sizes[member] > self.caption.max_bytes:
            raise _Refused(self.caption.too_large)
        try:
            self.caption.pick(self.listing.data(self.tar, member))
        except CaptionError as error:
            raise _Refused(str(error)) from error
        return member

    def _label(self, sample: dict[str, int]) -> int:
        member = sample.get("cls")
        if member is None:
            raise _Refused("no label")
        if self.listing.sizes[member] > MAX_LABEL_BYTES:
            raise _Refused("label above 64 bytes")
        return member

    def _check_json(self, key: str, sample: dict[str, int]) -> None:
        select, facts = self.rules.select, self._json(sample)
        if self.uids is not None:
            uid = key if select.uid_field == "__key__" else _found(facts, select.uid_field)
            if not isinstance(uid, str):
                raise _Refused("no uid")
            if uid not in self.uids:
                raise _Refused("uid not in the list")
        if select.score_field is not None:
            score = _found(facts, select.score_field)
            if isinstance(score, bool) or not isinstance(score, int | float) or score != score:
                raise _Refused("no score")
            low, high = select.min_score, select.max_score
            if (low is not None and score < low) or (high is not None and score > high):
                raise _Refused("score out of bounds")

    def _json(self, sample: dict[str, int]) -> Any:
        member = sample.get("json")
        if member is None:
            return None
        if self.listing.sizes[member] > MAX_JSON_BYTES:
            raise _Refused("JSON above 1 MiB")
        try:
            return parse_json(self.listing.data(self.tar, member))
        except ValueError as error:
            raise _Refused("broken JSON") from error

    def _check_picture(self, picture: int) -> None:
        from clipscale.data.bad import BadSample
        from clipscale.data.pixels.decode import decode, picture_size  # with torch, which the other rules can spare

        select, data = self.rules.select, self.listing.data(self.tar, picture)
        try:
            height, width, _ = picture_size(data)
            if select.check == "decode":
                decode(data, self.rules.max_pixels)
        except BadSample as bad:
            raise _Refused(bad.cause) from bad
        if min(height, width) < select.min_side:
            raise _Refused("picture too small")
        if select.max_aspect is not None and max(height, width) > select.max_aspect * min(height, width):
            raise _Refused("picture too long")


def group(names: list[str]) -> Iterator[tuple[str, dict[str, int]]]:
    """Runs of members that share a key, as suffix -> number of the member; webdataset's `group_by_keys`.

    Where webdataset raises, at a suffix that the sample has already, a sample of the same key begins.
    """
    current, sample = None, {}
    for number, name in enumerate(names):
        base = name[name.rfind("/") + 1 :]
        stem, dot, suffix = base.partition(".")
        if not dot or not stem or (name.startswith("__") and _META.match(name)):
            continue
        key = name[: len(name) - len(suffix) - 1]
        suffix = suffix.lower()
        if key != current or suffix in sample:
            if sample:
                yield current, sample
            current, sample = key, {}
        sample[suffix] = number
    if sample:
        yield current, sample


def _found(facts: Any, name: str) -> Any:
    try:
        return look_up(facts, tuple(name.split(".")))
    except (LookupError, TypeError):
        return None


def _told(not_read: Counter[str]) -> dict[str, int]:
    """By suffix, as '.pyd'; only so many of them, for a hostile shard can have a suffix for each member."""
    told = {f".{suffix[:40]}": count for suffix, count in not_read.most_common(_MAX_SUFFIXES_TOLD)}
    rest = not_read.total() - sum(told.values())
    return told | {"other suffixes": rest} if rest else told
