"""What pass 1 learns of each row (or each column) of the logits, and what pass 2 needs of it. Both engines speak this.

X = image text^T are the similarities and S = s X the logits. Everything is kept in X, the scale s apart: S would round
a logit of 100 by 4e-6, and differences of similarities are nearly free of rounding. The diagonal X_ii, a pair's own
similarity, is kept apart from the X_ij of the wrong pairs until nothing can cancel: near a loss of zero,
log(sum_j exp S_ij) - S_ii and p_ii - 1 would be nothing.

Shapes: every tensor has one value per row of its block, in the accumulator's type.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Softmax(NamedTuple):
    """What pass 2 needs to know of each row: p_ij = exp(s (X_ij - peak_i)) inverse_i."""

    peak: Tensor
    """Largest similarity, the right pair's included."""
    inverse: Tensor
    """1 / sum_j exp(s (X_ij - peak_i)), over all pairs: between 1/B and 1."""
    missing: Tensor
    """1 - p_ii."""


class Partial(NamedTuple):
    """What is known of each row after some of its entries. w_ij = exp(s (X_ij - max_i)) weighs a wrong pair."""

    max: Tensor
    """Largest X_ij of the wrong pairs seen; -inf before the first."""
    sum: Tensor
    """sum of w_ij over the wrong pairs seen."""
    diag: Tensor
    """X_ii, once the right pair has been seen; 0 before."""

    @classmethod
    def empty(cls, rows: int, like: Tensor) -> "Partial":
        """Each value in memory of its own: a row of a shared one begins at an alignment that depends on `rows`, for
        which Triton compiles again."""
        return cls(like.new_full((rows,), -torch.inf), like.new_zeros(rows), like.new_zeros(rows))

    def merge(self, other: "Partial", scale: float) -> "Partial":
        """Both together, where no entry was seen by both."""
        peak = torch.maximum(self.max, other.max)
        base = peak.masked_fill(peak == -torch.inf, 0.0)  # -inf: nothing seen, and its sum is 0
        total = sum(part.sum * (scale * (part.max - base)).exp() for part in (self, other))
        return Partial(peak, total, self.diag + other.diag)

    def margin(self, scale: float) -> Tensor:
        """log of the odds against the right pair, log(sum_{j!=i} exp S_ij) - S_ii; -inf where there is no wrong pair.

        loss_i = log(1 + exp(margin_i)), and 1 - p_ii = sigmoid(margin_i): neither cancels, however small.
        """
        return scale * (self.max - self.diag) + self.sum.log()

    def loss(self, scale: float) -> Tensor:
        return -F.logsigmoid(-self.margin(scale))

    def correct(self) -> Tensor:
        """Whether the right pair beats every wrong one (a tie is a miss)."""
        return self.diag > self.max

    def softmax(self, scale: float) -> Softmax:
        peak = torch.maximum(self.max, self.diag)
        total = self.sum * (scale * (self.max - peak)).exp() + (scale * (self.diag - peak)).exp()
        return Softmax(peak, total.reciprocal(), self.margin(scale).sigmoid())
