"""clipscale/bench/loss/reference.py against autograd through the whole matrix in float64, and the inputs it is given.

Shapes: B pairs, D width, R sampled rows.
"""

import pytest
import torch
import torch.nn.functional as F

from clipscale.bench.loss import reference
from clipscale.bench.loss.inputs import draw_pairs, sample_rows, split_rows
from clipscale.bench.loss.reference import Sampled, errors, sigmoid_truth, softmax_truth
from clipscale.loss import dense_contrastive_loss

CPU = torch.device("cpu")
WIDTH = 24


def pairs(batch, dtype=torch.float64):
    return draw_pairs(range(batch), WIDTH, seed=3, device=CPU, dtype=dtype)


def by_autograd(loss_fn, image_BD, text_BD, scale, rows_R):
    """As `Sampled`, with d_scale."""
    leaves = [
        torch.as_tensor(value, dtype=torch.float64).clone().requires_grad_() for value in (image_BD, text_BD, scale)
    ]
    loss = loss_fn(*leaves)
    d_image_BD, d_text_BD, d_scale = torch.autograd.grad(loss, leaves)
    return Sampled(loss.item(), d_image_BD[rows_R], d_text_BD[rows_R], d_scale.item())


def stable_dense_loss(image_BD, text_BD, scale):
    """The dense loss with the diagonal apart: exact near a loss of zero as well."""
    logits_BB = scale * (image_BD @ text_BD.T)
    wrong_BB = logits_BB.masked_fill(torch.eye(len(logits_BB), dtype=torch.bool), -torch.inf)
    return sum(-F.logsigmoid(logits_BB.diagonal() - wrong_BB.logsumexp(dim)).mean() for dim in (0, 1)) / 2


def dense_sigmoid_loss(image_BD, text_BD, scale, bias=-10.0):
    signs_BB = 2 * torch.eye(len(image_BD), dtype=torch.float64) - 1
    return -F.logsigmoid(signs_BB * (scale * (image_BD @ text_BD.T) + bias)).sum() / len(image_BD)


def assert_equal(found, expected, tolerance):
    assert all(error <= tolerance for error in errors(found, expected).values()), errors(found, expected)


@pytest.mark.parametrize("panel_bytes", [1, 5000, 2**27])
@pytest.mark.parametrize("batch", [2, 3, 70, 300])
def test_the_contrastive_truth_is_autograds(monkeypatch, batch, panel_bytes):
    monkeypatch.setattr(reference, "_PANEL_BYTES", panel_bytes)
    image_BD, text_BD = pairs(batch)
    rows_R = sample_rows(batch, 16, seed=1)
    found = softmax_truth(image_BD, text_BD, 14.3, rows_R)
    assert_equal(found, by_autograd(dense_contrastive_loss, image_BD, text_BD, 14.3, rows_R), 1e-12)


@pytest.mark.parametrize("scale", [1.0, 100.0, 400.0])
def test_the_contrastive_truth_holds_near_a_loss_of_zero(monkeypatch, scale):
    monkeypatch.setattr(reference, "_PANEL_BYTES", 5000)
    image_BD, text_BD = pairs(70)
    rows_R = sample_rows(70, 70, seed=1)
    expected = by_autograd(stable_dense_loss, image_BD, text_BD, scale, rows_R)
    assert_equal(softmax_truth(image_BD, text_BD, scale, rows_R), expected, 1e-11)


@pytest.mark.parametrize("panel_bytes", [5000, 2**27])
def test_the_sigmoid_truth_is_autograds(monkeypatch, panel_bytes):
    monkeypatch.setattr(reference, "_PANEL_BYTES", panel_bytes)
    image_BD, text_BD = pairs(300)
    rows_R = sample_rows(300, 16, seed=1)
    found = sigmoid_truth(image_BD, text_BD, 14.3, -10.0, rows_R)
    assert_equal(found, by_autograd(dense_sigmoid_loss, image_BD, text_BD, 14.3, rows_R), 1e-12)


def test_the_truth_takes_the_inputs_as_they_are_rounded():
    halves = pairs(70, torch.float16)
    rows_R = sample_rows(70, 16, seed=1)
    assert_equal(
        softmax_truth(*halves, 14.3, rows_R),
        by_autograd(dense_contrastive_loss, *halves, 14.3, rows_R),
        1e-12,
    )


def test_a_wrong_gradient_shows():
    """Of one row in 16, of the other tower, of the scale, and of the loss: each in its own figure."""
    image_BD, text_BD = pairs(70)
    rows_R = sample_rows(70, 16, seed=1)
    truth = softmax_truth(image_BD, text_BD, 14.3, rows_R)
    nothing = {"loss": 0, "d_image": 0, "d_text": 0, "d_scale": 0}
    assert errors(truth, truth) == nothing
    one_row = truth.d_image_RD.clone()
    one_row[5] = 0.0
    assert errors(truth._replace(d_image_RD=one_row), truth)["d_image"] > 0.05
    assert errors(truth._replace(d_text_RD=2 * truth.d_text_RD), truth) == nothing | {"d_text": 1.0}
    assert errors(truth._replace(d_scale=1.5 * truth.d_scale), truth)["d_scale"] == pytest.approx(0.5)
    assert errors(truth._replace(loss=0.9 * truth.loss), truth)["loss"] == pytest.approx(0.1)
    assert errors(truth._replace(d_scale=None), truth) == nothing | {"d_scale": None}
    without_diagonal = softmax_truth(image_BD, text_BD.roll(1, 0), 14.3, rows_R)  # the wrong texts as the right ones
    assert min(errors(without_diagonal, truth).values()) > 0.05


def test_any_part_of_a_batch_can_be_drawn_alone(monkeypatch):
    monkeypatch.setattr("clipscale.bench.loss.inputs._CHUNK", 16)
    whole = pairs(50)
    for rows in (range(0, 50), range(0, 1), range(15, 17), range(16, 32), range(33, 50)):
        for part, side in zip(draw_pairs(rows, WIDTH, seed=3, device=CPU, dtype=torch.float64), whole, strict=True):
            assert part.equal(side[rows.start : rows.stop])
    other = draw_pairs(range(50), WIDTH, seed=4, device=CPU, dtype=torch.float64)
    assert not other[0].equal(whole[0])


def test_inputs_are_as_they_are_described():
    image_BD, text_BD = draw_pairs(range(500), 768, seed=0, device=CPU, dtype=torch.float64)
    torch.testing.assert_close(image_BD.norm(dim=1), torch.ones(500, dtype=torch.float64), rtol=1e-6, atol=0)
    cosines_BB = image_BD @ text_BD.T
    assert cosines_BB.diagonal().mean() == pytest.approx(0.72, abs=0.01)
    assert (cosines_BB.sum() - cosines_BB.trace()) / (500 * 499) == pytest.approx(0.14, abs=0.01)


@pytest.mark.parametrize(("batch", "ranks"), [(7, 3), (8, 4), (5, 5), (101, 2)])
def test_rows_are_split_evenly(batch, ranks):
    parts = split_rows(batch, ranks)
    assert [row for part in parts for row in part] == [*range(batch)]
    assert {len(part) for part in parts} <= {batch // ranks, -(-batch // ranks)}


def test_sampled_rows_are_sorted_and_each_once():
    rows_R = sample_rows(1000, 64, seed=0)
    assert len(rows_R.unique()) == 64
    assert rows_R.equal(rows_R.sort().values)
    assert sample_rows(10, 64, seed=0).tolist() == [*range(10)]
