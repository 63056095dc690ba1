"""The statistics of rows of the similarities: merging, and what is made of them.

Shapes: R rows, N columns.
"""

import torch

from clipscale.loss.statistics import Partial


def test_partials_merge_whatever_has_been_seen():
    """Values -inf, ordinary and far apart: column after column, the merged sum is that of the whole row."""
    x_RN = torch.tensor([[-500.0, 500.0, 1.0], [-torch.inf, 3.0, 4.0], [-torch.inf] * 3], dtype=torch.float64)
    merged = Partial.empty(3, x_RN)
    for x_R in x_RN.T:
        nothing_R = torch.zeros_like(x_R)
        merged = merged.merge(Partial(x_R, x_R.isfinite().double(), nothing_R, nothing_R), 1.0)
    torch.testing.assert_close(merged.max + merged.sum.log(), x_RN.logsumexp(1), rtol=1e-14, atol=0)
