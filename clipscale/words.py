"""Numbers and names in what a person reads: counts with their noun, short figures, what a misspelt word may mean.

counted(1, "shard")                       # '1 shard'
counted(12_208, "step")                   # '12,208 steps'
short(49_152, digits=4)                   # '49.15k'
did_you_mean("trian", ["train", "eval"])  # 'did you mean train?'
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable

_UNITS = ("", "k", "M", "G", "T")


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """'1 shard', '2 shards', '1,000 batches'. `plural`: where it is more than an s."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def short(number: float, *, digits: int = 3) -> str:
    """So many digits and a unit of thousands: 999 -> '999', 12_345 -> '12.3k', 1.5 -> '1.50'."""
    if not math.isfinite(number):
        return str(number)
    unit, scaled = 0, float(number)
    while abs(float(f"{scaled:.{digits}g}")) >= 1000 and unit < len(_UNITS) - 1:
        unit, scaled = unit + 1, scaled / 1000
    if unit == 0 and isinstance(number, int):
        return str(number)
    whole = len(str(int(abs(float(f"{scaled:.{digits}g}")))))
    return f"{scaled:.{max(0, digits - whole)}f}{_UNITS[unit]}"


def did_you_mean(word: str, known: Iterable[str], *, prefix: str = "") -> str:
    """'did you mean train?' for the nearest of the known words, each with the prefix; '' where none is near."""
    near = difflib.get_close_matches(word, list(known), n=2)
    return f"did you mean {' or '.join(prefix + name for name in near)}?" if near else ""
