"""The two passes of the loss round the ranks of a group: image rows stay, text blocks travel.

Three ranks, by the owner of the block that stands at each, hop by hop:

    pass 1, blocks move to the next         pass 2, the ring turns round: blocks move to the one before
    position 0  1  2                        position 0  1  2
    hop 0    0  1  2   every block at home  hop 0    1  2  0   where pass 1 left them
    hop 1    2  0  1                        hop 1    2  0  1
    hop 2    1  2  0   each has met all     hop 2    0  1  2   every block at home, with its gradient

In pass 1 a block gathers the statistics of its columns, which are final where it stands at the end; in pass 2 it
carries them along, and gathers its gradient. The blocks of the next hop travel while this hop's tiles are computed;
what a block gathers lags behind it and is added to after the tiles, so that its transfer overlaps them too.

Between the passes the columns' 1 - p_ii go home, one hop forward: with them, -(1 - p_ii + 1 - q_ii) times the other
side's embeddings is where a gradient starts. So memory per rank is a fixed number of [N, D] blocks, whatever the number
of ranks. In the operands' type: the images, the text block that stands here, and the one that comes. In float32: the
images' gradient, the one of the block here, the one that leaves, and the one that comes. A call that may overwrite
(`contrastive_grads_in_place`) has the first of these, and the last block's, in its inputs' memory.

Source: Inf-CL, arXiv 2410.17243; there the gradient's ring does not start where the first one ends.

A rank's place in the ring is its position: the ring goes node by node, so that a hop crosses the network once for each.

Shapes: N pairs on this rank, M pairs of the block that stands here, D width, B pairs of all ranks.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from clipscale.loss.engines import Engine
from clipscale.loss.link import Link, node_identity, ring_order
from clipscale.loss.precision import OPERAND_DTYPE, accumulator_dtype
from clipscale.loss.statistics import Partial, Softmax
from clipscale.loss.tiles import row_chunks

Tensors = tuple[Tensor, ...]
"""What travels together: tensors of M rows each."""


class Wanted(NamedTuple):
    """Whose gradients are computed, the same on every rank."""

    image: bool
    text: bool
    logit_scale: bool


@dataclass(frozen=True)
class Ring:
    """The ranks of a link, and how many pairs each holds."""

    link: Link
    order: tuple[int, ...]
    """The rank at each position."""
    pairs: tuple[int, ...]
    """By position."""

    @classmethod
    def join(cls, link: Link, image_ND: Tensor, precision: str, wanted: Wanted) -> "Ring":
        """Collective.

        ValueError, on every rank, when the ranks differ in width, precision or the gradients they want.
        """
        names = list(OPERAND_DTYPE)
        mine = [*image_ND.shape, names.index(precision), *wanted, node_identity()]
        everyone = [mine]
        if link.size > 1:
            everyone = link.gather(torch.tensor(mine, device=image_ND.device)).tolist()
        pairs, widths, precisions, *wishes, nodes = zip(*everyone, strict=True)
        if len({*widths}) > 1 or len({*precisions}) > 1:
            raise ValueError(
                f"the ranks differ in width {list(widths)} or precision {[names[index] for index in precisions]}: "
                "pass embeddings of one width and type on every rank, also where there are no pairs"
            )
        for name, wishes_by_rank in zip(Wanted._fields, wishes, strict=True):
            if len({*wishes_by_rank}) > 1:
                raise ValueError(
                    f"the ranks differ in whether they want the gradient of {name}: {[*map(bool, wishes_by_rank)]}; "
                    "lock the same towers on every rank, also where there are no pairs"
                )
        order = ring_order(list(nodes))
        return cls(link, tuple(order), tuple(pairs[rank] for rank in order))

    @property
    def size(self) -> int:
        return len(self.order)

    @functools.cached_property
    def position(self) -> int:
        return self.order.index(self.link.rank)

    @property
    def total_pairs(self) -> int:
        return sum(self.pairs)

    def pass_on(self, blocks: Tensors, owner_after: int, direction: int) -> Callable[[], Tensors]:
        """Start to send `blocks` to the position `direction` (+-1) away, and to receive those of `owner_after` from the
        other side.

        The function that is returned waits for both and gives what came. Nothing is sent for a block without pairs:
        both sides know the sizes.
        """
        incoming = tuple(block.new_empty(self.pairs[owner_after], *block.shape[1:]) for block in blocks)
        to, source = (self.order[(self.position + step) % self.size] for step in (direction, -direction))
        outgoing, expected = ([block for block in tensors if block.numel()] for tensors in (blocks, incoming))
        wait = self.link.exchange(outgoing, to, expected, source)

        return functools.partial(_arrive, wait, incoming, outgoing)


def _arrive(wait: Callable[[], None], incoming: Tensors, outgoing: list[Tensor]) -> Tensors:
    """`outgoing` is held here so that its memory outlives the send."""
    wait()
    return incoming


def travel(
    ring: Ring,
    cargo: Tensors,
    *,
    owner: int,
    direction: int,
    visit: Callable[[int, Tensors], Tensors],
    merge: Callable[[Tensors, Tensors], Tensors],
) -> tuple[int, Tensors, Tensors]:
    """Bring every block of the ring here in turn, from the one of `owner` that stands here, by `direction` (+-1).

    `visit(owner, cargo)` gives what this rank adds to a block, or () where nothing lags behind; `merge(carried, own)`
    adds it. Gives the last block: its owner, its cargo, and what all ranks together have added to it.
    """
    behind = None
    for hops_left in reversed(range(ring.size)):
        owner_after = (owner - direction) % ring.size
        if hops_left:
            ahead = ring.pass_on(cargo, owner_after, direction)
        gathered = visit(owner, cargo)
        if behind is not None:
            gathered, behind = merge(behind(), gathered), None  # what has been sent, and what came, is free again
        if hops_left:
            behind = ring.pass_on(gathered, owner_after, direction) if gathered else None
            cargo, owner = ahead(), owner_after
    return owner, cargo, gathered


@dataclass
class Work:
    """One evaluation of the loss as this rank sees it. Images and texts are operands (`precision.to_operand`)."""

    ring: Ring
    image_ND: Tensor
    scale: float
    engine: Engine
    precision: str
    tile: int | None
    owner: int
    """Whose text block stands here."""
    text_MD: Tensor | None
    """That block; None while the ring turns."""

    def take_text(self) -> Tensor:
        """The block, to be sent away: nothing here keeps it alive."""
        text_MD, self.text_MD = self.text_MD, None
        return text_MD


class Statistics(NamedTuple):
    """What pass 1 tells of this rank's rows, and of the block that it leaves here, whose columns are final."""

    sums: Tensor
    """[6], float64: over rows and columns loss, 1 - p_ii and (1 - p_ii) X_ii; then X_ii; right rows; right columns."""
    missing: Tensor
    """[1], float64: the largest 1 - p_ii of them; 0 where there are none."""
    rows: Softmax
    """Of this rank's N images over all texts."""
    columns: Softmax
    """Of that block's M texts over all images."""


