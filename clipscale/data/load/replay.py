"""The replay buffer: a step's inputs are needed twice, once for each pass of gradient caching, with identical bytes.

    for start, images in batch.images.first(device):       # pass 1, while later chunks are still being decoded
        tower(images)
    for start, images in batch.images.again(device):       # pass 2

Tokens are small and held (`Held`). Pixels arrive in chunks from the loader, and wait for pass 2 in one of four tiers:

    Host        in the blocks of memory they arrived in, which go back to the loader one by one as pass 2 uses them
    Gpu         on the GPU; the loader has its blocks back at once
    Disk        in a file of fixed size, written and read ahead by a thread of its own
    Recompute   nowhere: they are read and decoded again by position, and must come out the same

Shapes: N slots of this rank, M slots of a chunk, S side of a picture.
"""

from __future__ import annotations

import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, Protocol

import torch

from clipscale.data.load.shape import StepShape, spans


class Inputs(Protocol):
    """[N, ...] of raw inputs, walked twice in the same chunks."""

    def __len__(self) -> int: ...

    def first(self, device: torch.device, kept: int = 0) -> Iterator[tuple[int, torch.Tensor]]:
        """(start, inputs[start : start + M] on `device`), in order, for pass 1. The first `kept` slots, whole chunks
        of them, are not asked for again."""

    def again(self, device: torch.device, kept: int = 0) -> Iterator[tuple[int, torch.Tensor]]:
        """The same for pass 2, from slot `kept` on. When it has ended, the memory may be filled anew."""


class Held:
    """Inputs that are there already, in host memory."""

    def __init__(self, inputs: torch.Tensor, chunk: int) -> None:
        self.inputs, self.chunk = inputs, chunk

    def __len__(self) -> int:
        return len(self.inputs)

    def first(self, device: torch.device, kept: int = 0) -> Iterator[tuple[int, torch.Tensor]]:
        del kept
        return self.again(device)

    def again(self, device: torch.device, kept: int = 0) -> Iterator[tuple[int, torch.Tensor]]:
        cuts = spans(kept, len(self.inputs), self.chunk)
        return to_device((Chunk(start, self.inputs[start:stop]) for start, stop in cuts), device)


def _nothing() -> None:
    pass


class Chunk(NamedTuple):
    """Slots [start, start + M) in host memory; `free()` once nothing reads them any more."""

    start: int
    data: torch.Tensor
    free: Callable[[], None] = _nothing


