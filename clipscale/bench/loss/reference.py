"""The truth in float64: the loss and its derivative in the scale exactly, the embeddings' gradients for some rows.

S = s I T^T never exists whole: panels of its rows pass by once, which gives every row's logsumexp and, online, every
column's. A pair's own logit is kept apart from the wrong pairs' (`clipscale/loss/statistics.py` has the identities), so
that nothing cancels near a loss of zero. Memory: 16 B D bytes for the operands, and a few panels.

Shapes: B pairs, D width, C rows of a panel, R sampled rows.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_PANEL_BYTES = 256 * 2**20


class Sampled(NamedTuple):
    """A result of the loss, true or measured, in float64 on the CPU."""

    loss: float
    d_image_RD: Tensor
    d_text_RD: Tensor
    d_scale: float | None
    """None: this contestant does not give it."""


def softmax_truth(image_BD: Tensor, text_BD: Tensor, scale: float, rows_R: Tensor) -> Sampled:
    """The symmetric contrastive loss (mean over 2B cross-entropies) and its true derivatives, sampled at `rows_R`."""
    image_BD, text_BD, rows_R = image_BD.double(), text_BD.double(), rows_R.to(image_BD.device)
    batch = len(image_BD)
    diag_B = scale * (image_BD * text_BD).sum(1)
    row_margin_B = torch.empty_like(diag_B)
    peak_B = torch.full_like(diag_B, -torch.inf)  # of each column's wrong pairs, so far
    total_B = torch.zeros_like(diag_B)  # and their sum of exp(S - peak),
    moment_B = torch.zeros_like(diag_B)  # and of exp(S - peak) (S - S_jj)
    d_scale = diag_B.new_zeros(())
    for rows, cosines_CB in _panels(image_BD, text_BD):
        logits_CB = cosines_CB.mul_(scale)
        own_C = logits_CB.diagonal(rows.start)
        own_C.fill_(-torch.inf)
        row_peak_C, new_peak_B = logits_CB.amax(1), torch.maximum(peak_B, logits_CB.amax(0))
        shift_B = new_peak_B.masked_fill(new_peak_B == -torch.inf, 0.0)  # no wrong pair yet: exp gives 0, not NaN
        by_row_CB = (logits_CB - row_peak_C[:, None]).exp_()
        by_column_CB = (logits_CB - shift_B).exp_()
        own_C.zero_()  # its weight is 0 by now: any finite number will do
        row_total_C = by_row_CB.sum(1)
        row_margin_B[rows] = row_peak_C + row_total_C.log() - diag_B[rows]
        p_wrong_C = row_margin_B[rows].sigmoid()
        row_moment_C = by_row_CB.mul_(logits_CB - diag_B[rows, None]).sum(1)
        d_scale += (p_wrong_C * row_moment_C / row_total_C).sum()
        shrink_B = (peak_B - shift_B).exp()
        total_B = total_B * shrink_B + by_column_CB.sum(0)
        moment_B = moment_B * shrink_B + by_column_CB.mul_(logits_CB - diag_B).sum(0)
        peak_B = new_peak_B
    column_margin_B = peak_B + total_B.log() - diag_B
    d_scale += (column_margin_B.sigmoid() * moment_B / total_B).sum()
    loss = (_softplus(row_margin_B) + _softplus(column_margin_B)).mean() / 2

    lse = [diag_B + _softplus(margin_B) for margin_B in (row_margin_B, column_margin_B)]
    missing_R = (row_margin_B.sigmoid() + column_margin_B.sigmoid())[rows_R]
    factor = scale / (2 * batch)
    sides = []
    for own_BD, other_BD, own_lse, other_lse in ((image_BD, text_BD, *lse), (text_BD, image_BD, *lse[::-1])):
        d_own_RD = -missing_R[:, None] * other_BD[rows_R]
        for columns, cosines_RC in _columns(own_BD[rows_R], other_BD):
            logits_RC = cosines_RC.mul_(scale)
            g_RC = (logits_RC - own_lse[rows_R, None]).exp() + (logits_RC - other_lse[columns]).exp()
            g_RC[rows_R[:, None] == torch.arange(columns.start, columns.stop, device=g_RC.device)] = 0.0
            d_own_RD += g_RC @ other_BD[columns]
        sides.append((factor * d_own_RD).cpu())
    return Sampled(loss.item(), *sides, (d_scale / (2 * batch * scale)).item())


def sigmoid_truth(image_BD: Tensor, text_BD: Tensor, scale: float, bias: float, rows_R: Tensor) -> Sampled:
    """The sigmoid loss, -1/B sum_ij log sigmoid(z_ij (s I_i T_j + b)), z 1 for a pair and -1 else, sampled alike.

    Source: SigLIP, arXiv 2303.15343. The derivative in z's argument is (sigmoid(x_ij) - [i = j]) / B.
    """
    image_BD, text_BD, rows_R = image_BD.double(), text_BD.double(), rows_R.to(image_BD.device)
    batch = len(image_BD)
    cosine_B = (image_BD * text_BD).sum(1)
    loss, d_scale = -(scale * cosine_B + bias).sum(), -cosine_B.sum()
    for _, cosines_CB in _panels(image_BD, text_BD):
        logits_CB = scale * cosines_CB + bias
        loss += _softplus(logits_CB).sum()
        d_scale += logits_CB.sigmoid_().mul_(cosines_CB).sum()
    sides = []
    for own_BD, other_BD in ((image_BD, text_BD), (text_BD, image_BD)):
        d_own_RD = -other_BD[rows_R]
        for columns, cosines_RC in _columns(own_BD[rows_R], other_BD):
            d_own_RD += (scale * cosines_RC + bias).sigmoid_() @ other_BD[columns]
        sides.append((scale / batch * d_own_RD).cpu())
    return Sampled((loss / batch).item(), *sides, (d_scale / batch).item())


def errors(result: Sampled, truth: Sampled) -> dict[str, float | None]:
    """Relative to the truth; of the sampled gradients, Frobenius norms. None where the contestant gives nothing."""
    found = {"loss": abs(result.loss - truth.loss) / abs(truth.loss)}
    for side in ("d_image_RD", "d_text_RD"):
        got, true = getattr(result, side), getattr(truth, side)
        found[side.removesuffix("_RD")] = ((got - true).norm() / true.norm()).item()
    found["d_scale"] = None if result.d_scale is None else abs(result.d_scale - truth.d_scale) / abs(truth.d_scale)
    return found


def _softplus(x: Tensor) -> Tensor:
    """log(1 + exp x); torch's own drops what exp(-x) adds above x = 20, which float64 would keep."""
    return -F.logsigmoid(-x)


def _panels(image_BD: Tensor, text_BD: Tensor) -> Iterator[tuple[slice, Tensor]]:
    height = max(1, _PANEL_BYTES // (8 * len(text_BD)))
    for top in range(0, len(image_BD), height):
        rows = slice(top, min(top + height, len(image_BD)))
        yield rows, image_BD[rows] @ text_BD.T


def _columns(own_RD: Tensor, other_BD: Tensor) -> Iterator[tuple[slice, Tensor]]:
    width = max(1, _PANEL_BYTES // (8 * len(own_RD)))
    for left in range(0, len(other_BD), width):
        columns = slice(left, min(left + width, len(other_BD)))
        yield columns, own_RD @ other_BD[columns].T
