"""clipscale/bench/common/memory.py and measure.py: known allocations are seen, and spreads are those of the times."""

import time

import pytest
import torch

from clipscale.bench.common.clock import seconds_of
from clipscale.bench.common.matmul import Matmul
from clipscale.bench.common.memory import begin_part, join_watch, watched, watched_parts
from clipscale.bench.common.spread import Spread
from clipscale.bench.loss.measure import Clock
from clipscale.bench.loss.simulate import run_ranks
from clipscale.bench.loss.team import Team
from clipscale.dist import World
from clipscale.loss import contrastive_grads, dense_contrastive_loss

ALONE = Team(World(0, 1, 0, torch.device("cpu")))


def test_a_known_allocation_is_seen():
    result, peak_bytes = watched(lambda: torch.zeros(1000))
    assert len(result) == 1000
    assert peak_bytes == 4000


def test_only_what_is_alive_together_counts():
    def one_after_another():
        for _ in range(5):
            torch.zeros(1000)
        return torch.zeros(10)

    def together():
        return [torch.zeros(1000) for _ in range(5)]

    assert watched(one_after_another)[1] in (4000, 4040)
    assert watched(together)[1] == 20000


def test_views_and_what_was_there_cost_nothing():
    known = torch.ones(1000)
    assert watched(lambda: known.view(10, 100)[2:].T, known=[known])[1] == 0
    assert watched(lambda: known.mul_(2), known=[known])[1] == 0
    assert watched(lambda: torch.zeros(1000).view(10, 100)[2:].T)[1] == 4000


def test_threads_that_join_count():
    def ranks(around):
        return watched(lambda: run_ranks(3, lambda link: torch.zeros(1000), **around))[1]

    assert ranks({"around": join_watch}) == 12000
    assert ranks({}) == 0
    with join_watch():  # nobody watches: nothing happens
        torch.zeros(1)


def test_every_part_has_a_peak_of_its_own():
    def call():
        before = torch.zeros(1000)
        begin_part("first")
        torch.zeros(2000)
        begin_part("second")
        del before
        kept = torch.zeros(500)
        begin_part("first")
        torch.zeros(100)
        return kept

    result, peaks = watched_parts(call, torch.device("cpu"))
    assert len(result) == 500
    assert peaks == {"": 4000, "first": 12000, "second": 4000}
    begin_part("first")  # nobody watches: nothing happens


def test_a_dense_matrix_is_seen_and_a_tiled_loss_has_none():
    image_BD, text_BD = (torch.nn.functional.normalize(side, dim=1) for side in torch.randn(2, 300, 5))
    _, dense = watched(lambda: dense_contrastive_loss(image_BD, text_BD, 14.3), known=(image_BD, text_BD))
    _, tiled = watched(lambda: contrastive_grads(image_BD, text_BD, 14.3, tile=16), known=(image_BD, text_BD))
    assert dense >= 4 * 300 * 300
    assert tiled < 4 * 300 * 300 / 2


def test_spreads():
    assert Spread.of([3.0]) == (3.0, 3.0, 3.0, 1)
    assert Spread.of([1.0, 2.0, 3.0, 4.0, 5.0]) == (3.0, 2.0, 4.0, 5)
    assert Spread.of([1.0, 2.0]).median == 1.5


def test_the_clock_returns_what_was_called():
    reading = Clock(ALONE).read(lambda: sum(range(100_000)))
    assert reading.result == 4999950000
    assert 0 < reading.seconds < 1
    assert reading.passes == (reading.seconds,)


def test_the_clock_times_two_passes_together_and_each():
    reading = Clock(ALONE).read(lambda: [time.sleep(0.01)], then=lambda result: (time.sleep(0.03), len(result))[1])
    assert reading.result == 1
    first, second = reading.passes
    assert first >= 0.01
    assert second >= 0.03
    assert first + second == pytest.approx(reading.seconds, abs=1e-6)


@pytest.mark.parametrize(("of", "dtype"), [(torch.float16, "float32"), (torch.float64, "float64")])
def test_the_plain_product_has_a_rate(monkeypatch, of, dtype):
    monkeypatch.setattr("clipscale.bench.common.matmul._SIZE", {"cpu": 64})
    matmul = Matmul(of, ALONE.device, lambda call: seconds_of(call, ALONE.device))
    matmul.sample(3)
    matmul.sample(2)
    summary = matmul.summary()
    assert (summary["size"], summary["dtype"], summary["repeats"]) == (64, dtype, 5)
    assert 0 < summary["tflops_low"] <= summary["tflops"] <= summary["tflops_high"] < 100