def ring_statistics(work: Work) -> Statistics:
    """Pass 1. Collective."""
    ring, rows = work.ring, None

    def visit(owner: int, cargo: Tensors) -> Tensors:
        nonlocal rows
        block_rows, block_columns = work.engine.logsumexp_block(
            work.image_ND,
            *cargo,
            work.scale,
            diagonal=owner == ring.position,
            precision=work.precision,
            tile=work.tile,
        )
        rows = block_rows if rows is None else rows.merge(block_rows, work.scale)
        return block_columns

    def merge(carried: Tensors, own: Tensors) -> Tensors:
        return Partial(*carried).merge(Partial(*own), work.scale)

    work.owner, (work.text_MD,), columns = travel(
        ring, (work.take_text(),), owner=work.owner, direction=1, visit=visit, merge=merge
    )
    row_sums, row_missing, row_softmax = _settle(rows, work.scale)
    column_sums, column_missing, column_softmax = _settle(Partial(*columns), work.scale)
    sums = torch.cat([(row_sums + column_sums)[:3], row_sums[3:], column_sums[4:]])
    return Statistics(sums, torch.maximum(row_missing, column_missing), row_softmax, column_softmax)


def _settle(partial: Partial, scale: float) -> tuple[Tensor, Tensor, Softmax]:
    """Of final statistics: sums (loss, 1 - p_ii, (1 - p_ii) X_ii, X_ii, right ones; [5], float64), the largest 1 - p_ii
    ([1], float64), and their softmax in their place."""
    sums, largest = partial.max.new_zeros(5, dtype=torch.float64), partial.max.new_zeros(1, dtype=torch.float64)
    for rows in row_chunks(len(partial.max), 16):  # some 16 temporaries a row
        part = Partial(*(values[rows] for values in partial))
        softmax = part.softmax(scale)
        missing = softmax.missing.double()
        addends = part.loss(scale), missing, missing * part.diag, part.diag, part.correct()
        sums += torch.stack([addend.sum(dtype=torch.float64) for addend in addends])
        largest = torch.maximum(largest, missing.amax(0, keepdim=True))
        for values, settled in zip(part, softmax, strict=True):
            values.copy_(settled)
    return sums, largest, Softmax(*partial)


