"""Time and memory of a call.

Time is wall time on the device: CUDA events round the call, `perf_counter` on a CPU. Memory is what a call needs at its
peak beyond what was there before it: the allocator's count on CUDA, `memory.py` on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from clipscale.bench.common.clock import between, mark
from clipscale.bench.loss.team import Team


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
        marks = [mark(self.team.device)]
        result = call()
        marks.append(mark(self.team.device))
        if then is not None:
            result = then(result)
            marks.append(mark(self.team.device))
        if self.cuda:
            marks[-1].synchronize()
        peak_bytes = torch.cuda.max_memory_allocated() - before_bytes if self.cuda else 0
        passes = tuple(self.team.slowest(between(*two)) for two in pairwise(marks))
        seconds = self.team.slowest(between(marks[0], marks[-1]))
        return Reading(result, seconds, int(self.team.slowest(peak_bytes)), passes)

    def _reset_peak(self) -> int:
        """Bytes that are there now."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
