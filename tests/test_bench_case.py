"""clipscale/bench/loss/case.py: turns, budgets, what is computed of the times, and contestants that fail."""

from dataclasses import replace

import pytest
import torch
from bench_words import loss_bench

from clipscale.bench.loss import case as case_module
from clipscale.bench.loss.case import Budget, Case, CaseRun
from clipscale.bench.loss.contestants import Contestant, in_two_passes, own_contestants
from clipscale.bench.loss.report import COLUMNS, cells, text_table
from clipscale.bench.loss.team import Outcome, Team
from clipscale.device import is_out_of_memory
from clipscale.dist import World

ALONE = Team(World(0, 1, 0, torch.device("cpu")))
CASE = Case(8, 4, "fp64")


@pytest.fixture(autouse=True)
def small_product(monkeypatch):
    monkeypatch.setattr("clipscale.bench.common.matmul._SIZE", {"cpu": 32, "cuda": 256})


def run(contestants, *words, case=CASE, team=ALONE, budget=None, error_limit=10**6):
    options = loss_bench("--seconds", "0.01", *words)
    budget = budget or Budget(options.seconds, options.limit_seconds)
    return CaseRun(team, replace(options, error_limit=error_limit), budget, case).run(contestants)


def exact():
    """clipscale's own contestant, on plain torch."""
    return own_contestants(ALONE, engines=("torch",), tile=None)[0]


def contestant(name, *, forward=lambda inputs: None, both=None, **fields):
    return Contestant(name, forward, both or exact().both, "", "stranger", **fields)


def test_contestants_take_turns():
    """An untimed turn of each; then rounds of forward and both, with a plain product after each round."""
    log = []

    def logging(name):
        def both(inputs):
            log.append(f"{name} both")
            return exact().both(inputs)

        return contestant(name, forward=lambda inputs: log.append(f"{name} forward"), both=both)

    budget = Budget(1e-9, 1e9)
    budget.repeats = lambda turn_seconds: 3
    result = run([logging("a"), logging("b")], budget=budget)
    assert log == ["a both", "b both", *(["a forward", "a both", "b forward", "b both"] * 3)]
    assert result["matmul"]["repeats"] == 3 + 3 + 3
    assert [row["both_ms"]["repeats"] for row in result["rows"]] == [3, 3]


def timed(monkeypatch, *seconds):
    """The row of a contestant whose gradients come in one call, from its times: forward, both, forward, both, ..."""
    times = iter(seconds)

    class Clock(case_module.Clock):
        def read(self, call):
            return super().read(call)._replace(seconds=next(times))

    monkeypatch.setattr(case_module, "Clock", Clock)
    budget = Budget(1e-9, 1e9)
    budget.repeats = lambda turn_seconds: len(seconds) // 2
    return run([exact()], budget=budget)["rows"][0]


def test_backward_is_both_without_forward_turn_by_turn(monkeypatch):
    row = timed(monkeypatch, 1.0, 3.0, 2.0, 6.0, 3.0, 11.0)
    assert row["forward_ms"]["all"] == [1000.0, 2000.0, 3000.0]
    assert row["backward_ms"]["all"] == [2000.0, 4000.0, 8000.0]
    assert (row["both_ms"]["median"], row["both_ms"]["low"], row["both_ms"]["high"]) == (6000.0, 4500.0, 8500.0)
    assert row["flop"] == 8 * 8**2 * 4
    assert row["tflops"] == pytest.approx(8 * 8**2 * 4 / 6.0 / 1e12)


@pytest.mark.parametrize("seconds", [(3.0, 2.0), (3.0, 2.0, 3.0, 2.5), (2.0, 2.5, 3.0, 2.5, 2.0, 2.1)])
def test_a_backward_below_the_spread_is_not_told(monkeypatch, seconds):
    row = timed(monkeypatch, *seconds)
    assert row["backward_ms"] is None
    assert cells(row)[COLUMNS.index("backward ms")] == "-"


def test_a_backward_of_its_own_is_timed_inside_of_both():
    """A turn is one evaluation then, whose two times make up that of both."""
    log = []

    def forward(inputs):
        log.append("forward")
        return "graph"

    def backward(inputs, graph):
        log.append(f"backward of {graph}")
        return exact().both(inputs)

    budget = Budget(1e-9, 1e9)
    budget.repeats = lambda turn_seconds: 3
    row = run([in_two_passes("x", forward, backward, "", "stranger")], budget=budget)["rows"][0]
    assert log == ["forward", "backward of graph"] * (1 + 3)
    for parts in zip(*(row[f"{name}_ms"]["all"] for name in ("forward", "backward", "both")), strict=True):
        assert min(parts) > 0
        assert parts[0] + parts[1] == pytest.approx(parts[2])


@pytest.mark.parametrize("ranks", [1, 2])
def test_autograds_backward_is_never_negative(ranks):
    """Its forward computes the gradients already, and what is left is less than two forwards differ by."""
    team = Team(ALONE.world, simulated=ranks)
    _, row = run(own_contestants(team, engines=("torch",), tile=None), case=CASE._replace(batch=64), team=team)["rows"]
    assert min(row["backward_ms"]["all"]) > 0


@pytest.mark.parametrize(("operations", "flop"), [(8, 2048), (6, 1536)])
def test_rates_count_what_the_loss_needs(operations, flop):
    result = run([contestant("x", operations=operations)])
    row = result["rows"][0]
    assert row["flop"] == flop
    assert row["tflops"] == pytest.approx(flop / row["both_ms"]["median"] / 1e9)
    assert row["ratio_to_matmul"] == pytest.approx(row["tflops"] / result["matmul"]["tflops"])


