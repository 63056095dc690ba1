"""The two walks through a step's inputs: chunk by chunk, the kept ones first, and in pass 2 only those not kept.

    for chunk in walk.first(device):        # pass 1; chunk.kept says whether its graph is
        tower(chunk.inputs)
    for chunk in walk.again(device):        # pass 2

Pictures come in order, as the loader has them (`Pictures`). Captions are there already and their order is free: the
text tower walks them by length, in chunks of about equal work, each cut at its longest caption (`Captions`, of the
rows that towers/rows.py arranges).

Shapes: N slots of this rank, M slots of a chunk, L tokens of a caption.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from clipscale.data.load.replay import Inputs, handed_over
from clipscale.data.load.shape import spans
from clipscale.step.plan import TowerPlan
from clipscale.towers.rows import Rows, arranged


class Chunk(NamedTuple):
    """What goes through a tower at once."""

    slots: slice | Tensor
    """Where its M samples stand in the step; a tensor is int64 and in host memory."""
    inputs: Tensor
    """On the tower's device; rows beyond the M-th fill up the shape and mean nothing."""
    kept: bool

    @property
    def first(self) -> int:
        """Its first slot."""
        return self.slots.start if isinstance(self.slots, slice) else int(self.slots[0])

    @property
    def size(self) -> int:
        """M."""
        return self.slots.stop - self.slots.start if isinstance(self.slots, slice) else len(self.slots)


class Walk(Protocol):
    """What two passes ask of a walk."""

    kept: int
    """Samples of the chunks whose graphs are kept."""

    def __len__(self) -> int: ...

    def first(self, device: torch.device) -> Iterator[Chunk]: ...

    def again(self, device: torch.device) -> Iterator[Chunk]: ...


class Pictures:
    """uint8 [N, 3, S, S] in the chunks they arrive in; those in which gradients are wanted are cut to `plan.chunk`."""

    def __init__(self, inputs: Inputs, plan: TowerPlan) -> None:
        self._inputs, self._chunk, self._alike = inputs, plan.chunk, plan.by_chunk
        self.kept = plan.kept_samples(len(inputs))

    def __len__(self) -> int:
        return len(self._inputs)

    def first(self, device: torch.device) -> Iterator[Chunk]:
        for start, block in self._inputs.first(device, self.kept):
            kept = start < self.kept
            yield from self._cut(start, block, self._chunk if kept or self._alike else len(block), kept)

    def again(self, device: torch.device) -> Iterator[Chunk]:
        for start, block in self._inputs.again(device, self.kept):
            yield from self._cut(start, block, self._chunk, False)

    @staticmethod
    def _cut(start: int, block: Tensor, size: int, kept: bool) -> Iterator[Chunk]:
        for first, last in spans(0, len(block), size):
            yield Chunk(slice(start + first, start + last), block[first:last], kept)


class Captions:
    """Token ids [N, L] in host memory: by length where `lengths_N` is given, else in order and at full length.

    Args:
        lengths_N: tokens of each caption that the tower must see.
    """

    def __init__(self, tokens_NL: Tensor, plan: TowerPlan, lengths_N: Tensor | None) -> None:
        self._tokens_NL = tokens_NL
        slots_N = torch.arange(len(tokens_NL))
        chunks = arranged(slots_N, tokens_NL, lengths_N, plan.chunk)
        count = _how_many(chunks, plan)
        self._kept, self._others = chunks[:count], chunks[count:]
        self._wide = self._others
        if plan.wide > plan.chunk and self._others and not plan.by_chunk:
            rest_K = torch.cat([slots_N[rows.slots] for rows in self._others])
            self._wide = arranged(rest_K, tokens_NL, lengths_N, plan.wide)
        self.kept = sum(rows.size for rows in self._kept)
        self.tokens = sum(rows.size * rows.length for rows in chunks)
        """That the tower runs in one pass."""

    def __len__(self) -> int:
        return len(self._tokens_NL)

    def first(self, device: torch.device) -> Iterator[Chunk]:
        for kept, some in ((True, self._kept), (False, self._wide)):
            yield from (Chunk(rows.slots, self._inputs(rows, device), kept) for rows in some)

    def again(self, device: torch.device) -> Iterator[Chunk]:
        return (Chunk(rows.slots, self._inputs(rows, device), False) for rows in self._others)

    def _inputs(self, rows: Rows, device: torch.device) -> Tensor:
        return handed_over(rows.inputs(self._tokens_NL), device)


def _how_many(chunks: list[Rows], plan: TowerPlan) -> int:
    """Chunks, from the first on, whose graphs fit `plan.keep_bytes` together."""
    left = plan.keep_bytes
    for count, rows in enumerate(chunks):
        left -= plan.cost.of(rows.rows, rows.rows * rows.length)
        if left < 0:
            return count
    return len(chunks) if plan.keep_bytes > 0 else 0