def to_device(chunks: Iterator[Chunk], device: torch.device) -> Iterator[tuple[int, torch.Tensor]]:
    """(start, data on `device`) of each chunk in turn, then its `free()`.

    On a GPU the copies go through two buffers on a stream of their own, so that the next chunk is copied while the
    current one is computed on: for that its memory must be page-locked.
    """
    if device.type != "cuda":
        for start, data, free in chunks:
            yield start, data
            free()
        return
    copying, computing = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    buffers: list[torch.Tensor | None] = [None, None]
    used = [torch.cuda.Event(), torch.cuda.Event()]  # the computation on a buffer has passed
    copies: deque[tuple[torch.cuda.Event, Callable[[], None]]] = deque()
    for turn, (start, data, free) in enumerate(chunks):
        side = turn % 2
        if buffers[side] is None:
            buffers[side] = torch.empty_like(data, device=device)
            buffers[side].record_stream(copying)
            copying.wait_stream(computing)  # the allocator may hand out memory that is still being computed on
        with torch.cuda.stream(copying):
            copying.wait_event(used[side])
            target = buffers[side][: len(data)]
            target.copy_(data, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record(copying)
        computing.wait_event(copied)
        copies.append((copied, free))
        yield start, target
        used[side].record(computing)
        if len(copies) > 1:
            _finish(*copies.popleft())
    while copies:
        _finish(*copies.popleft())


def _finish(copied: torch.cuda.Event, free: Callable[[], None]) -> None:
    copied.synchronize()
    free()


def handed_over(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`tensor` itself where it is on `device`, else a copy there. Nobody waits for a GPU: the copy comes behind what it
    has to do, from torch's cache of page-locked memory."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.contiguous().pin_memory().to(device, non_blocking=True)


class Chunks(Protocol):
    """One step's pixels as the loader has them; what a tier asks of it."""

    def arrive(self) -> Iterator[Chunk]:
        """In order, as they are filled."""

    def arrive_again(self) -> Iterator[Chunk]:
        """The same once more, for tiers with `asks_twice`."""

    def locked(self, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
        """Chunks of the loader's memory, in memory that a GPU can copy from while it computes."""


class Host:
    """The loader's own memory is the buffer: nothing is copied."""

    asks_twice = False

    def __init__(self) -> None:
        self._held: deque[Chunk] = deque()

    def first(self, chunks: Chunks, device: torch.device, kept: int) -> Iterator[tuple[int, torch.Tensor]]:
        return to_device(chunks.locked(self._hold(chunks, kept)), device)

    def again(self, chunks: Chunks, device: torch.device) -> Iterator[tuple[int, torch.Tensor]]:
        return to_device(chunks.locked(self._give()), device)

    def clear(self) -> None:
        """Forget what pass 2 did not ask for: the loader has it back."""
        self._held.clear()

    def close(self) -> None:
        pass

    def _hold(self, chunks: Chunks, kept: int) -> Iterator[Chunk]:
        for chunk in chunks.arrive():
            if chunk.start < kept:
                yield chunk
            else:
                self._held.append(chunk)
                yield Chunk(chunk.start, chunk.data)

    def _give(self) -> Iterator[Chunk]:
        while self._held:
            yield self._held.popleft()


class Gpu:
    """[N - kept, 3, S, S] on the GPU, filled in pass 1."""

    asks_twice = False

    def __init__(self, shape: StepShape, device: torch.device) -> None:
        self._store = torch.empty(shape.held_slots, 3, shape.side, shape.side, dtype=torch.uint8, device=device)
        self._kept = shape.kept
        self._sizes: list[tuple[int, int]] = []

    def first(self, chunks: Chunks, device: torch.device, kept: int) -> Iterator[tuple[int, torch.Tensor]]:
        self._sizes.clear()
        for start, data in to_device(chunks.locked(chunks.arrive()), device):
            if start < kept:
                yield start, data
            else:
                self._sizes.append((start, len(data)))
                yield start, self._stored(start, len(data)).copy_(data)

    def again(self, chunks: Chunks, device: torch.device) -> Iterator[tuple[int, torch.Tensor]]:
        for start, size in self._sizes:
            yield start, self._stored(start, size)

    def _stored(self, start: int, size: int) -> torch.Tensor:
        return self._store[start - self._kept :][:size]

    def clear(self) -> None:
        pass

    def close(self) -> None:
        pass


class Disk:
    """A file of N - kept pictures in `folder`, allocated at once and without a name, so that nothing is left behind."""

    asks_twice = False
    _AHEAD = 2  # chunks read before they are asked for

    def __init__(self, shape: StepShape, folder: str, pin: bool) -> None:
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - closed by close
        self._picture_bytes = shape.picture_bytes
        self._kept = shape.kept
        os.posix_fallocate(self._file.fileno(), 0, max(shape.held_bytes, 1))
        self._buffers = [
            torch.empty(shape.chunk, 3, shape.side, shape.side, dtype=torch.uint8, pin_memory=pin)
            for _ in range(self._AHEAD + 2)
        ]
        self._thread = ThreadPoolExecutor(1, "replay-disk")
        self._sizes: list[tuple[int, int]] = []

    def first(self, chunks: Chunks, device: torch.device, kept: int) -> Iterator[tuple[int, torch.Tensor]]:
        return to_device(chunks.locked(self._store(chunks, kept)), device)

    def again(self, chunks: Chunks, device: torch.device) -> Iterator[tuple[int, torch.Tensor]]:
        return to_device(self._load(), device)

    def clear(self) -> None:
        pass

    def close(self) -> None:
        self._thread.shutdown()
        self._file.close()

    def _store(self, chunks: Chunks, kept: int) -> Iterator[Chunk]:
        self._sizes.clear()
        for start, data, free in chunks.arrive():
            if start < kept:
                yield Chunk(start, data, free)
                continue
            self._sizes.append((start, len(data)))
            written = self._thread.submit(self._write, start, data)

            def done(written: Future = written, free: Callable[[], None] = free) -> None:
                written.result()
                free()

            yield Chunk(start, data, done)

    def _load(self) -> Iterator[Chunk]:
        todo, spare = deque(self._sizes), deque(self._buffers)
        coming: deque[tuple[int, torch.Tensor, torch.Tensor, Future]] = deque()
        while todo or coming:
            while todo and spare and len(coming) < self._AHEAD:
                (start, size), buffer = todo.popleft(), spare.popleft()
                coming.append((start, buffer[:size], buffer, self._thread.submit(self._read, start, buffer[:size])))
            start, data, buffer, read = coming.popleft()
            read.result()
            yield Chunk(start, data, lambda buffer=buffer: spare.append(buffer))

    def _write(self, start: int, data: torch.Tensor) -> None:
        _whole(os.pwrite, self._file.fileno(), data, (start - self._kept) * self._picture_bytes)

    def _read(self, start: int, data: torch.Tensor) -> None:
        _whole(_read_into, self._file.fileno(), data, (start - self._kept) * self._picture_bytes)


def _read_into(file: int, view: memoryview, offset: int) -> int:
    return os.preadv(file, [view], offset)


def _whole(move: Callable[[int, memoryview, int], int], file: int, data: torch.Tensor, offset: int) -> None:
    """Write or read all of `data`: one call moves 2 GiB at most."""
    view = memoryview(data.numpy().reshape(-1))
    while view:
        moved = move(file, view, offset)
        if moved == 0:
            raise OSError("the replay file is shorter than what was written to it")
        view, offset = view[moved:], offset + moved


class Recompute:
    """Pass 2 reads and decodes again: a position's pixels are a pure function of it."""

    asks_twice = True

    def first(self, chunks: Chunks, device: torch.device, kept: int) -> Iterator[tuple[int, torch.Tensor]]:
        del kept
        return to_device(chunks.locked(chunks.arrive()), device)

    def again(self, chunks: Chunks, device: torch.device) -> Iterator[tuple[int, torch.Tensor]]:
        return to_device(chunks.locked(chunks.arrive_again()), device)

    def clear(self) -> None:
        pass

    def close(self) -> None:
        pass
