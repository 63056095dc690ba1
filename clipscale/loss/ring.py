"""The two passes of the loss round the ranks of a process group: image rows stay, text blocks travel.

Three ranks, by the owner of the block that stands at each, hop by hop:

    pass 1, blocks move to rank + 1         pass 2, the ring turns round: blocks move to rank - 1
    rank     0  1  2                        rank     0  1  2
    hop 0    0  1  2   every block at home  hop 0    1  2  0   where pass 1 left them
    hop 1    2  0  1                        hop 1    2  0  1
    hop 2    1  2  0   each has met all     hop 2    0  1  2   every block at home, with its gradient

In pass 1 a block carries the statistics of its columns, which are final where it stands at the end; in pass 2 it
carries them along, and gathers its gradient. The blocks of the next hop travel while this hop's tiles are computed;
what a block gathers lags behind it and is added to after the tiles, so that its transfer overlaps them too. Memory per
rank is a fixed number of [N, D] blocks, whatever the number of ranks. Source: Inf-CL, arXiv 2410.17243; there the
gradient's ring does not start where the first one ends.

Shapes: N pairs on this rank, M pairs of the block that stands here, D width, B pairs of all ranks.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from clipscale.loss.precision import OPERAND_DTYPE, accumulator_dtype
from clipscale.loss.tiles import Partial, gradient_block, logsumexp_block


def world_size(group: dist.ProcessGroup | None) -> int:
    """Ranks of `group`; None is the default group, or this process alone where there is none."""
    return dist.get_world_size(group) if group or dist.is_initialized() else 1


@dataclass(frozen=True)
class Ring:
    """The ranks of a group (None: this process alone) and how many pairs each holds."""

    group: dist.ProcessGroup | None
    rank: int
    pairs: tuple[int, ...]

    @classmethod
    def join(cls, group: dist.ProcessGroup | None, image_ND: Tensor, precision: str) -> "Ring":
        """Collective. `group` None is the default group, or this process alone where there is none.

        ValueError, on every rank, when the ranks differ in width or precision; and on a process outside the group.
        """
        if group is None and not dist.is_initialized():
            return cls(None, 0, (len(image_ND),))
        group = group or dist.group.WORLD
        rank = dist.get_rank(group)
        if rank < 0:
            raise ValueError("this process is not in the group it was given: call the loss on the group's ranks only")
        names = list(OPERAND_DTYPE)
        mine = torch.tensor([*image_ND.shape, names.index(precision)], device=image_ND.device)
        everyone = mine.new_empty(dist.get_world_size(group) * len(mine))
        dist.all_gather_into_tensor(everyone, mine, group=group)
        pairs, widths, precisions = everyone.view(-1, len(mine)).T.tolist()
        if len({*widths}) > 1 or len({*precisions}) > 1:
            raise ValueError(
                f"the ranks differ in width {widths} or precision {[names[index] for index in precisions]}: "
                "pass embeddings of one width and type on every rank, also where there are no pairs"
            )
        return cls(group, rank, tuple(pairs))

    @property
    def world(self) -> int:
        return len(self.pairs)

    @property
    def total_pairs(self) -> int:
        return sum(self.pairs)

    def sum(self, values: Tensor) -> Tensor:
        """`values` summed over the ranks, in place."""
        if self.world > 1:
            dist.all_reduce(values, group=self.group)
        return values

    def pass_on(self, blocks: tuple[Tensor, ...], owner_after: int, direction: int) -> "Transfer":
        """Start sending `blocks` to the next rank and receiving those of rank `owner_after` from the one before.

        Nothing is sent for a block without pairs: both sides know the sizes.
        """
        incoming = tuple(block.new_empty(self.pairs[owner_after], *block.shape[1:]) for block in blocks)
        ops = [self._op(dist.isend, block, direction) for block in blocks if block.numel()]
        ops += [self._op(dist.irecv, block, -direction) for block in incoming if block.numel()]
        return Transfer(blocks, incoming, dist.batch_isend_irecv(ops) if ops else [])

    def _op(self, kind: Callable, block: Tensor, offset: int) -> dist.P2POp:
        peer = dist.get_global_rank(self.group, (self.rank + offset) % self.world)
        return dist.P2POp(kind, block, peer, self.group)


class Transfer(NamedTuple):
    outgoing: tuple[Tensor, ...]
    """Held so that the memory outlives the send."""
    incoming: tuple[Tensor, ...]
    works: list[dist.Work]

    def wait(self) -> tuple[Tensor, ...]:
        for work in self.works:
            work.wait()
        return self.incoming


@dataclass
class Hop:
    """One stop of a block. The visitor reads `cargo` and sets `gathered` to this rank's contribution."""

    owner: int
    """Whose block it is."""
    cargo: tuple[Tensor, ...]
    """What travels ahead, unchanged: tensors of M rows."""
    gathered: Tensor | None = None
    """What lags behind, M rows too: after the last hop, the contributions of all ranks together."""


