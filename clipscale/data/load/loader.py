"""Step batches, decoded in the background: position -> source -> shard -> sample -> uint8 pixels and tokens.

    loader = Loader(pipeline, Share(global_batch=4096, world=4, rank=1), setup, tier, start=0)
    batch = next(loader)                                     # this rank's 1024 slots of positions 0..4095
    for start, images in batch.images.first(device): ...     # pass 1: chunks as they arrive; tokens and valid fill up
    for start, images in batch.images.again(device): ...     # pass 2: the same pictures
    batch = next(loader)                                     # positions 4096..8191

Blocks of shared memory (blocks.py), each the size of a chunk, circulate: the loader gives a free one to the workers,
with the next slots of the run to fill (fill.py, workers.py), hands it out filled (`take`), and has it back (`release`)
when the replay tier (replay.py) needs it no more. That is all the back-pressure there is: no free block, no new work.

Shapes: N slots of this rank, M slots of a chunk, S side of a picture, L tokens of a caption.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Literal

import numpy as np
import torch

from clipscale.data.load.blocks import Blocks, Layout
from clipscale.data.load.fill import Job, Skip
from clipscale.data.load.replay import Chunk, handed_over
from clipscale.data.load.replay_plan import Tier
from clipscale.data.load.shape import StepShape, spans
from clipscale.data.load.staging import Staging
from clipscale.data.load.workers import InlineWorkers, LoaderError, LoaderProcess
from clipscale.data.pipeline import Pipeline, Share
from clipscale.errors import reason
from clipscale.telemetry.parts import UNTIMED, Parts
from clipscale.tell import tell
from clipscale.words import counted

SLOTS_PER_JOB = 64
Change = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (uint8 [M, 3, S, S], positions [M]) -> [M, 3, S, S]


@dataclass(frozen=True)
class Setup:
    """How a loader works; beside the slots and their side, which the run has, nothing here changes what it yields."""

    shape: StepShape
    blocks: int  # R: how many there are; in the host tier a whole step's and some more
    mode: Literal["process", "inline"] = "process"
    threads: int = 2
    pin: bool = False  # page-lock the blocks, for copies to a GPU


@dataclass
class StepBatch:
    """This rank's slots of one step. A masked slot holds a black picture and no words.

    `tokens`, `valid` and `skips` are complete once `images.first` has been walked to its end.
    """

    position: int  # of the global batch's first slot
    positions: np.ndarray  # int64 [N]
    images: StepPictures  # uint8 [N, 3, S, S], chunk by chunk
    tokens: torch.Tensor  # int32 [N, L]
    valid: torch.Tensor  # bool [N]
    skips: list[Skip]


@dataclass(frozen=True)
class Filled:
    """Slots [start, stop) of a step, as the workers have filled them in; views on a block, until that is released."""

    start: int
    stop: int
    block: int
    images: torch.Tensor  # uint8 [M, 3, S, S]
    tokens: torch.Tensor  # int32 [M, L]
    valid: torch.Tensor  # bool [M]
    skips: list[Skip]
    checksums: np.ndarray  # uint64 [M], of the pictures


class Loader(Iterator[StepBatch]):
    """An endless iterator of step batches. Taking the next one ends the one before.

    Args:
        parts: counts the time spent waiting for data, and for their copies.

    Raises (from `next` and from walking the images):
        LoaderError: the loader's process has ended or failed, or pass 2 reads other pixels than pass 1 did.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        share: Share,
        setup: Setup,
        tier: Tier,
        *,
        start: int,
        change: Change | None = None,
        parts: Parts = UNTIMED,
    ) -> None:
        assert (setup.shape.slots, setup.shape.side) == (share.slots, pipeline.image_size)
        self.pipeline, self.share, self.setup, self.tier, self.change = pipeline, share, setup, tier, change
        self.parts = parts
        self.waited_seconds = 0.0  # in all, for chunks that were not filled yet
        self._next_position = start
        layout = Layout(setup.blocks, setup.shape.chunk, setup.shape.side, pipeline.context_length)
        self._blocks = Blocks.make(layout)
        work = {"process": LoaderProcess, "inline": InlineWorkers}[setup.mode]
        self.workers = work(pipeline, share, self._blocks, setup.threads)
        self._blocks.fault_in(setup.threads)  # while the process starts
        self.staging = self._lock() if setup.pin else None
        tokens = torch.zeros(share.slots, pipeline.context_length, dtype=torch.int32)
        self._tokens = tokens.pin_memory() if setup.pin else tokens
        self._valid = torch.zeros(share.slots, dtype=torch.bool)
        self._plan = _planned(start, share.global_batch, setup.shape, passes=1 + tier.asks_twice)
        self._numbers = count()
        self._free = deque(range(setup.blocks))
        self._coming: deque[_Coming] = deque()
        self._step: _StepChunks | None = None
        self._submit()

    def __next__(self) -> StepBatch:
        if self._step is not None:
            self._step.finish()
        position = self._next_position
        positions = self.share.positions(self.pipeline, position)
        self._next_position += self.share.global_batch
        step = self._step = _StepChunks(self, position, self._tokens, self._valid)
        images = StepPictures(step, self.tier, positions, self.change, self.parts)
        return StepBatch(position, positions, images, step.tokens, step.valid, step.skips)

    def close(self) -> None:
        """Stop the workers; slots not yet decoded are given up."""
        self.workers.close()
        self.tier.close()
        if self.staging is not None:
            self.staging.close()
        elif self.setup.pin:
            self._blocks.unpin()
        self._blocks.close()
        self._step = None  # which holds on to this loader

    def take(self) -> Filled:
        """The next chunk of the run, once it is filled. Its block is the caller's until it is released."""
        coming, begin = self._coming.popleft(), time.perf_counter()
        with self.parts.part("data wait"):
            done = [self.workers.wait(number) for number in coming.numbers]
        self.waited_seconds += time.perf_counter() - begin
        here = coming.block, slice(coming.stop - coming.start)
        return Filled(
            coming.start,
            coming.stop,
            coming.block,
            images=self._blocks.images[here],
            tokens=self._blocks.tokens[here],
            valid=self._blocks.valid[here],
            skips=[skip for part in done for skip in part.skips],
            checksums=np.concatenate([part.checksums for part in done]),
        )

    def release(self, block: int) -> None:
        """Nothing reads this block any more: the workers fill it anew."""
        self._free.append(block)
        self._submit()

    def _lock(self) -> Staging | None:
        """Page-lock the blocks; where CUDA refuses, what pictures take instead."""
        try:
            self._blocks.pin()
        except RuntimeError as error:
            size = counted(self._blocks.layout.total_bytes, "byte")
            tell(
                f"warning: the loader's memory ({size}) cannot be page-locked: {reason(error)}; its pictures take the "
                f"way over {counted(Staging.BUFFERS, 'buffer')} of {counted(self.setup.shape.chunk, 'picture')}, a "
                "copy more by a thread of its own",
                every_rank=True,
            )
            return Staging(self.setup.shape)

    def _submit(self) -> None:
        """Every free block is put to work."""
        while self._free:
            block = self._free.popleft()
            position, start, stop = next(self._plan)
            numbers = []
            for first, last in spans(start, stop, SLOTS_PER_JOB):
                numbers.append(next(self._numbers))
                self.workers.submit(Job(numbers[-1], block, first - start, position, first, last))
            self._coming.append(_Coming(block, start, stop, numbers))


