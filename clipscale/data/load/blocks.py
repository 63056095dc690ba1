"""Memory that the loader's process and the training process share: R blocks, filled in place, never moved.

    blocks = Blocks.make(Layout(blocks=12, chunk=256, side=224, length=77))
    blocks.images[3], blocks.tokens[3], blocks.valid[3]       # block 3: uint8 [M, 3, S, S], int32 [M, L], bool [M]
    Blocks(blocks.layout, blocks.file)                        # the same bytes in another process, by an inherited file

A block is the memory that holds one chunk; chunks come and go, blocks stay and circulate (loader.py).

A memory file (memfd) rather than /dev/shm: it has no name to leak when a run is killed, and containers do not cap it.

Shapes: R blocks, M slots of a chunk, S side of a picture, L tokens of a caption.
"""

from __future__ import annotations

import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

import torch

from clipscale.data.load.shape import picture_bytes

_PART_BYTES = 2**26  # what a thread faults in at a time


@dataclass(frozen=True)
class Layout:
    blocks: int  # R
    chunk: int  # M
    side: int  # S, pixels
    length: int  # L

    @property
    def total_bytes(self) -> int:
        return self.blocks * self.chunk * (picture_bytes(self.side) + 4 * self.length + 1)


class Blocks:
    """Views on one stretch of shared memory. `file` is its descriptor."""

    def __init__(self, layout: Layout, file: int) -> None:
        self.layout, self.file = layout, file
        self._memory = memory = torch.frombuffer(mmap.mmap(file, layout.total_bytes), dtype=torch.uint8)
        r, m, s, length = layout.blocks, layout.chunk, layout.side, layout.length
        # Tokens first: int32 wants an address divisible by 4.
        tokens, images, valid = memory.split([4 * r * m * length, r * m * picture_bytes(s), r * m])
        self.tokens = tokens.view(torch.int32).view(r, m, length)
        self.images = images.view(r, m, 3, s, s)
        self.valid = valid.view(torch.bool).view(r, m)

    @classmethod
    def make(cls, layout: Layout) -> Blocks:
        file = os.memfd_create("clipscale-loader")
        os.ftruncate(file, layout.total_bytes)
        return cls(layout, file)

    def fault_in(self, threads: int) -> None:
        """Touch every page, while nothing lies in them: fresh memory is several times slower to write, and `pin` would
        fetch its pages on one thread."""
        with ThreadPoolExecutor(threads, "fault-in") as pool:  # numpy: torch would bring threads of its own to each
            list(pool.map(lambda part: part.numpy().fill(0), self._memory.split(_PART_BYTES)))

    def pin(self) -> None:
        """Page-lock for asynchronous copies to a GPU; `fault_in` comes first.

        Raises:
            RuntimeError: CUDA refuses (the limit of locked memory, or a system that locks no memory files).
        """
        start = self.tokens.data_ptr()
        try:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(start, self.layout.total_bytes, 0))
        except RuntimeError:
            with suppress(RuntimeError):  # CUDA keeps the error for whoever asks next, which is the check of any kernel
                torch.ones(1, device="cuda")
            raise

    def unpin(self) -> None:
        torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(self.tokens.data_ptr()))

    def close(self) -> None:
        """Let go of the file; the memory goes when the last tensor on it does."""
        os.close(self.file)
