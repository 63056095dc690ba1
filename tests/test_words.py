"""clipscale/words.py and data/order/repeats.py."""

from __future__ import annotations

import time

import numpy as np
import pytest

from clipscale.data.order.repeats import count_repeats
from clipscale.words import counted, did_you_mean, short


def test_counts_have_their_noun():
    assert [counted(n, "step") for n in (0, 1, 2, 12_208)] == ["0 steps", "1 step", "2 steps", "12,208 steps"]
    assert [counted(n, "batch", "batches") for n in (1, 2)] == ["1 batch", "2 batches"]


@pytest.mark.parametrize(
    ("number", "digits", "text"),
    [
        (0, 3, "0"),
        (999, 3, "999"),
        (1000, 3, "1.00k"),
        (49_152, 4, "49.15k"),
        (999_949, 4, "999.9k"),
        (999_950, 4, "1.000M"),
        (400_000_000, 4, "400.0M"),
        (12_800_000_000, 4, "12.80G"),
        (1.5, 3, "1.50"),
        (9.999, 3, "10.0"),
        (0.25, 3, "0.25"),
        (139.5, 3, "140"),
        (float("nan"), 5, "nan"),
    ],
)
def test_short_figures(number, digits, text):
    assert short(number, digits=digits) == text


def test_a_near_word_is_suggested():
    assert did_you_mean("trian", ["train", "eval"]) == "did you mean train?"
    assert did_you_mean("seed", ["speed"], prefix="x.") == "did you mean x.speed?"
    assert did_you_mean("fly", ["train"]) == ""


@pytest.mark.parametrize("high", [1, 7, 500, 2**40])
def test_repeats_are_what_a_set_lacks(high):
    values = np.random.default_rng(0).integers(-high, high, 1000)
    assert count_repeats(values) == 1000 - len(set(values.tolist()))
    assert count_repeats(values[:0]) == 0


def test_a_million_values_cost_little_more_than_their_sort():
    """numpy's `unique` took 17 to 50 times as long; a bound on the ratio, of the best of several."""
    values = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, 1_000_000)

    def best(work) -> float:
        times = []
        for _ in range(5):
            begin = time.perf_counter()
            work(values)
            times.append(time.perf_counter() - begin)
        return min(times)

    assert best(count_repeats) < 4 * best(np.sort)
