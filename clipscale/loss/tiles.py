"""One block of the logits, tile by tile, in plain torch: what `ring.py` stands on where there is no Triton.

    rows, columns = logsumexp_block(image_MD, text_ND, s, diagonal=True, precision="fp32")     # pass 1
    d_scale = gradient_block(                                                                  # pass 2
        image_MD, text_ND, s, rows.softmax(s), columns.softmax(s), d_image_MD, d_text_ND,
        origin=rows.diag.mean().item(), lift=1.0, diagonal=True, precision="fp32",
    )

Each visit of a tile serves both directions, and no more than tile x tile logits exist at a time (tiling: Inf-CL,
arXiv 2410.17243). `kernels.py` has the same two functions in Triton; X, S and s are those of `statistics.py`.

Shapes: M image rows and N text rows of the block, D width, T and U rows and columns of a tile.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from clipscale.loss.precision import accumulator_dtype, exact_products, round_operand
from clipscale.loss.statistics import Partial, Softmax

DEFAULT_TILE = 1024

CHUNK_ELEMENTS = 1 << 22
"""What is done row by row outside the tiles is done for so many elements at a time: no temporary grows with N."""


def logsumexp_block(
    image_MD: Tensor,
    text_ND: Tensor,
    logit_scale: float,
    *,
    diagonal: bool,
    precision: str,
    tile: int | None = None,
) -> tuple[Partial, Partial]:
    """Pass 1 over one block: what it contributes to its rows (M values each) and to its columns (N values each).

    `diagonal` says that row i pairs with column i (then M = N); otherwise the block holds wrong pairs only.
    """
    like = image_MD.new_empty(0, dtype=accumulator_dtype(precision))
    rows, columns = Partial.empty(len(image_MD), like), Partial.empty(len(text_ND), like)
    with exact_products(precision, image_MD.device):
        for row_slice, column_slice in tiles_of(len(image_MD), len(text_ND), tile or DEFAULT_TILE):
            image_TD = round_operand(image_MD[row_slice], precision)
            text_UD = round_operand(text_ND[column_slice], precision)
            x_TU = image_TD @ text_UD.T
            if diagonal and row_slice == column_slice:
                rows.diag[row_slice] = columns.diag[column_slice] = x_TU.diagonal()
                x_TU.fill_diagonal_(-torch.inf)
            _fold(rows, row_slice, x_TU, logit_scale)
            _fold(columns, column_slice, x_TU.T, logit_scale)
    return rows, columns


def gradient_block(
    image_MD: Tensor,
    text_ND: Tensor,
    logit_scale: float,
    rows: Softmax,
    columns: Softmax,
    d_image_MD: Tensor | None,
    d_text_ND: Tensor | None,
    *,
    origin: float,
    lift: float,
    diagonal: bool,
    precision: str,
    tile: int | None = None,
) -> Tensor:
    """Pass 2 over one block: add what its wrong pairs contribute to 2B/s dL/dimage and 2B/s dL/dtext, in place.

    With p_ij the softmax over the row's texts and q_ij over the column's images, 2B dL/dS_ij = G_ij = p_ij + q_ij off
    the diagonal. The diagonal's own term, -((1 - p_ii) + (1 - q_ii)), is the caller's: rounded to half precision in
    here, it would lose the gradient when the loss is low.

    G is multiplied by `lift` before it is rounded to the operands' type (`precision.gradient_lift`). The gradients are
    in the accumulator's type; a side that is None is not computed. Returns what the wrong pairs contribute to 2B dL/ds:
    sum_ij G_ij (X_ij - origin), [] in float64. Without the diagonal's term G does not sum to 0, so the caller needs it
    about the same `origin`; one amid the similarities keeps the two from cancelling.
    """
    d_scale = image_MD.new_zeros((), dtype=torch.float64)
    with exact_products(precision, image_MD.device):
        for row_slice, column_slice in tiles_of(len(image_MD), len(text_ND), tile or DEFAULT_TILE):
            image_TD = round_operand(image_MD[row_slice], precision)
            text_UD = round_operand(text_ND[column_slice], precision)
            x_TU = image_TD @ text_UD.T
            p_TU = (x_TU - rows.peak[row_slice, None]).mul_(logit_scale).exp_().mul_(rows.inverse[row_slice, None])
            q_TU = (x_TU - columns.peak[column_slice]).mul_(logit_scale).exp_().mul_(columns.inverse[column_slice])
            g_TU = p_TU.add_(q_TU)
            if diagonal and row_slice == column_slice:
                g_TU.fill_diagonal_(0.0)
            d_scale += x_TU.sub_(origin).mul_(g_TU).sum(dtype=torch.float64)
            g_TU = round_operand(g_TU.mul_(lift), precision)
            if d_image_MD is not None:
                d_image_MD[row_slice].addmm_(g_TU, text_UD, alpha=1 / lift)
            if d_text_ND is not None:
                d_text_ND[column_slice].addmm_(g_TU.T, image_TD, alpha=1 / lift)
    return d_scale


def tiles_of(rows: int, columns: int, tile: int) -> Iterator[tuple[slice, slice]]:
    """The tiles of a block: slices of its rows and columns, at most `tile` long."""
    for top in range(0, rows, tile):
        for left in range(0, columns, tile):
            yield slice(top, min(top + tile, rows)), slice(left, min(left + tile, columns))


def row_chunks(rows: int, width: int) -> Iterator[slice]:
    """Slices of `rows` rows, each of at most CHUNK_ELEMENTS elements, or of one row."""
    step = max(1, CHUNK_ELEMENTS // max(1, width))
    return (slice(start, start + step) for start in range(0, rows, step))


def _fold(partial: Partial, where: slice, x_TU: Tensor, scale: float) -> None:
    """Merge the tile's rows into `partial[where]`; its diagonal, if it has one, is -inf and counts as unseen."""
    peak_T = x_TU.amax(dim=1)
    base_T = peak_T.masked_fill(peak_T == -torch.inf, 0.0)
    total_T = (x_TU - base_T[:, None]).mul_(scale).exp_().sum(dim=1)
    before = Partial(*(field[where] for field in partial))
    merged = before.merge(Partial(peak_T, total_T, torch.zeros_like(peak_T)), scale)
    partial.max[where], partial.sum[where] = merged.max, merged.sum
