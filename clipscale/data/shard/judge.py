"""What is wrong with a sample: indexing asks for the first fault, checking for all.

    judge = Judge(tar, listing, need="pairs", captions=caption_rules("txt"), select=Select(), max_pixels=50_000_000)
    for key, sample in group(listing.names):            # '000017', {'jpg': 34, 'txt': 35}
        fault = judge.first_fault(key, sample)          # Fault(member=35, cause='empty caption'), or None: it is usable

Only members of the suffixes in `allowed`, and below their caps, are ever looked into: pictures, the caption, JSON, the
label.
"""

from __future__ import annotations

from contextlib import suppress
from functools import cached_property
from typing import Any, Literal, NamedTuple

from clipscale.config.data import Select
from clipscale.data.bad import BadSample
from clipscale.data.shard.captions import (
    MAX_JSON_BYTES,
    NO_CAPTION,
    CaptionError,
    CaptionRule,
    look_up,
    parse_json,
)
from clipscale.data.shard.group import lying_apart
from clipscale.data.shard.labels import MAX_LABEL_BYTES, TOO_LARGE, LabelError, label_of
from clipscale.data.shard.tar import Listing
from clipscale.data.shard.uids import UidList

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
OTHER_PICTURE_SUFFIXES = (
    "gif",
    "bmp",
    "tif",
    "tiff",
    "avif",
    "heic",
    "heif",
    "jp2",
    "jxl",
    "jpe",
    "jfif",
    "ppm",
    "svg",
)
MAX_PICTURE_BYTES = 1 << 26
APART = "members lie apart"
# What `select` and a uid list leave out as they are asked to, and pictures that came without words, which nobody can
# mend. Every other cause is a fault of the sample.
ON_PURPOSE = frozenset(
    {
        *("no uid", "uid not in the list", "no score", "score out of bounds", "picture too small", "picture too long"),
        "empty caption",
    }
)


class Fault(NamedTuple):
    member: int | None  # its number in the listing; None where a member is missing
    cause: str
    detail: str = ""


