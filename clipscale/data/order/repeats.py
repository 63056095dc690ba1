"""How many of some numbers are repeats: count_repeats(np.array([7, 3, 7, 7])) is 2."""

from __future__ import annotations

import numpy as np


def count_repeats(values: np.ndarray) -> int:
    """How many of the values stand behind an equal one. Sorted: numpy's `unique` hashes them, and takes many times as
    long over a million."""
    ordered = np.sort(values)
    return int(np.count_nonzero(ordered[1:] == ordered[:-1]))
