"""What a slot holds: read, decode, crop and tokenize.

    filler = Filler(pipeline, Share(global_batch=4096, world=4, rank=1), blocks, threads=8)
    filler.submit(Job(number=0, block=3, offset=0, position=4096, start=0, stop=64)).result().skips

A slot's content depends on its position alone: which sample (order.py), which crop (a counter hash of the position).
Threads, ranks, restarts and the process it happens in cannot change it. A sample that cannot be used leaves its slot
masked: never replaced, never silent. simplejpeg and torch release the GIL, so threads are enough.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
import torch

from clipscale.counter import draw, fold, uniform
from clipscale.data.bad import BadSample
from clipscale.data.load.blocks import Blocks
from clipscale.data.pipeline import Pipeline, Share
from clipscale.data.pixels.decode import DRAWS_PER_SAMPLE, Decoding, load_picture
from clipscale.data.source import Sample, Source

_DETAIL_CHARACTERS = 400


class Job(NamedTuple):
    """Slots [start, stop) of this rank's part of the step batch at `position`, into a block from `offset` on."""

    number: int
    block: int
    offset: int
    position: int
    start: int
    stop: int


class Skip(NamedTuple):
    """A masked slot."""

    position: int
    source: str
    shard: str
    key: str
    cause: str  # one of bad.MASK_CAUSES, or indexing's of a declared sample
    detail: str


class Done(NamedTuple):
    number: int
    skips: list[Skip]
    checksums: np.ndarray  # of the pictures, uint64 [slots of the job]


class Filler:
    """Threads that do jobs in the order they come."""

    def __init__(self, pipeline: Pipeline, share: Share, blocks: Blocks, threads: int) -> None:
        self.pipeline, self.blocks = pipeline, blocks
        self._decoding = Decoding.of(pipeline.data)
        self._ahead_steps = 0  # shards are fetched for the batch so many steps later; 0: none is remote
        if any(source.remote for source in pipeline.sources):
            self._ahead_steps = max(1, pipeline.horizon() // share.global_batch)
        self._pool = ThreadPoolExecutor(threads, "decode", initializer=torch.set_num_threads, initargs=(1,))
        self._global_batch = share.global_batch
        self._positions = lru_cache(maxsize=4)(partial(share.positions, pipeline))  # once for all jobs

    def submit(self, job: Job) -> Future[Done]:
        return self._pool.submit(self._fill, job)

    def close(self) -> None:
        """Stop the threads; jobs not yet begun are given up."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _fill(self, job: Job) -> Done:
        pipe, skips, captions = self.pipeline, [], []
        positions = self._positions(job.position)[job.start : job.stop]
        part = slice(job.offset, job.offset + len(positions))
        images, valid = self.blocks.images[job.block, part], self.blocks.valid[job.block, part]
        valid.fill_(True)
        if self._ahead_steps:
            self._fetch_ahead(job)
        crops = uniform(draw(fold(pipe.seed, "crop"), positions)[:, None], np.arange(DRAWS_PER_SAMPLE)[None, :])
        members = uniform(fold(pipe.seed, "caption member"), positions)
        choices = draw(fold(pipe.seed, "caption"), positions)
        for slot, (source_id, _, shard, index) in enumerate(zip(*pipe.locate(positions), strict=True)):
            source = pipe.sources[source_id]
            try:
                sample = _read(source, shard, index, members[slot])
                captions.append(self._fill_slot(images[slot], source, sample, crops[slot], choices[slot]))
            except BadSample as bad:
                where, key = source.where(shard, index)
                skips.append(
                    Skip(int(positions[slot]), source.name, where, key, bad.cause, str(bad)[:_DETAIL_CHARACTERS])
                )
                captions.append("")
                valid[slot] = False
                images[slot] = 0
        self.blocks.tokens[job.block, part] = pipe.tokenize(captions).to(torch.int32)
        return Done(job.number, skips, checksum(images))

    def _fill_slot(
        self, out_3SS: torch.Tensor, source: Source, sample: Sample, crop: np.ndarray, choice: np.uint64
    ) -> str:
        """Write one picture; returns its caption."""
        caption = source.caption(sample.note, int(choice), sample.which)
        load_picture(sample.image, crop, self._decoding, self.pipeline.image_size, out_3SS)
        return caption

    def _fetch_ahead(self, job: Job) -> None:
        """Start to download the shards that the same slots of this rank need some steps later."""
        later = self._positions(job.position + self._ahead_steps * self._global_batch)[job.start : job.stop]
        source, _, shard, _ = self.pipeline.locate(later)
        for i in np.unique(source):
            self.pipeline.sources[i].prefetch(np.unique(shard[source == i]).tolist())


def _read(source: Source, shard: int, index: int, member: float) -> Sample:
    try:
        return source.read(shard, index, member)
    except OSError as error:
        raise BadSample("cannot be read", str(error)) from error


def checksum(images: torch.Tensor) -> np.ndarray:
    """Of each picture, uint64 [M]: the sum of its bytes as 64-bit words, at memory speed. Tells two readings apart."""
    data = images.numpy().reshape(len(images), -1)
    words = data.shape[1] // 8 * 8
    return data[:, :words].view(np.uint64).sum(axis=1) ^ data[:, words:].sum(axis=1, dtype=np.uint64)
