"""Step batches, decoded in the background: position -> source -> shard -> sample -> uint8 pixels and tokens.

    loader = Loader(pipeline, start=0, global_batch=4096, world=4, rank=1, threads=8)
    batch = next(loader)           # StepBatch: this rank's 1024 slots of positions 0..4095
    batch = next(loader)           # positions 4096..8191

What a slot holds depends on its position alone: which sample (order.py), which crop (a counter hash of the position).
Threads, ranks and restarts cannot change it. A sample that cannot be used leaves its slot masked: never replaced, never
silent. Decode threads release the GIL inside simplejpeg and torch.

Shapes: G global batch, N slots of this rank (G / world), S side of a picture, L tokens of a caption.
"""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from clipscale.counter import draw, fold, uniform
from clipscale.data.decode import DRAWS_PER_SAMPLE, BadSample, crop_and_resize, decode, random_crop
from clipscale.data.order import rank_positions
from clipscale.data.pipeline import Pipeline
from clipscale.data.replay import pin
from clipscale.data.source import Source

_SLOTS_PER_TASK = 64


class Skip(NamedTuple):
    """A masked slot."""

    position: int
    source: str
    shard: str
    key: str
    cause: str  # one of decode.CAUSES
    detail: str


@dataclass
class StepBatch:
    """This rank's slots of one step. A masked slot holds a black picture and no words."""

    position: int  # of the global batch's first slot
    positions: np.ndarray  # int64 [N]
    keys: list[str]  # [N]
    images: torch.Tensor  # uint8 [N, 3, S, S]
    tokens: torch.Tensor  # int64 [N, L]
    valid: torch.Tensor  # bool [N]
    skips: list[Skip]


class Loader(Iterator[StepBatch]):
    """An endless iterator of step batches, `prefetch` of them decoded ahead.

    Taking the next batch overwrites the tensors of the one before.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        *,
        start: int,
        global_batch: int,
        world: int = 1,
        rank: int = 0,
        threads: int = 2,
        prefetch: int = 1,
        device: torch.device | None = None,
    ) -> None:
        self.pipeline, self.global_batch, self.world, self.rank = pipeline, global_batch, world, rank
        self._position = start
        self._pool = ThreadPoolExecutor(threads, "decode", initializer=torch.set_num_threads, initargs=(1,))
        self._free: queue.SimpleQueue[tuple[torch.Tensor, torch.Tensor]] = queue.SimpleQueue()
        slots, side = global_batch // world, pipeline.image_size
        for _ in range(prefetch + 1):
            images = pin(torch.zeros(slots, 3, side, side, dtype=torch.uint8), device)
            self._free.put((images, pin(torch.zeros(slots, pipeline.context_length, dtype=torch.int64), device)))
        self._ahead: deque[tuple[StepBatch, list[Future]]] = deque()
        self._taken: StepBatch | None = None
        for _ in range(prefetch):
            self._submit()

    def __next__(self) -> StepBatch:
        if self._taken is not None:
            self._free.put((self._taken.images, self._taken.tokens))
        self._submit()
        batch, tasks = self._ahead.popleft()
        for task in tasks:
            batch.skips.extend(task.result())
        self._taken = batch
        return batch

    def close(self) -> None:
        """Stop the threads; slots not yet decoded are given up."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _submit(self) -> None:
        images, tokens = self._free.get_nowait()
        positions = rank_positions(
            self._position, self.global_batch, world=self.world, rank=self.rank, streams=self.pipeline.streams
        )
        n = len(positions)
        batch = StepBatch(self._position, positions, [""] * n, images, tokens, torch.ones(n, dtype=torch.bool), [])
        located = self.pipeline.locate(positions)
        tasks = [
            self._pool.submit(_fill, self.pipeline, batch, located, slice(i, min(i + _SLOTS_PER_TASK, n)))
            for i in range(0, n, _SLOTS_PER_TASK)
        ]
        self._ahead.append((batch, tasks))
        self._position += self.global_batch


def _fill(pipe: Pipeline, batch: StepBatch, located: tuple[np.ndarray, ...], part: slice) -> list[Skip]:
    """Read, decode, crop and tokenize the slots of `part`; the masked ones come back."""
    skips: list[Skip] = []
    captions = []
    keys = draw(fold(pipe.seed, "crop"), batch.positions[part])
    draws = uniform(keys[:, None], np.arange(DRAWS_PER_SAMPLE)[None, :])
    for row, slot in enumerate(range(part.start, part.stop)):
        source_id, _, shard, index = (int(column[slot]) for column in located)
        source = pipe.sources[source_id]
        try:
            batch.keys[slot], caption = _fill_slot(pipe, batch.images[slot], source, shard, index, draws[row])
            captions.append(caption)
        except BadSample as bad:
            path, batch.keys[slot] = source.where(shard, index)
            skips.append(
                Skip(int(batch.positions[slot]), source.name, path, batch.keys[slot], bad.cause, str(bad)[:200])
            )
            batch.valid[slot] = False
            batch.images[slot] = 0
            captions.append("")
    batch.tokens[part] = pipe.tokenize(captions)
    return skips


def _fill_slot(
    pipe: Pipeline, out_3SS: torch.Tensor, source: Source, shard: int, index: int, draws: np.ndarray
) -> tuple[str, str]:
    """Write one picture; returns (key, caption)."""
    try:
        sample = source.read(shard, index)
    except OSError as error:
        raise BadSample("cannot be read", str(error)) from error
    try:
        caption = sample.note.decode()
    except UnicodeDecodeError as error:
        raise BadSample("caption is not UTF-8", str(error)) from error
    pixels = decode(sample.image, pipe.data.max_pixels)
    box = random_crop(*pixels.shape[:2], draws, pipe.data.crop_scale, pipe.data.crop_ratio)
    out_3SS.copy_(crop_and_resize(pixels, box, pipe.image_size))
    return sample.key, caption.strip()
