"""Goodput: the share of a run's time that went into steps that count, over all its attempts.

    found = goodput(attempts, rows, superseded)         # the rows of a run's three files of these names
    found.share                                         # 0.93
    found.seconds                                       # {'steps': 9300.0, 'done again': 200.0, ...}: they add up

Time is counted from the first attempt's start to the last row. Each row's time since the row before (or since its
attempt's first step began) is the step's, without what its evaluations and its checkpoint took. Pure functions.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from clipscale.telemetry.parts import to_columns

Row = dict[str, Any]
KINDS = {
    "steps": "steps that count",
    "done again": "steps that were lost and done again",
    "skipped": "steps that changed nothing: their gradient was not finite",
    "evaluation": "evaluations",
    "checkpoint": "steps that waited for a checkpoint",
    "start-up": "from an attempt's start to its first step",
    "between": "from an attempt's last row to the next one's start: the step that was cut, ending, the queue",
}
_EVALUATION, _CHECKPOINT = to_columns({"evaluation": 0.0, "checkpoint": 0.0})
COLUMNS = ("step", "time", "grad_norm", _EVALUATION, _CHECKPOINT)
"""Of a row of a step: all that is looked at here."""


@dataclass(frozen=True)
class Goodput:
    """seconds: by what they went into, in the order of KINDS; they add up to the run's time."""

    seconds: dict[str, float]
    attempts: int
    steps: dict[str, int]  # of the kinds that are steps

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def share(self) -> float:
        return self.seconds["steps"] / self.total_seconds


def goodput(attempts: Iterable[Row], rows: Iterable[Row], superseded: Iterable[Row] = ()) -> Goodput | None:
    """What became of the run's time; None before there is any row with a time behind an attempt.

    Rows without a time (of versions that wrote none), and those before the first attempt, are not looked at.
    """
    attempts = sorted(attempts, key=lambda attempt: attempt["started"])
    starts = [attempt["started"] for attempt in attempts]
    done = _in_order(rows, superseded, starts[0]) if starts else []
    if not done or done[-1].time <= starts[0]:
        return None
    seconds, steps = dict.fromkeys(KINDS, 0.0), dict.fromkeys(("steps", "done again", "skipped"), 0)
    attempt, before = -1, starts[0]
    for step in done:
        now = bisect_right(starts, step.time) - 1
        if now > attempt:  # its first row. An attempt that died before its first step is part of what lies between
            begin = min(max(attempts[now]["time"], starts[now]), step.time)
            seconds["between"] += starts[now] - before
            seconds["start-up"] += begin - starts[now]
            attempt, before = now, begin
        left = step.time - before
        for kind, taken in (("evaluation", step.evaluation), ("checkpoint", step.checkpoint)):
            seconds[kind] += min(left, taken)
            left -= min(left, taken)
        seconds[step.kind] += left
        steps[step.kind] += 1
        before = step.time
    return Goodput(seconds, len(starts), steps)


def seconds_a_step(rows: Sequence[Row], *, since: float) -> float | None:
    """Wall time of a step, with evaluations and checkpoints, over those rows that the attempt begun then has written;
    None for fewer than two."""
    times = [row["time"] for row in rows if "time" in row and row["time"] >= since]
    return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None


class _Done(NamedTuple):
    """What of a row matters here: a month's rows would fill the memory."""

    time: float
    evaluation: float
    checkpoint: float
    kind: str


def _in_order(rows: Iterable[Row], superseded: Iterable[Row], start: float) -> list[_Done]:
    """Of every row of a step, by time; of one that was moved twice (by an attempt that was cut while it moved them, and
    by the next) once."""
    found: dict[tuple[int, float], _Done] = {}
    for some, lost in ((superseded, True), (rows, False)):
        for row in some:
            if "step" in row and "time" in row and row["time"] >= start:
                kind = "done again" if lost else "skipped" if row.get("grad_norm", 0.0) is None else "steps"
                done = _Done(row["time"], row.get(_EVALUATION, 0.0), row.get(_CHECKPOINT, 0.0), kind)
                found[row["step"], row["time"]] = done
    return sorted(found.values())
