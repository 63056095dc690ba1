"""The plain matrix product that a rate is held against.

matmul = Matmul(torch.bfloat16, device, lambda call: seconds_of(call, device))
matmul.sample(3)                 # now and then, between what is measured
matmul.summary()["tflops"]
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from clipscale.bench.common.spread import Spread

_SIZE = {"cuda": 8192, "cpu": 1024}


class Matmul:
    """A plain square product, timed now and then: the rate that this device reaches.

    8192^3 on CUDA; 1024^3 on a CPU, where halves are multiplied in float32: its products of halves are slower.

    Args:
        dtype: of both factors.
        time: seconds of a call.
        within: what the process has to set for it.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        device: torch.device,
        time: Callable[[Callable[[], Any]], float],
        within: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        self._time, self._within = time, within
        self.size = _SIZE[device.type]
        self.dtype = torch.float32 if device.type == "cpu" and dtype.itemsize < 4 else dtype
        generator = torch.Generator(device).manual_seed(0)
        draw = [torch.randn(self.size, self.size, generator=generator, device=device) for _ in range(2)]
        self._factors = [factor.to(self.dtype) for factor in draw]
        self._product = torch.empty_like(self._factors[0])
        self._seconds: list[float] = []
        self.sample(2)
        self._seconds.clear()  # the first ones choose the kernel and wake the clocks

    def sample(self, times: int) -> None:
        with self._within():
            for _ in range(times):
                self._seconds.append(self._time(lambda: torch.mm(*self._factors, out=self._product)))

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
