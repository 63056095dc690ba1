"""Time, memory, and the plain matrix product that a rate is held against.

Time is wall time on the device: CUDA events round the call, `perf_counter` on a CPU. Memory is what a call needs at its
peak beyond what was there before it: the allocator's count on CUDA, `memory.py` on a CPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch

from clipscale.bench.common.spread import Spread
from clipscale.bench.loss.team import Team
from clipscale.loss.precision import OPERAND_DTYPE, exact_products

T = TypeVar("T")

_MATMUL_SIZE = {"cuda": 8192, "cpu": 1024}


class Reading(NamedTuple):
    result: Any
    seconds: float
    """Of the slowest process."""
    peak_bytes: int
    """Of the process that needed most; 0 on a CPU, where `memory.py` tells."""


class Clock:
    """Times calls of the whole team; collective."""

    def __init__(self, team: Team) -> None:
        self.team = team
        self.cuda = team.device.type == "cuda"

    def read(self, call: Callable[[], Any]) -> Reading:
        self.team.barrier()
        result, seconds, peak_bytes = self._on_cuda(call) if self.cuda else self._on_cpu(call)
        return Reading(result, self.team.slowest(seconds), int(self.team.slowest(peak_bytes)))

    def _on_cuda(self, call: Callable[[], T]) -> tuple[T, float, int]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        start.record()
        result = call()
        end.record()
        end.synchronize()
        return result, start.elapsed_time(end) / 1e3, torch.cuda.max_memory_allocated() - before

    def _on_cpu(self, call: Callable[[], T]) -> tuple[T, float, int]:
        start = time.perf_counter()
        result = call()
        return result, time.perf_counter() - start, 0


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
