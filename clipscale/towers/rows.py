"""Captions in chunks of about equal work: by length, each chunk cut at its longest caption.

    lengths_N = tower.cut.lengths(tokens_NL) if tower.cut else None         # None: all at full length, in order
    for rows in arranged(torch.arange(N), tokens_NL, lengths_N, chunk=256):
        embeddings_ND[rows.slots] = tower(rows.inputs(tokens_NL).to(device))[: rows.size]

Shapes: N captions, L tokens of a caption, K of the captions, M of a chunk.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LENGTH_STEP, ROW_STEP = 16, 8
"""Captions' lengths and chunks' rows are rounded up to multiples of these: few shapes, and on a CPU bit for bit what
the full length gives."""


class Rows(NamedTuple):
    """Captions that go through the tower at once."""

    slots: slice | Tensor
    """Which of the N; a tensor is int64 and in host memory."""
    size: int
    """M."""
    length: int
    """Tokens of each."""
    rows: int
    """`size` and what fills up the shape."""

    def inputs(self, tokens_NL: Tensor) -> Tensor:
        """[rows, length]; what fills up is the first caption again."""
        part = tokens_NL[self.slots][:, : self.length]
        if self.rows > self.size:
            part = torch.cat([part, part[:1].expand(self.rows - self.size, -1)])
        return part


def arranged(slots_K: Tensor, tokens_NL: Tensor, lengths_N: Tensor | None, chunk: int) -> list[Rows]:
    """`slots_K` cut into chunks of as many tokens as `chunk` captions of full length have: by length, and in the order
    given within each; without lengths, which wants slots that follow each other, in order."""
    longest = tokens_NL.shape[1]
    if lengths_N is None:
        first = int(slots_K[0]) if len(slots_K) else 0
        run = range(first, first + len(slots_K))
        parts = [run[start : start + chunk] for start in range(0, len(run), chunk)]
        return [Rows(slice(part.start, part.stop), len(part), longest, len(part)) for part in parts]
    rounded_K = (-(-lengths_N[slots_K] // LENGTH_STEP) * LENGTH_STEP).clamp(max=longest)
    chunks = []
    for length in rounded_K.unique().tolist():
        mine_M = slots_K[rounded_K == length]
        most = max(1, chunk * longest // length)
        most -= most % ROW_STEP if most > ROW_STEP else 0
        for slots_M in mine_M.split(most):
            rows = min(-(-len(slots_M) // ROW_STEP) * ROW_STEP, most)
            chunks.append(Rows(slots_M.contiguous(), len(slots_M), length, rows))
    return chunks
