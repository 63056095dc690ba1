"""How many of some numbers are repeats.

count_repeats(np.array([7, 3, 7, 7]))            # 2
"""

from __future__ import annotations

import numpy as np


def count_repeats(values_N: np.ndarray) -> int:
    """How many of the N values stand behind an equal one. Sorted: numpy's `unique` hashes them, and takes many times as
    long over a million."""
    ordered = np.sort(values_N)
    return int(np.count_nonzero(ordered[1:] == ordered[:-1]))
