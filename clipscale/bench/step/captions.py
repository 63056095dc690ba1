"""Captions of the lengths that alt-text has: drawn from a histogram of tokens a caption, the ids at random.

    lengths = read_lengths(None)                                            # clipscale's own: median 12, a tail to 77
    tokens_NL = draw_captions(lengths, 512, length=77, vocabulary=49408, seed=0)

A caption is the start mark, random ids, the end mark and zeros, as open_clip's tokenizer has it: the end mark is the
highest id, by which such text towers find the token that they pool.

Shapes: N captions, L tokens.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from clipscale.errors import UserError, reason, require

_OWN = Path(__file__).with_name("captions.json")


class Lengths(NamedTuple):
    """A histogram of tokens a caption, marks included."""

    captions: dict[int, int]
    """How many captions have so many tokens."""
    source: str

    def summary(self) -> str:
        """Where they come from, with mean, median and the longest."""
        number = sum(self.captions.values())
        mean = sum(length * count for length, count in self.captions.items()) / number
        return f"mean {mean:.1f}, median {self.quantile(0.5)}, at most {max(self.captions)} tokens. {self.source}"

    def quantile(self, share: float) -> int:
        """The least length that so many of all captions do not exceed."""
        wanted = share * sum(self.captions.values())
        for length in sorted(self.captions):
            wanted -= self.captions[length]
            if wanted <= 0:
                return length
        return max(self.captions)


def read_lengths(path: str | None) -> Lengths:
    """Of a JSON file with {"captions": {"12": 8000, ...}, "source": "..."}; None: clipscale's own. UserError."""
    file = Path(path) if path else _OWN
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        captions = {int(length): int(count) for length, count in document["captions"].items()}
        source = str(document["source"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"--captions={file}: cannot be used ({reason(error)}); give a JSON file such as "
            '{"source": "counted in CC3M", "captions": {"11": 8000, "12": 9000}}'
        ) from error
    require(
        min(captions, default=0) >= 3 and min(captions.values()) >= 0 and sum(captions.values()) > 0,
        f"--captions={file}: lengths must be at least 3 (start, a token, end), with counts that are not all 0",
    )
    return Lengths(captions, source)


def draw_captions(lengths: Lengths, number: int, *, length: int, vocabulary: int, seed: int) -> Tensor:
    """int64 [N, L]: each caption's length is drawn for itself and cut at L = `length`."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.tensor(list(lengths.captions.values()), dtype=torch.float64)
    drawn = torch.multinomial(weights, number, replacement=True, generator=generator)
    lengths_N1 = torch.tensor(list(lengths.captions))[drawn].clamp(max=length)[:, None]
    tokens_NL = torch.randint(1, vocabulary - 2, (number, length), generator=generator)
    places_L = torch.arange(length)
    tokens_NL[:, 0] = vocabulary - 2
    tokens_NL[places_L >= lengths_N1] = 0
    return tokens_NL.scatter_(1, lengths_N1 - 1, vocabulary - 1)


def tokens_of(tokens_NL: Tensor) -> Tensor:
    """int64 [N]: how many tokens each of them has, the end mark included."""
    return tokens_NL.argmax(dim=1) + 1
