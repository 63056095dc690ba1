"""Who computes a batch: this process alone, the ranks that torchrun started, or ranks simulated on the one device.

Shapes: B pairs of the whole batch, N pairs of one rank, D width, R sampled rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from clipscale.bench.common.memory import join_watch
from clipscale.bench.loss.inputs import Inputs, draw_pairs, split_rows
from clipscale.bench.loss.reference import Sampled
from clipscale.bench.loss.simulate import ThreadLink, run_ranks
from clipscale.dist import World
from clipscale.loss.precision import exact_products

T = TypeVar("T")


class Outcome(NamedTuple):
    """What one rank got from one evaluation of a loss and its gradients."""

    loss: Tensor
    d_image_ND: Tensor
    d_text_ND: Tensor
    d_scale: Tensor | None
    """None: the contestant gives none."""
    first: int
    """Position in the batch of row 0."""
    lift: float = 1.0
    """What the embeddings' gradients are multiplied by."""
    scale_lift: float = 1.0
    """What `d_scale` is multiplied by."""

    @property
    def gradient_bytes(self) -> int:
        return self.d_image_ND.nbytes + self.d_text_ND.nbytes


@dataclass(frozen=True)
class Team:
    world: World
    simulated: int = 1

    @property
    def ranks(self) -> int:
        return self.world.size * self.simulated

    @property
    def device(self) -> torch.device:
        return self.world.device

    def inputs(self, batch: int, width: int, *, scale: float, precision: str, dtype: torch.dtype, seed: int) -> Inputs:
        """This process's part of the batch: all of it, but for the ranks of torchrun."""
        rows = split_rows(batch, self.world.size)[self.world.rank]
        image_ND, text_ND = draw_pairs(rows, width, seed=seed, device=self.device, dtype=dtype)
        return Inputs(image_ND, text_ND, scale, precision, batch, rows.start)

    def each(self, inputs: Inputs, work: Callable[[Tensor, Tensor, ThreadLink | None, int], T]) -> list[T]:
        """`work(image, text, group, first)` on every rank of this process."""
        if self.simulated == 1:
            return [work(inputs.image_ND, inputs.text_ND, None, inputs.first)]
        parts = split_rows(inputs.batch, self.simulated)

        def one(link: ThreadLink) -> T:
            rows = slice(parts[link.rank].start, parts[link.rank].stop)
            return work(inputs.image_ND[rows], inputs.text_ND[rows], link, rows.start)

        # The switch for float32 products belongs to the process: set for all ranks, it is the same for each.
        with exact_products(inputs.precision, self.device):
            return run_ranks(self.simulated, one, device=self.device, around=join_watch)

    def slowest(self, value: float) -> float:
        """The largest of all processes' values; collective."""
        return max(self.world.gather(value))

    def barrier(self) -> None:
        if self.world.size > 1:
            dist.barrier()

    def sampled(self, outcomes: list[Outcome], rows_R: Tensor) -> Sampled:
        """The sampled rows of all ranks' gradients, in the batch's order and unlifted; collective."""
        own = []
        for outcome in outcomes:
            inside = (rows_R >= outcome.first) & (rows_R < outcome.first + len(outcome.d_image_ND))
            local = (rows_R[inside] - outcome.first).to(outcome.d_image_ND.device)
            own.append([side[local].double().cpu() / outcome.lift for side in (outcome.d_image_ND, outcome.d_text_ND)])
        everyone = [sides for sides_of_process in self.world.gather(own) for sides in sides_of_process]
        d_image_RD, d_text_RD = (torch.cat([sides[side] for sides in everyone]) for side in (0, 1))
        first = outcomes[0]
        d_scale = None if first.d_scale is None else first.d_scale.item() / first.scale_lift
        return Sampled(first.loss.item(), d_image_RD, d_text_RD, d_scale)
