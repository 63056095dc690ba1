"""What repeated measurements come to.

Spread.of([3.0, 1.0, 2.0])               # Spread(median=2.0, low=1.5, high=2.5, repeats=3)
"""

from __future__ import annotations

import statistics
from typing import NamedTuple


class Spread(NamedTuple):
    """Of repeated times: median, first and third quartile, number."""

    median: float
    low: float
    high: float
    repeats: int

    @classmethod
    def of(cls, times: list[float]) -> Spread:
        low, median, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
        return cls(median, low, high, len(times))
