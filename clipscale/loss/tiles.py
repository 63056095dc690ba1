"""One block of the logit matrix, tile by tile, in plain torch: the floor that `ring.py` stands on.

    rows, columns = logsumexp_block(image_MD, text_ND, s, diagonal=True, precision="fp32")     # pass 1
    d_text_ND, d_scale = gradient_block(                                                       # pass 2
        image_MD, text_ND, s, rows.softmax(), columns.softmax(), d_image_MD, diagonal=True, precision="fp32"
    )

Each visit of a tile serves both directions, and no more than tile x tile logits exist at a time (tiling: Inf-CL,
arXiv 2410.17243). S = s image text^T. The diagonal S_ii, a pair's own logit, is kept apart from the logits S_ij of
the wrong pairs throughout: near a loss of zero, log(sum_j exp S_ij) - S_ii and p_ii - 1 would cancel to nothing.

Shapes: M image rows and N text rows of the block, D width, T and U rows and columns of a tile.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from clipscale.loss.precision import exact_products, gradient_scale, round_operand

DEFAULT_TILE = 1024


class Softmax(NamedTuple):
    """What pass 2 needs to know of each row (or each column) of S: p_ij = exp(S_ij - peak_i - log_sum_i).

    The logsumexp, peak + log_sum, stays in two parts: as one number it would be rounded at the size of the logits.
    """

    peak: Tensor
    """Largest logit, the right pair's included."""
    log_sum: Tensor
    """log of the sum of exp(S_ij - peak_i) over all pairs: between 0 and log B."""
    diag: Tensor
    """S_ii."""


class Partial(NamedTuple):
    """What is known of each row (or each column) of S after some of its entries: one value per row in each tensor."""

    max: Tensor
    """Largest S_ij of the wrong pairs seen; -inf before the first."""
    sum: Tensor
    """sum of exp(S_ij - max) over the wrong pairs seen."""
    diag: Tensor
    """S_ii, once the right pair has been seen; 0 before."""

    @classmethod
    def empty(cls, rows: int, like: Tensor) -> "Partial":
        return cls(like.new_full((rows,), -torch.inf), like.new_zeros(rows), like.new_zeros(rows))

    def merge(self, other: "Partial") -> "Partial":
        """Both together, where no entry was seen by both."""
        peak = torch.maximum(self.max, other.max)
        shift = _finite_peak(peak)
        total = self.sum * (self.max - shift).exp() + other.sum * (other.max - shift).exp()
        return Partial(peak, total, self.diag + other.diag)

    def margin(self) -> Tensor:
        """log of the odds against the right pair, log(sum_{j!=i} exp S_ij) - S_ii; -inf where there is no wrong pair.

        loss_i = log(1 + exp(margin_i)), and 1 - p_ii = sigmoid(margin_i): neither cancels, however small.
        """
        return (self.max - self.diag) + self.sum.log()

    def loss(self) -> Tensor:
        return -F.logsigmoid(-self.margin())

    def correct(self) -> Tensor:
        """Whether the right pair beats every wrong one (a tie is a miss)."""
        return self.diag > self.max

    def softmax(self) -> Softmax:
        peak = torch.maximum(self.max, self.diag)
        log_sum = (self.sum * (self.max - peak).exp() + (self.diag - peak).exp()).log()
        return Softmax(peak, log_sum, self.diag)


def logsumexp_block(
    image_MD: Tensor,
    text_ND: Tensor,
    logit_scale: float,
    *,
    diagonal: bool,
    precision: str,
    tile: int = DEFAULT_TILE,
) -> tuple[Partial, Partial]:
    """Pass 1 over one block: what it contributes to its rows (M values each) and to its columns (N values each).

    `diagonal` says that row i pairs with column i (then M = N); otherwise the block holds wrong pairs only.
    """
    image_MD, text_ND = round_operand(image_MD, precision), round_operand(text_ND, precision)
    rows = Partial.empty(len(image_MD), image_MD)
    columns = Partial.empty(len(text_ND), text_ND)
    with exact_products(precision, image_MD.device):
        for row_slice, column_slice in _tiles(len(image_MD), len(text_ND), tile):
            logits_TU = logit_scale * (image_MD[row_slice] @ text_ND[column_slice].T)
            if diagonal and row_slice == column_slice:
                rows.diag[row_slice] = columns.diag[column_slice] = logits_TU.diagonal()
                logits_TU.fill_diagonal_(-torch.inf)
            _fold(rows, row_slice, logits_TU)
            _fold(columns, column_slice, logits_TU.T)
    return rows, columns


