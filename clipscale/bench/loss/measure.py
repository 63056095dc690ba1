"""Time, memory, and the plain matrix product that a rate is held against.

Time is wall time on the device: CUDA events round the call, `perf_counter` on a CPU. Memory is what a call needs at its
peak beyond what was there before it: the allocator's count on CUDA, `memory.py` on a CPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from clipscale.bench.common.spread import Spread
from clipscale.bench.loss.team import Team
from clipscale.loss.precision import OPERAND_DTYPE, exact_products

_MATMUL_SIZE = {"cuda": 8192, "cpu": 1024}


class Reading(NamedTuple):
    result: Any
    seconds: float
    """Of the slowest process."""
    peak_bytes: int
    """Of the process that needed most; 0 on a CPU, where `memory.py` tells."""
    passes: tuple[float, ...]
    """Seconds of each call, of the process that was slowest in it."""


class Clock:
    """Times calls of the whole team; collective."""

    def __init__(self, team: Team) -> None:
        self.team = team
        self.cuda = team.device.type == "cuda"

    def read(self, call: Callable[[], Any], then: Callable[[Any], Any] | None = None) -> Reading:
        """`call()`, and what `then` makes of its result without a pause between: timed together, and each in it."""
        self.team.barrier()
        before_bytes = self._reset_peak() if self.cuda else 0
        marks = [self._mark()]
        result = call()
        marks.append(self._mark())
        if then is not None:
            result = then(result)
            marks.append(self._mark())
        if self.cuda:
            marks[-1].synchronize()
        peak_bytes = torch.cuda.max_memory_allocated() - before_bytes if self.cuda else 0
        passes = tuple(self.team.slowest(self._between(*two)) for two in pairwise(marks))
        seconds = self.team.slowest(self._between(marks[0], marks[-1]))
        return Reading(result, seconds, int(self.team.slowest(peak_bytes)), passes)

    def _reset_peak(self) -> int:
        """Bytes that are there now."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def _mark(self) -> Any:
        """A point in time: on CUDA, of the device."""
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, start: Any, end: Any) -> float:
        """Seconds."""
        return start.elapsed_time(end) / 1e3 if self.cuda else end - start


class Matmul:
    """A plain square product in the type of a precision, timed now and then: the rate that this device reaches.

    8192^3 on CUDA; 1024^3 on a CPU, where half precisions multiply in float32, as `tiles.py` does there.
    """

    def __init__(self, precision: str, team: Team) -> None:
        self.precision, self.team = precision, team
        self.size = _MATMUL_SIZE[team.device.type]
        self.dtype = OPERAND_DTYPE[precision]
        if team.device.type == "cpu" and self.dtype.itemsize < 4:
            self.dtype = torch.float32
        generator = torch.Generator(team.device).manual_seed(0)
        draw = [torch.randn(self.size, self.size, generator=generator, device=team.device) for _ in range(2)]
        self._factors = [factor.to(self.dtype) for factor in draw]
        self._product = torch.empty_like(self._factors[0])
        self._clock = Clock(team)
        self._seconds: list[float] = []
        self.sample(2)
        self._seconds.clear()  # the first ones choose the kernel and wake the clocks

    def sample(self, times: int) -> None:
        with exact_products(self.precision, self.team.device):
            for _ in range(times):
                reading = self._clock.read(lambda: torch.mm(*self._factors, out=self._product))
                self._seconds.append(reading.seconds)

    def summary(self) -> dict[str, Any]:
        """Rates in TFLOP/s per rank that has a device of its own."""
        spread = Spread.of(self._seconds)
        rates = [2 * self.size**3 / seconds / 1e12 for seconds in (spread.median, spread.high, spread.low)]
        return {
            "size": self.size,
            "dtype": str(self.dtype).removeprefix("torch."),
            "tflops": rates[0],
            "tflops_low": rates[1],
            "tflops_high": rates[2],
            "repeats": spread.repeats,
        }
