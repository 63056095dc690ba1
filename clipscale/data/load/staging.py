"""Page-locked buffers on the way to a GPU, for chunks whose own memory CUDA does not page-lock.

    staging = Staging(StepShape(slots=4096, chunk=256, side=224, ahead=14))
    for start, images in to_device(staging.through(chunks), device): ...   # the same chunks, in the same order

A thread of its own copies the next chunk into a buffer while the GPU computes on the one before, so that transfers stay
as they are from page-locked blocks: behind the computation.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from clipscale.data.load.replay import Chunk
from clipscale.data.load.shape import StepShape


def page_locked(*shape: int) -> torch.Tensor:
    """uint8, of this shape, filled with anything."""
    return torch.empty(*shape, dtype=torch.uint8, pin_memory=True)


class Staging:
    """One walk at a time; a walk that is left in the middle costs nothing."""

    BUFFERS = 3  # one that the GPU copies from, one that is handed over, one that is filled

    def __init__(self, shape: StepShape) -> None:
        self._buffers = [page_locked(shape.chunk, 3, shape.side, shape.side) for _ in range(self.BUFFERS)]
        self._thread = ThreadPoolExecutor(1, "staging")

    def through(self, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
        """The chunks, one behind what is asked of `chunks`. Of those handed over, at most one may not be free yet when
        the next one is asked for, as with `to_device`."""
        spare = deque(self._buffers)
        coming: deque[tuple[Chunk, Future]] = deque()
        for chunk in chunks:
            coming.append(self._copying(chunk, spare))
            if len(coming) > 1:
                yield _copied(*coming.popleft())
        while coming:
            yield _copied(*coming.popleft())

    def close(self) -> None:
        self._thread.shutdown()

    def _copying(self, chunk: Chunk, spare: deque[torch.Tensor]) -> tuple[Chunk, Future]:
        """The chunk in a spare buffer, once the copy that was begun has ended."""
        buffer = spare.popleft()
        part = buffer[: len(chunk.data)]

        def free() -> None:
            spare.append(buffer)
            chunk.free()

        return Chunk(chunk.start, part, free), self._thread.submit(np.copyto, part.numpy(), chunk.data.numpy())


def _copied(chunk: Chunk, copy: Future) -> Chunk:
    copy.result()
    return chunk
