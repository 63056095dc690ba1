"""Embeddings as a trained model has them: normalised, with a common offset, a signal shared by the pair, and noise.

Row p of a batch is a function of (seed, width, p, kind of device) alone, so any rank can draw any part of the batch.

Shapes: B pairs of the whole batch, N of them on this rank, D width.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from clipscale.counter import fold

_CHUNK = 4096  # rows drawn at a time, from a generator of their own
_OFFSET, _NOISE = 0.5, 0.7  # cosine 0.14 between unrelated embeddings and 0.72 within a pair, on average


@dataclass(frozen=True)
class Inputs:
    """What a contestant is given: this rank's rows of one batch."""

    image_ND: Tensor
    text_ND: Tensor
    scale: float
    precision: str
    batch: int
    """B."""
    first: int = 0
    """Position in the batch of row 0."""


def draw_pairs(
    rows: range, width: int, *, seed: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Images and texts [N, D] of the batch's positions `rows`, on `device`. Drawn in float32, then rounded."""
    sides = [torch.empty(len(rows), width, device=device, dtype=dtype) for _ in range(2)]
    for chunk in range(rows.start // _CHUNK, -(-rows.stop // _CHUNK)):
        generator = torch.Generator(device).manual_seed(_key(seed, chunk))
        signal, *noises = (torch.randn(_CHUNK, width, generator=generator, device=device) for _ in range(3))
        origin = chunk * _CHUNK
        start, stop = max(rows.start, origin), min(rows.stop, origin + _CHUNK)
        drawn = slice(start - origin, stop - origin)
        for side, noise in zip(sides, noises, strict=True):
            side[start - rows.start : stop - rows.start] = F.normalize(
                _OFFSET + signal[drawn] + _NOISE * noise[drawn], dim=1
            )
    return sides[0], sides[1]


def _key(seed: int, chunk: int) -> int:
    """32 bits, all that torch's CPU generator takes of a seed."""
    return fold(seed, "bench", chunk) & 0xFFFFFFFF


def split_rows(batch: int, ranks: int) -> list[range]:
    """The positions of each rank, in order; their numbers differ by one at most."""
    bounds = [batch * rank // ranks for rank in range(ranks + 1)]
    return [range(start, stop) for start, stop in pairwise(bounds)]


def sample_rows(batch: int, count: int, *, seed: int) -> Tensor:
    """`count` positions of the batch (all, if it has no more), sorted; int64 on the CPU."""
    if batch <= count:
        return torch.arange(batch)
    return torch.randperm(batch, generator=torch.Generator().manual_seed(seed))[:count].sort().values