class Judge:
    """Judges the samples of one tar.

    Args:
        need: beside the picture: a caption, a label, or either ("any").
        captions: of which a sample needs one.
        select: what else a sample must be.
        max_pixels: of a picture, where `select` has all decoded.
        every_json: JSON must be whole even where neither the caption nor `select` asks for it.

    Raises:
        UserError: a uid file that cannot be used.
    """

    def __init__(
        self,
        tar: bytes,
        listing: Listing,
        *,
        need: Literal["any", "pairs", "labelled"],
        captions: tuple[CaptionRule, ...],
        select: Select,
        max_pixels: int,
        every_json: bool = False,
    ) -> None:
        self._tar, self._listing, self._sizes = tar, listing, listing.sizes
        self._need, self._captions, self._select, self._max_pixels = need, captions, select, max_pixels
        self._caption_suffixes = {rule.suffix for rule in captions}
        self._uids = None if select.uids is None else UidList.open(select.uids)
        self.allowed = {*IMAGE_SUFFIXES, "txt", "json", "cls", *self._caption_suffixes}
        caption_is_json = need != "labelled" and self._caption_suffixes == {"json"}  # then its fault is the JSON's
        asks_json = self._uids is not None or select.score_field is not None or (every_json and not caption_is_json)
        checks = {  # not bound to this judge: it would keep itself, and with it the tar, alive
            Judge._picture: True,
            Judge._caption: need != "labelled",
            Judge._label: need != "pairs",
            Judge._facts: asks_json,
            Judge._pixels: looks_into_pictures(select),
        }
        self._checks = [check for check, applies in checks.items() if applies]

    def first_fault(self, key: str, sample: dict[str, int]) -> Fault | None:
        """Of a sample, as suffix -> number of the member; nothing is looked into after it."""
        for check in self._checks:
            fault = check(self, key, sample)
            if fault is not None:
                return fault
        return None

    def faults(self, key: str, sample: dict[str, int]) -> list[Fault]:
        """All of them, in the order in which `first_fault` looks for one; of captions also those of a sample that has
        another one."""
        found = [check(self, key, sample) for check in self._checks]
        if self._need != "labelled" and len(self._captions) > 1:
            found += [
                fault for fault in self.captions(sample) if isinstance(fault, Fault) and fault.cause != NO_CAPTION
            ]
        once = {(fault.member, fault.cause): fault for fault in reversed(found) if fault is not None}
        return [fault for fault in found if fault is not None and once[fault.member, fault.cause] is fault]

    def captions(self, sample: dict[str, int]) -> list[int | Fault]:
        """The member that holds each of the captions, or why the sample lacks it."""
        return [self._caption_in(rule, sample) for rule in self._captions]

    def uid(self, key: str, sample: dict[str, int], field: str) -> str | None:
        """What `field` of the JSON, or the key for __key__, says that the sample is."""
        if field == "__key__":
            return key
        member = sample.get("json")
        if member is None or self._sizes[member] > MAX_JSON_BYTES:
            return None
        with suppress(ValueError):
            uid = _found(parse_json(self._listing.data(self._tar, member)), field)
            return uid if isinstance(uid, str) else None
        return None

    @cached_property
    def _apart(self) -> dict[str, list[set[str]]]:  # looked for where something is missing only
        return lying_apart(self._listing.names)

    def _lies_elsewhere(self, key: str, sample: dict[str, int], *suffixes: str) -> bool:
        """Whether one of these members is with another part of the sample, in another place of the tar."""
        return any(not part.isdisjoint(suffixes) and part.isdisjoint(sample) for part in self._apart.get(key, ()))

    def _picture(self, key: str, sample: dict[str, int]) -> Fault | None:
        member = picture_of(sample)
        if member is None:
            if self._lies_elsewhere(key, sample, *IMAGE_SUFFIXES):
                return Fault(None, APART)
            other = next((suffix for suffix in OTHER_PICTURE_SUFFIXES if suffix in sample), None)
            return Fault(None, "no picture") if other is None else Fault(sample[other], "picture of another format")
        if self._sizes[member] > MAX_PICTURE_BYTES:
            return Fault(member, "picture above 64 MiB", f"{self._sizes[member]} bytes")
        return None

    def _caption(self, key: str, sample: dict[str, int]) -> Fault | None:
        """Where a sample has none of the captions: what is wrong with the first that is there and bad."""
        faults = []
        for rule in self._captions:
            found = self._caption_in(rule, sample)
            if not isinstance(found, Fault):
                return None
            faults.append(found)
        fault = min(faults, key=lambda fault: (fault.cause == NO_CAPTION, fault.member is not None))
        if fault.member is not None:
            return fault
        label_will_do = self._need != "pairs"
        if label_will_do and "cls" in sample:
            return None
        if self._lies_elsewhere(key, sample, *self._caption_suffixes, *(("cls",) if label_will_do else ())):
            return Fault(None, APART)
        return Fault(None, "neither caption nor label" if label_will_do else NO_CAPTION)

    def _caption_in(self, rule: CaptionRule, sample: dict[str, int]) -> int | Fault:
        """The member that holds a caption by this rule, or why there is none."""
        member = sample.get(rule.suffix)
        if member is None:
            return Fault(None, NO_CAPTION)
        if self._sizes[member] > rule.max_bytes:
            return Fault(member, rule.too_large)
        try:
            rule.pick(self._listing.data(self._tar, member))
        except CaptionError as error:
            return Fault(member, str(error))
        return member

    def _label(self, key: str, sample: dict[str, int]) -> Fault | None:
        member = sample.get("cls")
        if member is None:
            if self._need != "labelled":
                return None
            return Fault(None, APART if self._lies_elsewhere(key, sample, "cls") else "no label")
        if self._sizes[member] > MAX_LABEL_BYTES:
            return Fault(member, TOO_LARGE, f"{self._sizes[member]} bytes")
        note = self._listing.data(self._tar, member)
        try:
            label_of(note)
        except LabelError as error:
            return Fault(member, str(error), repr(note))
        return None

    def _facts(self, key: str, sample: dict[str, int]) -> Fault | None:
        """The first of what is wrong with the JSON, the uid and the score."""
        select, member, facts = self._select, sample.get("json"), None
        if member is not None:
            if self._sizes[member] > MAX_JSON_BYTES:
                return Fault(member, "JSON above 1 MiB")
            try:
                facts = parse_json(self._listing.data(self._tar, member))
            except ValueError as error:
                return Fault(member, "broken JSON", str(error))
        if self._uids is not None:
            uid = key if select.uid_field == "__key__" else _found(facts, select.uid_field)
            if not isinstance(uid, str):
                return Fault(member, "no uid")
            if uid not in self._uids:
                return Fault(member, "uid not in the list")
        if select.score_field is not None:
            score = _found(facts, select.score_field)
            if isinstance(score, bool) or not isinstance(score, int | float) or score != score:
                return Fault(member, "no score")
            low, high = select.min_score, select.max_score
            if (low is not None and score < low) or (high is not None and score > high):
                return Fault(member, "score out of bounds")
        return None

    def _pixels(self, _: str, sample: dict[str, int]) -> Fault | None:
        from clipscale.data.pixels.decode import decode, picture_size  # with torch, which the other rules can spare

        select, member = self._select, picture_of(sample)
        if member is None or self._sizes[member] > MAX_PICTURE_BYTES:  # a fault of its own
            return None
        data = self._listing.data(self._tar, member)
        try:
            height, width, _ = picture_size(data)
            if select.check == "decode":
                decode(data, self._max_pixels)
        except BadSample as bad:
            return Fault(member, bad.cause, str(bad))
        if min(height, width) < select.min_side:
            return Fault(member, "picture too small")
        if select.max_aspect is not None and max(height, width) > select.max_aspect * min(height, width):
            return Fault(member, "picture too long")
        return None


def looks_into_pictures(select: Select) -> bool:
    """Whether pictures are opened, not only their sizes in bytes looked at."""
    return select.check == "decode" or select.min_side > 0 or select.max_aspect is not None


def picture_of(sample: dict[str, int]) -> int | None:
    """The member that is the sample's picture."""
    for suffix in IMAGE_SUFFIXES:
        if suffix in sample:
            return sample[suffix]
    return None


def _found(facts: Any, name: str) -> Any:
    try:
        return look_up(facts, tuple(name.split(".")))
    except (LookupError, TypeError):
        return None
