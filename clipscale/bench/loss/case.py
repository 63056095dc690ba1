"""One case: a batch, a width and a precision; every contestant in turn, until each has had its seconds.

First an untimed turn of each (compilation, tuning; on a CPU also its memory), in which the error is taken; then rounds
of one timed turn each, so that a drift of the device meets all alike, with a plain matrix product between. A turn is
forward and both, or both alone where it is a forward and then a backward that can be timed within it.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clipscale.bench.common.budget import refusal, repeats
from clipscale.bench.common.clock import seconds_of
from clipscale.bench.common.failures import first_line
from clipscale.bench.common.matmul import Matmul
from clipscale.bench.common.memory import watched
from clipscale.bench.common.spread import Spread
from clipscale.bench.common.words import size_name
from clipscale.bench.loss.contestants import Contestant
from clipscale.bench.loss.inputs import Inputs, draw_pairs, sample_rows
from clipscale.bench.loss.measure import Clock
from clipscale.bench.loss.options import LossBench
from clipscale.bench.loss.peers import SIGMOID_BIAS
from clipscale.bench.loss.reference import Sampled, errors, sigmoid_truth, softmax_truth
from clipscale.bench.loss.team import Outcome, Team
from clipscale.device import is_out_of_memory
from clipscale.loss.precision import OPERAND_DTYPE, exact_products

_SAMPLED_ROWS = 64
_LEAST_REPEATS, _MOST_REPEATS = 3, 50
_COLD_ABOVE = 0.125  # a turn that takes more than this share of the limit is not taken before, untimed


class Case(NamedTuple):
    batch: int
    width: int
    precision: str

    def __str__(self) -> str:
        return f"batch {size_name(self.batch)}, width {self.width}, {self.precision}"


@dataclass
class Budget:
    """How often a contestant may run, from how long it took at the batch before: time grows as the square."""

    seconds: float
    limit_seconds: float
    _turns: dict[tuple[str, int, str], tuple[int, float]] = field(default_factory=dict)

    def record(self, name: str, case: Case, turn_seconds: float) -> None:
        """A turn is all that is timed of a contestant in a round."""
        self._turns[name, case.width, case.precision] = case.batch, turn_seconds

    def predict(self, name: str, case: Case) -> float | None:
        """Seconds of a turn; None before the first one at this width and precision."""
        if (known := self._turns.get((name, case.width, case.precision))) is None:
            return None
        batch, turn_seconds = known
        return turn_seconds * (case.batch / batch) ** 2

    def refusal(self, name: str, case: Case) -> str:
        """Why a contestant does not run; empty if it does."""
        return refusal(self.predict(name, case), self.limit_seconds)

    def repeats(self, turn_seconds: float) -> int:
        return repeats(turn_seconds, seconds=self.seconds, least=_LEAST_REPEATS, most=_MOST_REPEATS)


@dataclass
class Entry:
    """A contestant in this case, and what has been measured of it."""

    contestant: Contestant
    status: str
    """Why there is no measurement; empty if there is one."""
    warm: bool = True
    repeats: int = 1
    forward_s: list[float] = field(default_factory=list)
    backward_s: list[float] = field(default_factory=list)
    """Empty for a contestant without a backward pass of its own."""
    both_s: list[float] = field(default_factory=list)
    extra_bytes: int | None = None
    gradient_bytes: int = 0
    compared: bool = False
    errors: dict[str, float | None] | None = None
    """On the main rank, once compared."""

    @property
    def wants_more(self) -> bool:
        return not self.status and len(self.both_s) < self.repeats

    def backward_times(self) -> list[float]:
        """Seconds. Without a pass of its own, what "both" takes beyond the forward, turn by turn; none where the turns
        do not tell, which is where the first quartile is not above 0."""
        if self.backward_s:
            return self.backward_s
        beyond = [both - forward for forward, both in zip(self.forward_s, self.both_s, strict=True)]
        return beyond if Spread.of(beyond).low > 0 else []


class CaseRun:
    """Measures one case; collective."""

    def __init__(self, team: Team, options: LossBench, budget: Budget, case: Case) -> None:
        self.team, self.options, self.budget, self.case = team, options, budget, case
        self.clock = Clock(team)
        self._with_errors = case.batch <= options.error_limit
        self._rows_R = sample_rows(case.batch, _SAMPLED_ROWS, seed=options.seed)
        self._truths: dict[str, Sampled | None] = {}
        self._draw = {"seed": options.seed, "device": team.device, "dtype": OPERAND_DTYPE[case.precision]}

    def run(self, contestants: list[Contestant]) -> dict[str, Any]:
        """The numbers of the case, ready for JSON."""
        batch, width, precision = self.case
        dtype, seed = self._draw["dtype"], self._draw["seed"]
        inputs = self.team.inputs(batch, width, scale=self.options.scale, precision=precision, dtype=dtype, seed=seed)
        entries = [Entry(one, one.problem or self.budget.refusal(one.name, self.case)) for one in contestants]
        if self._with_errors and self.team.world.is_main:
            for kind in {entry.contestant.kind for entry in entries if not entry.status}:
                self._truths[kind] = self._truth(kind, inputs)
        device = self.team.device
        matmul = Matmul(
            dtype,
            device,
            time=lambda call: self.team.slowest(seconds_of(call, device)),
            within=lambda: exact_products(precision, device),
        )
        matmul.sample(3)
        for entry in entries:
            if not entry.status:
                self._say(f"{self.case}: {entry.contestant.name}")
                self._guarded(entry, lambda entry=entry: self._prepare(entry, inputs))
        while busy := [entry for entry in entries if entry.wants_more]:
            for entry in busy:
                self._guarded(entry, lambda entry=entry: self._turn(entry, inputs))
            matmul.sample(1)
        matmul.sample(3)
        rates = matmul.summary()
        return {
            "batch": batch,
            "width": width,
            "precision": precision,
            "matmul": rates,
            "rows": [self._row(entry, rates["tflops"] * self.team.world.size) for entry in entries],
        }

    def _prepare(self, entry: Entry, inputs: Inputs) -> None:
        """The untimed turn, if there is to be one."""
        both = entry.contestant.both
        if not self.clock.cuda:
            outcomes, peak_bytes = watched(lambda: both(inputs), known=(inputs.image_ND, inputs.text_ND))
            self._learn(entry, outcomes, int(self.team.slowest(peak_bytes)))
            return
        predicted = self.budget.predict(entry.contestant.name, self.case)
        entry.warm = predicted is None or predicted <= _COLD_ABOVE * self.budget.limit_seconds
        if entry.warm:
            self.clock.read(lambda: entry.contestant.forward(inputs))
            self._learn(entry, self.clock.read(lambda: both(inputs)).result, None)

    def _turn(self, entry: Entry, inputs: Inputs) -> None:
        """One timed turn."""
        one = entry.contestant
        if one.backward is None:
            forward = self.clock.read(lambda: one.forward(inputs)).seconds
            both = self.clock.read(lambda: one.both(inputs))
            turn_seconds = forward + both.seconds
        else:
            both = self.clock.read(lambda: one.forward(inputs), then=partial(one.backward, inputs))
            forward, backward = both.passes
            turn_seconds = both.seconds
            entry.backward_s.append(backward)
        entry.forward_s.append(forward)
        entry.both_s.append(both.seconds)
        if len(entry.both_s) == 1:
            self.budget.record(one.name, self.case, turn_seconds)
            entry.repeats = self.budget.repeats(turn_seconds)
            self._learn(entry, both.result, both.peak_bytes if self.clock.cuda else None)

    def _learn(self, entry: Entry, outcomes: list[Outcome], peak_bytes: int | None) -> None:
        """Memory, and the error if it is not known yet."""
        entry.gradient_bytes = sum(outcome.gradient_bytes for outcome in outcomes)
        if peak_bytes is not None:
            entry.extra_bytes = peak_bytes - entry.gradient_bytes
        if self._with_errors and not entry.compared:
            result, entry.compared = self.team.sampled(outcomes, self._rows_R), True
            if (truth := self._truths.get(entry.contestant.kind)) is not None:
                entry.errors = errors(result, truth)

    def _truth(self, kind: str, inputs: Inputs) -> Sampled | None:
        """By the main rank alone; None where it does not fit into memory."""
        sides: tuple[Tensor, Tensor] = inputs.image_ND, inputs.text_ND
        try:
            if self.team.world.size > 1:
                sides = draw_pairs(range(self.case.batch), self.case.width, **self._draw)
            if kind == "softmax":
                return softmax_truth(*sides, inputs.scale, self._rows_R)
            return sigmoid_truth(*sides, inputs.scale, SIGMOID_BIAS, self._rows_R)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        self._say(f"{self.case}: no errors, the float64 reference runs out of memory")
        return None

    def _guarded(self, entry: Entry, work: Callable[[], None]) -> None:
        """What goes wrong is this entry's, and the others go on; real ranks would wait for each other for ever."""
        if self.team.world.size > 1:
            work()
            return
        try:
            work()
        except Exception as error:
            entry.status = "out of memory" if is_out_of_memory(error) else f"failed: {first_line(error)}"
        if entry.status:
            gc.collect()  # outside the handler, whose traceback holds the tensors
            if self.clock.cuda:
                torch.cuda.empty_cache()

    def _row(self, entry: Entry, matmul_tflops: float) -> dict[str, Any]:
        one, batch, width = entry.contestant, self.case.batch, self.case.width
        row: dict[str, Any] = {
            "contestant": one.name,
            "status": entry.status or "measured",
            "engine": one.engine(self.case.precision),
        }
        if entry.status:
            return row
        times = {"forward": entry.forward_s, "backward": entry.backward_times(), "both": entry.both_s}
        for name, seconds in times.items():
            milliseconds = [1e3 * second for second in seconds]
            row[f"{name}_ms"] = {**Spread.of(milliseconds)._asdict(), "all": milliseconds} if seconds else None
        flop = one.operations * batch**2 * width
        tflops = flop / (row["both_ms"]["median"] / 1e3) / 1e12
        return row | {
            "warm": entry.warm,
            "flop": flop,
            "tflops": tflops,
            "ratio_to_matmul": tflops / matmul_tflops,
            "extra_bytes": entry.extra_bytes,
            "gradient_bytes": entry.gradient_bytes,
            "error": entry.errors,
        }

    def _say(self, line: str) -> None:
        if self.team.world.is_main:
            print(line, file=sys.stderr, flush=True)