def gradient_block(
    image_MD: Tensor,
    text_ND: Tensor,
    logit_scale: float,
    rows: Softmax,
    columns: Softmax,
    d_image_MD: Tensor,
    *,
    diagonal: bool,
    precision: str,
    tile: int = DEFAULT_TILE,
) -> tuple[Tensor, Tensor]:
    """Pass 2 over one block: what its wrong pairs contribute to 2B/s dL/dimage, 2B/s dL/dtext and 2B s dL/ds.

    With p_ij the softmax over the row's texts and q_ij over the column's images, 2B dL/dS_ij = G_ij = p_ij + q_ij off
    the diagonal. The diagonal's own term, -((1 - p_ii) + (1 - q_ii)), is the caller's: rounded to half precision in
    here, it would lose the gradient when the loss is low.

    For the scale, 2B s dL/ds = sum_ij 2B dL/dS_ij S_ij, in which an offset common to a row's logits cancels only in
    exact arithmetic. With p_ii - 1 = -sum_{j!=i} p_ij (and q alike) the offset is gone before anything is summed:

        2B s dL/ds = sum_{i!=j} p_ij (S_ij - S_ii) + q_ij (S_ij - S_jj)

    d_image is added to `d_image_MD`, in place. Returns d_text [N, D], like it in the accumulator's type, and d_scale []
    in float64.
    """
    image_MD, text_ND = round_operand(image_MD, precision), round_operand(text_ND, precision)
    d_text_ND = torch.zeros_like(text_ND)
    d_scale = image_MD.new_zeros((), dtype=torch.float64)
    lift = gradient_scale(precision)
    with exact_products(precision, image_MD.device):
        for row_slice, column_slice in _tiles(len(image_MD), len(text_ND), tile):
            image_TD, text_UD = image_MD[row_slice], text_ND[column_slice]
            logits_TU = logit_scale * (image_TD @ text_UD.T)
            p_TU = (logits_TU - rows.peak[row_slice, None]).sub_(rows.log_sum[row_slice, None]).exp_()
            q_TU = (logits_TU - columns.peak[column_slice]).sub_(columns.log_sum[column_slice]).exp_()
            if diagonal and row_slice == column_slice:
                p_TU.fill_diagonal_(0.0)
                q_TU.fill_diagonal_(0.0)
            d_scale += (p_TU * (logits_TU - rows.diag[row_slice, None])).sum(dtype=torch.float64)
            d_scale += (q_TU * (logits_TU - columns.diag[column_slice])).sum(dtype=torch.float64)
            g_TU = round_operand(p_TU.add_(q_TU).mul_(lift), precision)
            d_image_MD[row_slice].addmm_(g_TU, text_UD, alpha=1 / lift)
            d_text_ND[column_slice].addmm_(g_TU.T, image_TD, alpha=1 / lift)
    return d_text_ND, d_scale


def _tiles(rows: int, columns: int, tile: int) -> Iterator[tuple[slice, slice]]:
    for top in range(0, rows, tile):
        for left in range(0, columns, tile):
            yield slice(top, min(top + tile, rows)), slice(left, min(left + tile, columns))


def _fold(partial: Partial, where: slice, logits_TU: Tensor) -> None:
    """Merge the tile's rows into `partial[where]`; its diagonal, if it has one, is -inf and counts as unseen."""
    peak_T = logits_TU.amax(dim=1)
    total_T = (logits_TU - _finite_peak(peak_T)[:, None]).exp_().sum(dim=1)
    before = Partial(partial.max[where], partial.sum[where], partial.diag[where])
    merged = before.merge(Partial(peak_T, total_T, torch.zeros_like(peak_T)))
    partial.max[where], partial.sum[where] = merged.max, merged.sum


def _finite_peak(peak: Tensor) -> Tensor:
    """`peak` with 0 for -inf (nothing seen), so that exp(-inf - peak) is 0 rather than NaN."""
    return peak.masked_fill(peak == -torch.inf, 0.0)
