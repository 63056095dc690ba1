"""What it takes to bring a batch from one process to another: torch's DataLoader and the loader's shared blocks.

    transport = measure_transport(pictures=256, side=224, rounds=5, seconds=2)
    transport["rows"][0]["milliseconds"]["median"]

A process copies a batch that is ready as fast as it can, and this process takes the copies: nothing is read from disk
or decoded. A DataLoader's worker has to make a new tensor each time, for the one it has sent belongs to its receiver; a
block of ours is written over. One row shows a DataLoader whose worker makes the same tensor and sends a number instead.

Shapes: N pictures of a batch, S their side.
"""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from clipscale.bench.common.spread import Spread
from clipscale.bench.common.turns import Supplier, Turn, take_turns
from clipscale.data.load.blocks import Blocks, Layout
from clipscale.data.load.fill import Done, Job
from clipscale.data.load.loader import SLOTS_PER_JOB

DATALOADER, NUMBER, BLOCKS = "DataLoader", "DataLoader, a number", "shared blocks"
READ = ", read once"
_BLOCKS_IN_FLIGHT = 3
_PER_BATCH: dict[str, Callable[[Turn], float]] = {
    "milliseconds": lambda turn: turn.wall_seconds / turn.items * 1e3,
    "own_cpu_ms": lambda turn: turn.own_cpu_seconds / turn.items * 1e3,
    "cpu_ms": lambda turn: turn.cpu_seconds / turn.items * 1e3,
}


def measure_transport(*, pictures: int, side: int, rounds: int, seconds: float) -> dict[str, Any]:
    """Milliseconds a batch; `ratio` is ours to the DataLoader's, round by round."""
    field, turns = take_turns(_suppliers((pictures, 3, side, side)), rounds=rounds, seconds=seconds)
    rows = []
    for one in field:
        row: dict[str, Any] = {"contestant": one.name}
        for quantity, value in _PER_BATCH.items():
            values = [value(turn) for turn in turns[one.name]]
            row[quantity] = Spread.of(values)._asdict() | {"all": values}
        rows.append(row)
    ratio = {}
    for suffix in ("", READ):
        pairs = zip(turns[BLOCKS + suffix], turns[DATALOADER + suffix], strict=True)
        ratio[suffix] = Spread.of([_PER_BATCH["milliseconds"](a) / _PER_BATCH["milliseconds"](b) for a, b in pairs])
    return {
        "pictures": pictures,
        "side": side,
        "bytes": pictures * 3 * side * side,
        "rows": rows,
        "ratio": ratio[""]._asdict(),
        "ratio_read": ratio[READ]._asdict(),
    }


def _suppliers(shape: tuple[int, ...]) -> Iterator[Supplier]:
    for read in (False, True):
        yield _dataloader(shape, "tensor", read)
        yield _blocks(shape, read)
    yield _dataloader(shape, "number", read=False)


class _Ready(IterableDataset):
    """One uint8 batch [N, 3, S, S], again and again."""

    def __init__(self, shape: tuple[int, ...], sends: Literal["tensor", "number"]) -> None:
        self.shape, self.sends = shape, sends

    def __iter__(self) -> Iterator[Any]:
        ready = torch.ones(self.shape, dtype=torch.uint8)
        while True:
            made = ready.clone()
            yield made if self.sends == "tensor" else int(made[0, 0, 0, 0])


def _dataloader(shape: tuple[int, ...], sends: Literal["tensor", "number"], read: bool) -> Supplier:
    batches = iter(DataLoader(_Ready(shape, sends), batch_size=None, num_workers=1))

    def take() -> int:
        batch = next(batches)
        if read:
            _read(batch)
        return 1

    name = DATALOADER if sends == "tensor" else NUMBER
    return Supplier(name + READ * read, take, close=batches._shutdown_workers, ahead=2)


def _blocks(shape: tuple[int, ...], read: bool) -> Supplier:
    """A block is asked for again as soon as it has been taken, which is when the next one is."""
    pictures, _, side, _ = shape
    blocks = Blocks.make(Layout(_BLOCKS_IN_FLIGHT, pictures, side, length=1))
    blocks.images.zero_()
    wire, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=_copy, args=(blocks, theirs), daemon=True)
    process.start()
    theirs.close()
    ask = partial(_ask, wire, pictures)
    coming, taken = deque(range(_BLOCKS_IN_FLIGHT)), deque()
    for block in coming:
        ask(block)

    def take() -> int:
        while taken:
            coming.append(taken.popleft())
            ask(coming[-1])
        for _ in range(0, pictures, SLOTS_PER_JOB):
            assert wire.recv().number == coming[0], "jobs are done in their order"
        taken.append(coming.popleft())
        if read:
            _read(blocks.images[taken[-1]])
        return 1

    def close() -> None:
        process.kill()
        process.join()
        wire.close()
        blocks.close()

    return Supplier(BLOCKS + READ * read, take, close=close, ahead=_BLOCKS_IN_FLIGHT)


def _ask(wire: Connection, pictures: int, block: int) -> None:
    """In jobs as large as the loader's."""
    for start in range(0, pictures, SLOTS_PER_JOB):
        wire.send(Job(block, block, start, 0, start, min(start + SLOTS_PER_JOB, pictures)))


def _copy(blocks: Blocks, wire: Connection) -> None:
    """The other process: a loader whose pictures are ready."""
    torch.set_num_threads(1)
    ready = torch.ones(blocks.images.shape[1:], dtype=torch.uint8)
    while True:
        job = wire.recv()
        part = slice(job.start, job.stop)
        blocks.images[job.block, part].copy_(ready[part])
        wire.send(Done(job.number, [], np.zeros(job.stop - job.start, np.uint64)))


def _read(images: torch.Tensor) -> int:
    """Every byte, as fast as one thread reads memory."""
    return int(images.numpy().reshape(-1).view(np.int64).sum())
