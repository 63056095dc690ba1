"""clipscale/telemetry/goodput.py: histories with the right figures worked out by hand."""

from __future__ import annotations

import random

import pytest

from clipscale.telemetry.goodput import KINDS, goodput, seconds_a_step


def row(step: int, time: float, **more) -> dict:
    return {"step": step, "time": time, "grad_norm": 1.0, "seconds/loss": 1.0} | more


def attempt(started: float, begun: float | None = None) -> dict:
    return {"started": started, "time": started if begun is None else begun}


def waited(*, evaluation: float, checkpoint: float = 0.0) -> dict:
    return {"seconds/evaluation": evaluation, "seconds/checkpoint": checkpoint}


def figures(found) -> dict[str, float]:
    return {name: value for name, value in found.seconds.items() if value}


def test_one_attempt():
    """It starts at 1000, its first step at 1030; the second waits 4 s for a checkpoint and 6 s for an evaluation."""
    rows = [row(1, 1040), row(2, 1060, **waited(evaluation=6, checkpoint=4)), row(3, 1070)]
    found = goodput([attempt(1000, 1030)], rows)
    assert figures(found) == {"steps": 30, "evaluation": 6, "checkpoint": 4, "start-up": 30}
    assert (found.total_seconds, found.share, found.attempts) == (70, 30 / 70, 1)
    assert found.steps == {"steps": 3, "done again": 0, "skipped": 0}
    assert list(found.seconds) == list(KINDS)


def test_a_killed_run_did_two_steps_twice():
    """Killed in its fifth step, 7 s into it; 100 s later it starts again behind the checkpoint of step 2."""
    attempts = [attempt(0), attempt(157, 170)]
    first = [row(step, 10 * step) for step in range(1, 5)]
    again = [row(step, 170 + 10 * (step - 2)) for step in range(3, 6)]  # 170: start-up takes 13 s
    lost = [{"superseded": 2, "time": 157, "resumed_after_step": 2, "why": "killed"}, *first[2:]]
    found = goodput(attempts, first[:2] + again, lost)
    assert figures(found) == {"steps": 50, "done again": 20, "start-up": 13, "between": 117}
    assert found.share == 50 / 200
    assert found.steps == {"steps": 5, "done again": 2, "skipped": 0}


def test_an_attempt_that_never_made_a_step_is_time_between():
    found = goodput([attempt(0), attempt(50, 60), attempt(80, 85)], [row(1, 10), row(2, 95)])
    assert figures(found) == {"steps": 20, "start-up": 5, "between": 70}
    assert found.attempts == 3


def test_a_step_that_changed_nothing_does_not_count():
    found = goodput([attempt(0)], [row(1, 10), row(2, 20, grad_norm=None), row(3, 30)])
    assert figures(found) == {"steps": 20, "skipped": 10}
    assert found.steps == {"steps": 2, "done again": 0, "skipped": 1}


def test_a_rewind_inside_an_attempt():
    """Back to step 1 after step 3, by the same process."""
    found = goodput([attempt(0)], [row(1, 10), row(2, 45), row(3, 55)], [row(2, 20), row(3, 30)])
    assert figures(found) == {"steps": 35, "done again": 20}  # going back took 5 s: they are of the step behind it


def test_rows_that_were_moved_twice_count_once_and_those_that_were_not_moved_yet_count():
    attempts, kept, moved = [attempt(0), attempt(100)], [row(1, 10)], [row(2, 20), row(3, 30)]
    once = goodput(attempts, [*kept, row(2, 110)], moved)
    assert (
        goodput(
            attempts, [*kept, row(2, 110)], [*moved, {"superseded": 2, "time": 100, "resumed_after_step": 1}, *moved]
        )
        == once
    )
    assert goodput(attempts, kept + moved, moved).steps == {"steps": 3, "done again": 0, "skipped": 0}


@pytest.mark.parametrize(
    ("attempts", "rows"),
    [([], []), ([attempt(5)], []), ([], [row(1, 10)]), ([attempt(5)], [{"step": 1, "loss": 2.0}])],
)
def test_nothing_is_known_yet(attempts, rows):
    assert goodput(attempts, rows) is None


def test_a_run_that_an_older_version_began_counts_from_the_first_attempt_that_is_written_down():
    found = goodput([attempt(100)], [{"step": 1, "loss": 2.0}, row(2, 60), row(3, 110)])
    assert goodput([attempt(0)], [{"step": 1}, row(2, 10)]).steps["steps"] == 1
    assert (found.total_seconds, found.share) == (10, 1.0)


def test_whatever_the_history_the_parts_add_up_to_the_time():
    """Also where clocks of two hosts differ and what a row waited for is more than there was time for."""
    draw = random.Random(3)
    for _ in range(200):
        attempts = [attempt(draw.uniform(0, 100), draw.uniform(0, 120)) for _ in range(draw.randint(1, 4))]
        rows = [
            row(step, draw.uniform(0, 200), **waited(evaluation=draw.choice([0, 30]), checkpoint=draw.uniform(0, 9)))
            for step in range(draw.randint(1, 20))
        ]
        found = goodput(attempts, rows[::2], rows[1::2])
        start = min(each["started"] for each in attempts)
        if found is not None:
            last = max(each["time"] for each in rows if each["time"] >= start)
            assert found.total_seconds == pytest.approx(last - start)
            assert all(value >= 0 for value in found.seconds.values())


def test_the_pace_is_that_of_this_attempt_with_what_comes_between_its_steps():
    rows = [row(1, 10), row(2, 20), row(3, 100), row(4, 110), row(5, 150, **waited(evaluation=30))]
    assert seconds_a_step(rows, since=90) == 25
    assert seconds_a_step(rows, since=120) is None
    assert seconds_a_step([{"step": 1}], since=0) is None
