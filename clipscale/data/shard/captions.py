"""Which text of a sample is its caption, and which of several.

    rule = CaptionRule.of("txt", "whole")                    # the .txt member as it stands
    rule = CaptionRule.of("json:caption.long", "random")     # {"caption": {"long": ["a dog", "a brown dog"]}}
    rule.pick(note, draw)                                    # 'a brown dog', from the member's bytes and a 64-bit draw
    captions = Captions.of(source)                           # of a source whose samples have several: a rule each
    captions.choose([True, False, True], 0.9)                # 2: by their weights, of those that the sample has

The pieces of a text are its lines that are not empty, those of a JSON list its items. Bytes that give no caption raise
`CaptionError`, whose message is one of CAPTION_FAULTS.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from clipscale.config.data import EXTRA, SourceSettings

MAX_CAPTION_BYTES = 1 << 16
MAX_JSON_BYTES = 1 << 20
NO_CAPTION = "no caption"
CAPTION_FAULTS = (
    NO_CAPTION,
    "empty caption",
    "caption is not UTF-8",
    "caption above 64 KiB",
    "JSON above 1 MiB",
    "broken JSON",
    "caption is not text",
)


class CaptionError(Exception):
    """The message is one of CAPTION_FAULTS."""


@dataclass(frozen=True)
class CaptionRule:
    suffix: str  # of the member that holds the caption, lower case
    field: tuple[str, ...]  # where in a JSON member; empty: the member is the text
    pick_as: Literal["whole", "first", "random"]

    @classmethod
    def of(cls, caption: str, pick_as: Literal["whole", "first", "random"] = "whole") -> CaptionRule:
        """From a source's `caption` and `captions`."""
        if caption.startswith("json:"):
            return cls("json", tuple(caption.removeprefix("json:").split(".")), pick_as)
        return cls(caption.lower().removeprefix("."), (), pick_as)

    @property
    def max_bytes(self) -> int:
        """Of the member."""
        return MAX_JSON_BYTES if self.field else MAX_CAPTION_BYTES

    @property
    def too_large(self) -> str:
        return "JSON above 1 MiB" if self.field else "caption above 64 KiB"

    def pick(self, note: bytes, draw: int = 0) -> str:
        """The caption that `draw` (0 .. 2^64 - 1) chooses, without the blanks around it.

        Raises:
            CaptionError: the bytes hold none.
        """
        if len(note) > self.max_bytes:
            raise CaptionError(self.too_large)
        found = self._from_json(note) if self.field else _decoded(note)
        if self.pick_as == "whole":
            text = (found if isinstance(found, str) else "\n".join(found)).strip()
        else:
            pieces = [piece.strip() for piece in (found.splitlines() if isinstance(found, str) else found)]
            pieces = [piece for piece in pieces if not _is_blank(piece)]
            text = pieces[draw % len(pieces) if self.pick_as == "random" else 0] if pieces else ""
        if _is_blank(text):
            raise CaptionError("empty caption")
        return text

    def _from_json(self, note: bytes) -> str | list[str]:
        try:
            found = look_up(parse_json(note), self.field)
        except (LookupError, TypeError) as error:
            raise CaptionError(NO_CAPTION) from error
        except ValueError as error:
            raise CaptionError("broken JSON") from error
        if found is None:
            raise CaptionError(NO_CAPTION)
        texts = found if isinstance(found, list) else [found]
        if not all(isinstance(text, str) for text in texts):
            raise CaptionError("caption is not text")
        try:
            size = sum(len(text.encode()) for text in texts)
        except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can escape
            raise CaptionError("caption is not UTF-8") from error
        if size > MAX_CAPTION_BYTES:
            raise CaptionError("caption above 64 KiB")
        return found


@dataclass(frozen=True)
class Captions:
    """What the samples of a source have as captions. C of them."""

    rules: tuple[CaptionRule, ...]  # [C]
    shares: tuple[float, ...]  # [C], how often each is drawn of a sample that has all; sum 1
    extra: tuple[bool, ...]  # [C], whether it lies in an extra shard

    @classmethod
    def of(cls, source: SourceSettings) -> Captions:
        shares = source.caption_shares
        extra = tuple(name.startswith(EXTRA) for name in shares)
        return cls(caption_rules(tuple(shares), source.captions), tuple(shares.values()), extra)

    @property
    def identity(self) -> CaptionRule | Captions:
        """What of a note is the caption, for `repr`: that of a source with one caption is the same in all versions."""
        return self.rules[0] if len(self.rules) == 1 else self

    def choose(self, there: Sequence[bool], draw: float = 0.0) -> int:
        """The number of the caption that `draw`, in [0, 1), chooses of those that are `there` [C], by their shares
        among them; the first of them for 0."""
        left = draw * sum(share for share, is_there in zip(self.shares, there, strict=True) if is_there)
        last = 0
        for number, (share, is_there) in enumerate(zip(self.shares, there, strict=True)):
            if not is_there:
                continue
            if left < share:
                return number
            left, last = left - share, number
        return last  # where the sum was rounded


def caption_rules(
    captions: str | tuple[str, ...], pick_as: Literal["whole", "first", "random"] = "whole"
) -> tuple[CaptionRule, ...]:
    """Of one caption or of several, each as a source has it, or its extra shards."""
    names = (captions,) if isinstance(captions, str) else captions
    return tuple(CaptionRule.of(name.removeprefix(EXTRA), pick_as) for name in names)


def _is_blank(text: str) -> bool:
    """Nothing, blanks, or the zeros of a file that was never filled."""
    return not text.replace("\0", "").strip()


def parse_json(note: bytes) -> Any:
    """Raises ValueError on whatever is no JSON."""
    try:
        return json.loads(note)
    except RecursionError as error:  # a thousand open brackets
        raise ValueError("nested too deeply") from error


def look_up(value: Any, field: tuple[str, ...]) -> Any:
    """value[field[0]][field[1]]..., where every step is a JSON object.

    Raises:
        LookupError: a name that is not there.
        TypeError: a step that is no object.
    """
    for name in field:
        if not isinstance(value, dict):
            raise TypeError(f"{name!r} is looked up in a {type(value).__name__}")
        value = value[name]
    return value


def _decoded(note: bytes) -> str:
    try:
        return note.decode()
    except UnicodeDecodeError as error:
        raise CaptionError("caption is not UTF-8") from error
