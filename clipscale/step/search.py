"""The sizes of chunks that a device likes best: a short measured search before a run's first step.

    search = Search(config, towers, slots=4096, room_bytes=20e9)
    search.sizes(towers.image, "auto", cost, by_chunk=False)     # Sizes(chunk=256, forward_chunks=1)
    search.told()                                # 'found in 6.1 s'

A larger chunk is faster until the device is busy; from there on it only needs more memory. So chunks of 32, 64, 128 and
so on go forwards and backwards through a tower, as far as memory, the rank's slots and a few seconds go, and the
smallest is taken whose rate is within 3 % of the best. In the same way pass 1 takes 1, 2 or 4 chunks at once.

The figures are remembered in `chunks.json` (remembered.py); what fits the memory that is free is chosen from them anew.
CLIPSCALE_TUNE=0 takes the settings' defaults, unmeasured.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from clipscale import __version__
from clipscale.config import Config, GradCache
from clipscale.device import device_name
from clipscale.remembered import Remembered
from clipscale.step.plan import GraphCost
from clipscale.towers import Tower, Towers, learns

_SECONDS = 20.0  # for one tower's chunks, and as much for what pass 1 takes at once
_TURNS = 5  # of a size, at most, beside one that is not counted
_SMALLEST, _LARGEST = 32, 4096
_FORWARD_CHUNKS = 1, 2, 4
_DEFAULTS = {"image": GradCache().image_chunk, "text": GradCache().text_chunk}
_GAIN = 1.03  # what a larger size must bring
_ON_CPU = 2.0  # peak memory of a chunk, in bytes that its graph keeps


class Sizes(NamedTuple):
    """Of one tower."""

    chunk: int
    forward_chunks: int


class Timing(NamedTuple):
    """Of chunks of one size."""

    samples: int
    seconds: float
    peak_bytes: float
    """Beside weights and gradients. 0: of no interest."""


_FILE = Remembered("chunks.json", "chunk sizes", check=lambda record: [Timing(*each) for each in record["timings"]])


class Search:
    """Of one rank; nothing in it is collective.

    Args:
        slots: N of this rank.
        room_bytes: that a chunk may take at its peak.
    """

    def __init__(self, config: Config, towers: Towers, slots: int, room_bytes: float) -> None:
        self._config, self._towers, self._slots, self._room = config, towers, slots, room_bytes
        self._seconds, self._remembered = 0.0, False

    def sizes(self, tower: Tower, chunk: int | str, cost: GraphCost, *, by_chunk: bool) -> Sizes:
        """What `chunk` and `gradcache.forward_chunks` say, with every `auto` replaced.

        Args:
            cost: of the tower's graphs, which bounds the search on a CPU.
            by_chunk: both passes must take the same chunks.
        """
        forward, measuring = self._config.gradcache.forward_chunks, os.environ.get("CLIPSCALE_TUNE") != "0"
        if chunk == "auto":
            chunk = self._chunk(tower, cost) if measuring else _DEFAULTS[tower.name]
        chunk = min(chunk, self._slots)
        if forward == "auto":
            searched = measuring and not by_chunk
            forward = self._forward_chunks(tower, chunk) if searched else GradCache().forward_chunks
        return Sizes(chunk, forward)

    def told(self) -> str:
        """Where `sizes` had its answers from."""
        if os.environ.get("CLIPSCALE_TUNE") == "0":
            return "the defaults (CLIPSCALE_TUNE=0)"
        if self._seconds:
            return f"found in {self._seconds:.1f} s"
        return "remembered from an earlier start" if self._remembered else "there was no choice"

    def _chunk(self, tower: Tower, cost: GraphCost) -> int:
        def peak_bytes(samples: int) -> float:
            return _ON_CPU * cost.peak(samples, samples * self._towers.context_length)

        backwards = learns(tower.encoder)
        sizes = _doublings(self._slots)
        while True:
            timings = self._timings(tower, sizes, backwards, peak_bytes)
            if (found := best(timings, self._room)) or sizes[0] == 1:
                return found or 1
            sizes = [sizes[0] // 2]

    def _forward_chunks(self, tower: Tower, chunk: int) -> int:
        sizes = [count * chunk for count in _FORWARD_CHUNKS if count * chunk <= self._slots]
        if len(sizes) < 2:
            return 1
        timings = self._timings(tower, sizes, False, lambda samples: 0.0)
        return (best(timings, self._room) or chunk) // chunk

    def _timings(
        self, tower: Tower, sizes: Sequence[int], backwards: bool, peak_bytes: Callable[[int], float]
    ) -> list[Timing]:
        """Of `sizes`, as far as it makes sense to go; from the file where it has them."""
        key = self._key(tower, sizes, backwards)
        within = f"{key}, within {_power_of_two(self._room):,} bytes"  # where memory was the end of it
        record = _FILE.find(key) or _FILE.find(within)
        if record is not None:
            self._remembered = True
        else:
            begin = time.perf_counter()
            with _undone(tower):
                timings, full = measured(
                    tower, partial(self._towers.noise, tower), sizes, backwards, peak_bytes, self._room
                )
            self._seconds += time.perf_counter() - begin
            record = _FILE.keep(within if full else key, {"timings": timings})
        return [Timing(*each) for each in record["timings"]]

    def _key(self, tower: Tower, sizes: Sequence[int], backwards: bool) -> str:
        """All that the figures depend on, but for memory."""
        model = json.dumps(dataclasses.asdict(self._config.model), sort_keys=True)
        versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "open_clip_torch", "timm"))
        way = "forwards and backwards" if backwards else "forwards"
        way += f", {self._config.towers}"
        if self._config.train.deterministic:
            way += ", deterministic"
        return (
            f"{tower.name} tower of {self._config.model.name} {hashlib.sha256(model.encode()).hexdigest()[:12]} {way}, "
            f"{sizes[0]} to {sizes[-1]} in {_precision(tower)} on "
            f"{device_name(tower.device)}, {versions}, clipscale {__version__}"
        )


def best(timings: Sequence[Timing], room_bytes: float) -> int | None:
    """The smallest size whose rate is within 3 % of the best, of those that fit; None: none does."""
    rates = {each.samples: each.samples / each.seconds for each in timings if each.peak_bytes <= room_bytes}
    return min((size for size, rate in rates.items() if rate * _GAIN >= max(rates.values())), default=None)


def measured(
    tower: Tower,
    inputs: Callable[[int], Tensor],
    sizes: Sequence[int],
    backwards: bool,
    peak_bytes: Callable[[int], float],
    room_bytes: float,
) -> tuple[list[Timing], bool]:
    """Timings of `sizes`, ascending: up to memory's end (then true), the time's, or where two in a row bring nothing.

    Args:
        peak_bytes: an estimate, for a CPU, where nobody counts.
    """
    deadline, timings = time.perf_counter() + _SECONDS, []
    with tower.shared_casts(), torch.set_grad_enabled(backwards):
        for samples in sizes:
            on_gpu = tower.device.type == "cuda"
            foretold = peak_bytes(samples) if not on_gpu else 2 * timings[-1].peak_bytes if timings else 0
            if foretold > room_bytes:
                return timings, True
            try:
                seconds, peak = _timed(tower, inputs(samples), backwards, deadline)
            except torch.OutOfMemoryError:
                return timings, True
            timings.append(Timing(samples, seconds, peak if on_gpu else peak_bytes(samples)))
            if _level(timings) or time.perf_counter() + 4 * seconds > deadline:  # of twice the size, two turns
                break
    return timings, False


def _timed(tower: Tower, inputs: Tensor, backwards: bool, deadline: float) -> tuple[float, int]:
    """Median seconds of a chunk, and on a GPU the most bytes it takes; the first turn allocates and is not counted."""
    device = tower.device
    on_gpu = device.type == "cuda"
    positions_M = torch.arange(len(inputs), device=device)

    def turn() -> float:
        begin = time.perf_counter()
        embeddings = tower(inputs, positions_M)
        if backwards:
            embeddings.backward(torch.ones_like(embeddings))
        if on_gpu:
            torch.cuda.synchronize(device)
        return time.perf_counter() - begin

    turns = [turn()]
    before = torch.cuda.memory_allocated(device) if on_gpu else 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    while len(turns) < 2 or (len(turns) <= _TURNS and time.perf_counter() + turns[-1] < deadline):
        turns.append(turn())
    return median(turns[1:]), torch.cuda.max_memory_allocated(device) - before if on_gpu else 0


def _level(timings: Sequence[Timing]) -> bool:
    """Whether the last two sizes brought nothing."""
    rates = [each.samples / each.seconds for each in timings]
    return len(rates) > 2 and max(rates[-2:]) < _GAIN * max(rates[:-2])


def _doublings(slots: int) -> list[int]:
    """32, 64, ... up to `slots` and `_LARGEST`; or all the slots there are."""
    sizes = [_SMALLEST]
    while 2 * sizes[-1] <= min(slots, _LARGEST):
        sizes.append(2 * sizes[-1])
    return sizes if slots >= _SMALLEST else [slots]


def _power_of_two(number: float) -> int:
    """The largest one that is not above it."""
    return (1 << int(max(0, number)).bit_length()) >> 1


def _precision(tower: Tower) -> str:
    return str(tower.autocast or next(tower.encoder.parameters()).dtype).removeprefix("torch.")


@contextmanager
def _undone(tower: Tower) -> Iterator[None]:
    """Within: training mode. Afterwards everything is as before: mode, randomness, no gradients, free memory."""
    training, on_gpu = tower.encoder.training, tower.device.type == "cuda"
    try:
        with torch.random.fork_rng([tower.device] if on_gpu else []):
            tower.encoder.train()
            yield
    finally:
        tower.encoder.train(training)
        for parameter in tower.encoder.parameters():
            parameter.grad = None
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(tower.device)