def ring_gradients(
    work: Work,
    statistics: Statistics,
    image_ND: Tensor,
    text_ND: Tensor,
    wanted: Wanted,
    *,
    origin: float,
    lift: float,
    in_place: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Pass 2. Collective. True derivatives of the mean over all B pairs, in the accumulator's type.

    `image_ND` and `text_ND` are this rank's embeddings as they were given; `in_place`, each becomes the gradient of the
    other side, where that is wanted. The gradients of its images and of its texts are None where they are not. The
    third is the scale's, [] in float64, not yet summed over the ranks nor divided by 2B: what the wrong pairs
    contribute, about `origin` (for it and `lift` see `tiles.gradient_block`).
    """
    ring, scale = work.ring, work.scale
    dtype = accumulator_dtype(work.precision)
    minus_N1 = _missing_at_home(ring, statistics).neg_()[:, None] if wanted.image or wanted.text else None
    d_image_ND = _start(text_ND, minus_N1, dtype, in_place) if wanted.image else None
    d_scale = image_ND.new_zeros((), dtype=torch.float64)

    def visit(owner: int, cargo: Tensors) -> Tensors:
        text_MD, *columns = cargo
        at_home = owner == ring.position
        d_text_MD = None
        if wanted.text and at_home:
            d_text_MD = _start(image_ND, minus_N1, dtype, in_place)
        elif wanted.text:
            d_text_MD = text_MD.new_zeros(text_MD.shape, dtype=dtype)
        d_scale.add_(
            work.engine.gradient_block(
                work.image_ND,
                text_MD,
                scale,
                statistics.rows,
                Softmax(*columns),
                d_image_ND,
                d_text_MD,
                origin=origin,
                lift=lift,
                diagonal=at_home,
                precision=work.precision,
                tile=work.tile,
            )
        )
        return (d_text_MD,) if wanted.text else ()

    def merge(carried: Tensors, own: Tensors) -> Tensors:
        return (own[0].add_(carried[0]),)  # of the last block, in the memory that it is to end in

    _, _, gathered = travel(
        ring, (work.take_text(), *statistics.columns), owner=work.owner, direction=-1, visit=visit, merge=merge
    )
    d_text_ND = gathered[0] if wanted.text else None  # the last block is this rank's own
    factor = scale / (2 * max(ring.total_pairs, 1))
    for d_ND in (d_image_ND, d_text_ND):
        if d_ND is not None:
            d_ND.mul_(factor)
    return d_image_ND, d_text_ND, d_scale


def _missing_at_home(ring: Ring, statistics: Statistics) -> Tensor:
    """(1 - p_ii) + (1 - q_ii) of this rank's pairs, [N]. The block that pass 1 leaves here is the next position's."""
    missing_N = statistics.columns.missing
    if ring.size > 1:
        (missing_N,) = ring.pass_on((missing_N,), ring.position, 1)()
    return statistics.rows.missing + missing_N


def _start(partner_ND: Tensor, minus_N1: Tensor, dtype: torch.dtype, in_place: bool) -> Tensor:
    """Where 2B/s times a gradient starts: at the diagonal's term, 2B dL/dS_ii = -((1 - p_ii) + (1 - q_ii)) times the
    pair's other embedding. `in_place`, in the memory of that."""
    d_ND = partner_ND if in_place else partner_ND.new_empty(partner_ND.shape, dtype=dtype)
    for rows in row_chunks(*d_ND.shape):
        torch.mul(partner_ND[rows].to(dtype), minus_N1[rows], out=d_ND[rows])
    return d_ND