def test_memory_is_what_is_needed_beyond_the_gradients():
    def both(inputs):
        scratch = torch.zeros(1000, dtype=torch.float64)
        d_image_ND = torch.zeros_like(inputs.image_ND)
        del scratch
        return [Outcome(d_image_ND[0, 0], d_image_ND, torch.zeros_like(inputs.text_ND), None, 0)]

    row = run([contestant("x", both=both)])["rows"][0]
    assert row["gradient_bytes"] == 2 * 8 * 4 * 8
    assert row["extra_bytes"] == 8000 - 8 * 4 * 8  # the scratch is gone before the second gradient is there
    assert row["error"]["d_image"] == 1.0
    assert row["error"]["d_scale"] is None


def test_errors_stop_at_the_limit():
    row = run([exact()], error_limit=7)["rows"][0]
    assert row["error"] is None
    assert cells(row)[-4:] == ["-"] * 4
    row = run([exact()], error_limit=8)["rows"][0]
    assert max(row["error"].values()) < 1e-14


def test_one_that_fails_leaves_the_others_alone():
    def out_of_memory(inputs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 32.00 GiB.")

    def later(inputs, calls=[]):  # noqa: B006
        calls.append(1)
        if len(calls) > 1:
            raise ValueError("first line | of it\nsecond line")
        return exact().both(inputs)

    result = run(
        [
            contestant("memory", both=out_of_memory),
            contestant("forward", forward=out_of_memory),
            contestant("later", both=later),
            contestant("missing", problem="not installed"),
            exact(),
        ]
    )
    assert [row["status"] for row in result["rows"]] == [
        *("out of memory", "out of memory", "failed: first line | of it", "not installed", "measured")
    ]
    table = text_table(result).splitlines()
    assert table[1].split("  ")[0].strip() == "contestant"
    assert [line.split("  ", 1)[1].strip() for line in table[2:6]] == [
        *("out of memory", "out of memory", "failed: first line | of it", "not installed")
    ]
    for row in result["rows"][:4]:
        assert cells(row)[COLUMNS.index("both ms")] == row["status"]
        assert len(cells(row)) == len(COLUMNS)


def test_what_is_out_of_memory():
    assert is_out_of_memory(torch.OutOfMemoryError())
    assert is_out_of_memory(MemoryError())
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))


def test_a_truth_that_does_not_fit_is_no_contestants_fault(monkeypatch, capsys):
    def no_room(*arguments):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(case_module, "softmax_truth", no_room)
    row = run([exact()])["rows"][0]
    assert (row["status"], row["error"]) == ("measured", None)
    assert "no errors, the float64 reference runs out of memory" in capsys.readouterr().err


def test_repeats_fill_the_seconds():
    budget = Budget(seconds=3.0, limit_seconds=120.0)
    assert [budget.repeats(turn) for turn in (1e-6, 0.1, 0.3, 1.0, 5.9, 6.1)] == [50, 30, 10, 3, 3, 1]


def test_time_is_predicted_from_the_batch_before():
    budget = Budget(seconds=3.0, limit_seconds=120.0)
    small, large = Case(1024, 768, "fp16"), Case(4096, 768, "fp16")
    assert budget.predict("x", large) is None
    assert budget.refusal("x", large) == ""
    budget.record("x", small, 7.0)
    assert budget.predict("x", large) == 112.0
    assert budget.refusal("x", large) == ""
    assert budget.refusal("x", Case(8192, 768, "fp16")) == "skipped: predicted 448 s"
    for other in (Case(8192, 512, "fp16"), Case(8192, 768, "bf16")):
        assert budget.refusal("x", other) == ""
    assert budget.refusal("y", large) == ""


def test_what_is_predicted_to_take_too_long_is_skipped():
    budget = Budget(seconds=0.01, limit_seconds=120.0)
    budget.record("slow", CASE._replace(batch=4), 75.0)
    slow = contestant("slow", both=lambda inputs: pytest.fail("was run"))
    result = run([slow, exact()], budget=budget)
    assert [row["status"] for row in result["rows"]] == ["skipped: predicted 300 s", "measured"]
    assert budget.predict("clipscale", CASE._replace(batch=16)) > 0


def test_a_slow_one_is_timed_once():
    budget = Budget(seconds=1e-9, limit_seconds=120.0)
    row = run([exact()], budget=budget)["rows"][0]
    assert (row["both_ms"]["repeats"], row["warm"]) == (1, True)
    assert cells(row)[COLUMNS.index("n")] == "1"
    assert cells(row | {"warm": False})[COLUMNS.index("n")] == "1 cold"


@pytest.mark.parametrize("ranks", [2, 3])
def test_simulated_ranks_have_the_errors_and_the_memory_of_all(ranks):
    team = Team(ALONE.world, simulated=ranks)
    result = run(own_contestants(team, engines=("torch",), tile=None), case=CASE._replace(batch=37), team=team)
    for row in result["rows"]:
        assert max(row["error"].values()) < 1e-13
        assert row["gradient_bytes"] == 2 * 37 * 4 * 8
        assert row["extra_bytes"] > 0
        assert row["engine"] == "torch"


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_half_precision_has_the_error_of_half_precision(precision):
    """And at a scale of 14.3 gradients in float16 do not vanish for want of a loss scale."""
    contestants = own_contestants(ALONE, engines=("torch",), tile=None)
    bar = {"fp16": 2e-3, "bf16": 1e-2, "fp32": 1e-5}[precision]
    for row in run(contestants, case=Case(300, 16, precision))["rows"]:
        assert 1e-9 < row["error"]["d_image"] < bar
        assert 1e-9 < row["error"]["d_text"] < bar
