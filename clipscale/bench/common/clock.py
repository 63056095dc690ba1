"""Wall time on a device: CUDA events round the work, `perf_counter` on a CPU.

start = mark(device)
work()
end = mark(device)      # on CUDA `end.synchronize()` before it is read
between(start, end)     # seconds
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


def mark(device: torch.device) -> Any:
    """A point in time: on CUDA, of the device."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(start: Any, end: Any) -> float:
    """Seconds from one mark to another."""
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3


def seconds_of(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of `call()`, its work on the device included."""
    start = mark(device)
    call()
    end = mark(device)
    if device.type == "cuda":
        end.synchronize()
    return between(start, end)