def _planned(position: int, global_batch: int, shape: StepShape, passes: int) -> Iterator[tuple[int, int, int]]:
    """(position of the step, first slot, last slot + 1) of every chunk of the run, in the order they are used."""
    walks = [shape.spans, shape.held_spans][:passes]
    for step in count(position, global_batch):
        for walk in walks:
            for start, stop in walk:
                yield step, start, stop


@dataclass(frozen=True)
class _Coming:
    """A block that is being filled with slots [start, stop), by the jobs of these numbers."""

    block: int
    start: int
    stop: int
    numbers: list[int]


class _StepChunks:
    """One step's chunks, as its replay tier asks for them (replay.Chunks)."""

    def __init__(self, loader: Loader, position: int, tokens: torch.Tensor, valid: torch.Tensor) -> None:
        self._loader, self._position, self.tokens, self.valid = loader, position, tokens, valid
        self.skips: list[Skip] = []
        shape = loader.setup.shape
        self.kept = shape.kept
        self._left, self._left_again = shape.chunks, len(shape.held_spans) * loader.tier.asks_twice
        self._checksums = np.zeros(shape.slots, np.uint64)  # of the pictures of pass 1
        self._out: set[int] = set()  # blocks that the tier has and has not freed

    def arrive(self) -> Iterator[Chunk]:
        """Pass 1: tokens, valid and skips come with the pixels."""
        while self._left:
            filled = self._loader.take()
            self._left -= 1
            slots = slice(filled.start, filled.stop)
            self.tokens[slots] = filled.tokens
            self.valid[slots] = filled.valid
            self.skips.extend(filled.skips)
            self._checksums[slots] = filled.checksums
            yield self._lend(filled)

    def arrive_again(self) -> Iterator[Chunk]:
        """Pass 2, read anew: the same pixels in every slot that is valid, or an error."""
        while self._left_again:
            filled = self._loader.take()
            self._left_again -= 1
            slots = slice(filled.start, filled.stop)
            changed = filled.checksums != self._checksums[slots]
            if (changed & self.valid[slots].numpy()).any():
                new = {*filled.skips}.difference(self.skips)
                what = min(new).detail if new else "other pixels than in the first pass"
                raise LoaderError(
                    f"replay.kind=recompute: slots {filled.start} to {filled.stop} of the batch at position "
                    f"{self._position} cannot be read a second time ({what}); a shard has changed or is gone"
                )
            yield self._lend(filled)

    def locked(self, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
        staging = self._loader.staging
        return chunks if staging is None else staging.through(chunks)

    def finish(self) -> None:
        """Take back what was not freed, and take what was not asked for, so that its blocks go round again."""
        self._loader.tier.clear()
        for block in [*self._out]:
            self._free(block)
        for chunk in self.arrive():
            chunk.free()
        while self._left_again:
            filled = self._loader.take()
            self._left_again -= 1
            self._loader.release(filled.block)

    def _lend(self, filled: Filled) -> Chunk:
        self._out.add(filled.block)
        return Chunk(filled.start, filled.images, partial(self._free, filled.block))

    def _free(self, block: int) -> None:
        if block in self._out:  # once: a walk that was left in the middle may end after its step did
            self._out.remove(block)
            self._loader.release(block)


class StepPictures:
    """uint8 [N, 3, S, S] of one step, walked twice (replay.Inputs); what `change` makes of them where there is one."""

    def __init__(
        self, chunks: _StepChunks, tier: Tier, positions: np.ndarray, change: Change | None, parts: Parts
    ) -> None:
        self._chunks, self._tier, self._change, self._parts = chunks, tier, change, parts
        self._kept = chunks.kept
        self._positions = torch.from_numpy(positions)

    def __len__(self) -> int:
        return len(self._positions)

    def first(self, device: torch.device, kept: int = 0) -> Iterator[tuple[int, torch.Tensor]]:
        assert kept == self._kept
        return self._changed(self._parts.walk("copies", self._tier.first(self._chunks, device, kept)), device)

    def again(self, device: torch.device, kept: int = 0) -> Iterator[tuple[int, torch.Tensor]]:
        assert kept == self._kept
        return self._changed(self._parts.walk("copies", self._tier.again(self._chunks, device)), device)

    def _changed(
        self, walk: Iterator[tuple[int, torch.Tensor]], device: torch.device
    ) -> Iterator[tuple[int, torch.Tensor]]:
        if self._change is None:
            return walk
        positions = handed_over(self._positions, device)
        return ((start, self._change(images, positions[start : start + len(images)])) for start, images in walk)