def travel(
    ring: Ring, cargo: tuple[Tensor, ...], *, owner: int, direction: int, merge: Callable[[Tensor, Tensor], Tensor]
) -> Iterator[Hop]:
    """Every block of the ring in turn, from the one of `owner` that stands here; blocks move by `direction` (+-1)."""
    behind = None
    for hops_left in reversed(range(ring.world)):
        owner_after = (owner - direction) % ring.world
        if hops_left:
            ahead = ring.pass_on(cargo, owner_after, direction)
        hop = Hop(owner, cargo)
        yield hop
        if behind is not None:
            (carried,) = behind.wait()
            hop.gathered = merge(carried, hop.gathered)
        if hops_left:
            behind = ring.pass_on((hop.gathered,), owner_after, direction)
            cargo, owner = ahead.wait(), owner_after


@dataclass(frozen=True)
class Statistics:
    """Where pass 1 leaves this rank: its own rows, and the block it ends at, whose columns are final."""

    rows: Partial
    """Of this rank's N images against all texts."""
    owner: int
    text_MD: Tensor
    columns: Partial
    """Of that block's M texts against all images."""


def ring_statistics(
    ring: Ring, image_ND: Tensor, text_ND: Tensor, logit_scale: float, *, precision: str, tile: int
) -> Statistics:
    """Pass 1. Collective."""
    operand = OPERAND_DTYPE[precision]
    image_ND, text_ND = image_ND.to(operand).contiguous(), text_ND.to(operand).contiguous()
    rows = Partial.empty(len(image_ND), image_ND.to(accumulator_dtype(precision)))
    for hop in travel(ring, (text_ND,), owner=ring.rank, direction=1, merge=_merge_partials):
        (text_MD,) = hop.cargo
        home = hop.owner == ring.rank
        block_rows, block_columns = logsumexp_block(
            image_ND, text_MD, logit_scale, diagonal=home, precision=precision, tile=tile
        )
        rows = rows.merge(block_rows)
        hop.gathered = torch.stack(block_columns, dim=1)
    return Statistics(rows, hop.owner, text_MD, Partial(*hop.gathered.unbind(dim=1)))


def _merge_partials(carried_M3: Tensor, own_M3: Tensor) -> Tensor:
    return torch.stack(Partial(*carried_M3.unbind(dim=1)).merge(Partial(*own_M3.unbind(dim=1))), dim=1)


def ring_gradients(
    ring: Ring,
    image_ND: Tensor,
    text_ND: Tensor,
    logit_scale: float,
    statistics: Statistics,
    *,
    precision: str,
    tile: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Pass 2. Collective. True derivatives of the mean over all B pairs.

    Returns d_image and d_text [N, D] of this rank's pairs and d_scale [], the same on every rank, all in the
    accumulator's type.
    """
    dtype = accumulator_dtype(precision)
    operand_ND = image_ND.to(OPERAND_DTYPE[precision])
    d_image_ND = torch.zeros_like(operand_ND, dtype=dtype)
    d_scale = d_image_ND.new_zeros((), dtype=torch.float64)
    cargo = (statistics.text_MD, torch.stack(statistics.columns, dim=1))
    row_softmax = statistics.rows.softmax()
    for hop in travel(ring, cargo, owner=statistics.owner, direction=-1, merge=Tensor.add_):
        text_MD, columns_M3 = hop.cargo
        columns = Partial(*columns_M3.unbind(dim=1))
        hop.gathered, block_d_scale = gradient_block(
            operand_ND,
            text_MD,
            logit_scale,
            row_softmax,
            columns.softmax(),
            d_image_ND,
            diagonal=hop.owner == ring.rank,
            precision=precision,
            tile=tile,
        )
        d_scale += block_d_scale
    d_text_ND = hop.gathered

    # The diagonal's term, 2B dL/dS_ii = -((1 - p_ii) + (1 - q_ii)). The last block, hence `columns`, is this rank's.
    missing_N1 = (statistics.rows.margin().sigmoid() + columns.margin().sigmoid())[:, None]
    d_image_ND -= missing_N1 * text_ND.to(dtype)
    d_text_ND -= missing_N1 * image_ND.to(dtype)
    pairs_twice = 2 * max(ring.total_pairs, 1)
    d_image_ND *= logit_scale / pairs_twice
    d_text_ND *= logit_scale / pairs_twice
    return d_image_ND, d_text_ND, (ring.sum(d_scale) / (pairs_twice * logit_scale)).to(dtype)
