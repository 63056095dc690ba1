"""The statistics of rows of the similarities: merged in any order, and what is made of them, against whole rows.

Shapes: R rows, N columns. Column i of row i is its right pair, -inf stands for a column that was not seen.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clipscale.loss.statistics import Partial

ROWS = 4
SIMILARITIES = st.sampled_from([-torch.inf, -500.0, -1.0, -1e-9, 0.0, 0.25, 0.25 + 1e-12, 1.0, 3.0, 500.0])
COLUMNS = st.lists(st.lists(SIMILARITIES, min_size=ROWS, max_size=ROWS), min_size=ROWS, max_size=9)


def seen(x_R: torch.Tensor, column: int) -> Partial:
    """The statistics of one column alone."""
    wrong_R = x_R.masked_fill(torch.arange(len(x_R)) == column, -torch.inf)
    diag_R = torch.where(torch.arange(len(x_R)) == column, x_R, 0.0)
    return Partial(wrong_R, (wrong_R > -torch.inf).to(x_R), diag_R)


def merged_as_a_tree(parts: list[Partial], scale: float, draw) -> Partial:
    """Neighbours merged in an order that is drawn."""
    while len(parts) > 1:
        at = draw(st.integers(0, len(parts) - 2))
        parts[at : at + 2] = [parts[at].merge(parts[at + 1], scale)]
    return parts[0]


@settings(max_examples=100, deadline=None)
@given(columns=COLUMNS, scale=st.sampled_from([1e-3, 1.0, 14.3, 100.0]), data=st.data())
def test_any_order_of_merging_gives_the_whole_row(columns, scale, data):
    """Values that are -inf, ordinary, equal, nearly so and far apart."""
    x_RN = torch.tensor(columns, dtype=torch.float64).T
    x_RN.diagonal().nan_to_num_(neginf=-2.0)  # a right pair has a finite similarity
    order = data.draw(st.permutations(range(x_RN.shape[1])))
    partial = merged_as_a_tree([seen(x_RN[:, j], j) for j in order], scale, data.draw)
    partial = Partial.empty(ROWS, x_RN).merge(partial, scale).merge(Partial.empty(ROWS, x_RN), scale)

    wrong_RN = x_RN.clone().fill_diagonal_(-torch.inf)
    assert partial.diag.equal(x_RN.diagonal())
    assert partial.max.equal(wrong_RN.amax(1))
    assert partial.correct().equal(x_RN.diagonal() > wrong_RN.amax(1))
    exact = {"rtol": 2e-11, "atol": 0}  # 16 digits of logits up to 1e5
    lse_R = scale * partial.max + partial.sum.log()
    torch.testing.assert_close(lse_R, (scale * wrong_RN).logsumexp(1), rtol=2e-11, atol=1e-15)  # it may be near 0
    margin_R = (scale * (wrong_RN - x_RN.diagonal()[:, None])).logsumexp(1)
    torch.testing.assert_close(partial.loss(scale), margin_R.logaddexp(torch.zeros_like(margin_R)), **exact)
    softmax = partial.softmax(scale)
    p_RN = (scale * x_RN).softmax(1)
    found_RN = (scale * (x_RN - softmax.peak[:, None])).exp() * softmax.inverse[:, None]
    torch.testing.assert_close(found_RN, p_RN, rtol=2e-11, atol=1e-300)
    torch.testing.assert_close(softmax.missing, margin_R.sigmoid(), **exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-3, 100.0])
def test_a_row_without_a_wrong_pair_is_certain(dtype, scale):
    """A batch of one pair; and a rank's rows before the first block."""
    diag_R = torch.tensor([-3.0, 0.0, 1.0, 500.0], dtype=dtype)
    partial = Partial.empty(4, diag_R)._replace(diag=diag_R)
    assert not partial.loss(scale).any()
    assert partial.correct().all()
    softmax = partial.softmax(scale)
    assert softmax.peak.equal(diag_R)
    assert softmax.inverse.eq(1).all()
    assert not softmax.missing.any()


def test_a_tiny_loss_keeps_its_digits():
    """Where log(sum_j exp S_ij) - S_ii and 1 - p_ii would be 0 to the last bit."""
    diag_R = torch.tensor([1.0], dtype=torch.float32)
    for gap in (0.1, 0.5, 0.8):
        partial = Partial(diag_R - gap, torch.full((1,), 7.0), diag_R)
        expected = 7 * torch.exp(-100 * (diag_R - (diag_R - gap)).double())  # log(1 + x) to first order
        torch.testing.assert_close(partial.loss(100.0).double(), expected.log1p(), rtol=1e-5, atol=0)
        torch.testing.assert_close(
            partial.softmax(100.0).missing.double(), expected / (1 + expected), rtol=1e-5, atol=0
        )
