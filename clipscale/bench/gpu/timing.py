"""How long a call takes on the device, and how long the host is busy with starting it.

times = timed(lambda: tower(chunk), device)
times.device_ms, times.host_ms           # medians; on a GPU that waits for the host the two are about equal
product_rate("bf16", device).tflops       # what a share is of
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from clipscale.bench.common.clock import between, mark, seconds_of
from clipscale.bench.common.matmul import Matmul
from clipscale.loss.precision import OPERAND_DTYPE, exact_products

_PRODUCTS = {"cuda": 20, "cpu": 2}


class Times(NamedTuple):
    device_ms: float
    """Of one call, from its first to its last piece of work."""
    host_ms: float
    """Until the call returns."""


def timed(call: Callable[[], Any], device: torch.device, *, rounds: int = 8, calls: int = 1) -> Times:
    """Medians over `rounds`, after two untimed ones. `calls`: so many of a round are timed together and shared out, for
    calls that take less time than it takes to start them."""
    found = [_once(call, device, calls) for _ in range(rounds + 2)][2:]
    return Times(*(1e3 * statistics.median(seconds) / calls for seconds in zip(*found, strict=True)))


class Product(NamedTuple):
    size: int  # rows and columns of the square factors
    tflops: float


def product_rate(precision: str, device: torch.device) -> Product:
    """The rate of the plain matrix product that shares are held against, TFLOP/s."""
    within = partial(exact_products, precision, device)
    matmul = Matmul(OPERAND_DTYPE[precision], device, lambda call: seconds_of(call, device), within)
    matmul.sample(_PRODUCTS[device.type])
    found = matmul.summary()
    return Product(found["size"], found["tflops"])


def _once(call: Callable[[], Any], device: torch.device, calls: int) -> tuple[float, float]:
    """Seconds of `calls` of them."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start, first = time.perf_counter(), mark(device)
    for _ in range(calls):
        call()
    last, host = mark(device), time.perf_counter() - start
    if device.type == "cuda":
        last.synchronize()
    return between(first, last), host
