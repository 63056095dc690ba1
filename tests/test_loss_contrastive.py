"""The public doors of the loss in one process: autograd, arguments, errors.

Shapes: B pairs, D width.
"""

import subprocess
import sys

import pytest
import torch
from test_loss_tiles import assert_close, dense_results, make_pairs

from clipscale.loss import ContrastiveGrads, contrastive_grads, contrastive_loss, dense_contrastive_loss


def leaves(pairs=9, width=6, dtype=torch.float64):
    return [side_BD.to(dtype).requires_grad_() for side_BD in make_pairs(pairs, width)]


def test_gradients_pass_gradcheck():
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *inputs: 2 * contrastive_loss(*inputs, tile=4) ** 2, (*leaves(), scale))


def test_a_logit_scale_parameter_learns_as_in_the_dense_loss():
    """CLIP's own: the parameter is the logarithm, and embeddings come out of a module."""
    gradients = []
    for loss_fn in (contrastive_loss, dense_contrastive_loss):
        torch.manual_seed(0)
        tower = torch.nn.Linear(6, 4, dtype=torch.float64)
        log_scale = torch.nn.Parameter(torch.tensor(2.66, dtype=torch.float64))
        image_BD, text_BD = leaves()
        loss = loss_fn(tower(image_BD), tower(text_BD), log_scale.exp())
        gradients.append([loss.detach(), *torch.autograd.grad(loss, [tower.weight, image_BD, log_scale])])
    assert_close(*gradients, relative=1e-10)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_gradients_come_in_the_inputs_types_and_shapes(shape):
    image_BD, text_BD = leaves(dtype=torch.bfloat16)
    scale = torch.full(shape, 14.3, requires_grad=True)
    loss = contrastive_loss(image_BD, text_BD, scale)
    (1024 * loss).backward()
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    assert (image_BD.grad.dtype, text_BD.grad.dtype, scale.grad.dtype) == (
        torch.bfloat16,
        torch.bfloat16,
        torch.float32,
    )
    assert scale.grad.shape == shape
    _, d_image_BD, d_text_BD, d_scale = dense_results(image_BD.detach(), text_BD.detach(), scale.item())
    torch.testing.assert_close(image_BD.grad.double() / 1024, d_image_BD, rtol=1e-2, atol=1e-6)
    torch.testing.assert_close(text_BD.grad.double() / 1024, d_text_BD, rtol=1e-2, atol=1e-6)
    torch.testing.assert_close(scale.grad.double().squeeze() / 1024, d_scale, rtol=1e-5, atol=0)


def test_only_the_inputs_that_want_a_gradient_get_one():
    image_BD, text_BD = leaves()
    image_BD = image_BD.detach()
    contrastive_loss(image_BD, text_BD, 14.3).backward()
    assert image_BD.grad is None
    torch.testing.assert_close(text_BD.grad, dense_results(image_BD, text_BD.detach(), 14.3)[2], rtol=1e-10, atol=1e-14)


def test_double_backward_is_an_error():
    """At the first backward: a gradient penalty must not be taken for a constant."""
    image_BD, text_BD = leaves()
    loss = contrastive_loss(image_BD, text_BD, 14.3)
    with pytest.raises(RuntimeError, match="create_graph=True asks contrastive_loss for a second derivative"):
        torch.autograd.grad(loss, image_BD, create_graph=True)


def test_without_gradients_only_the_first_pass_runs(monkeypatch):
    image_BD, text_BD = leaves()
    expected = dense_contrastive_loss(image_BD, text_BD, 14.3).detach()
    monkeypatch.setattr("clipscale.loss.contrastive.ring_gradients", None)
    with torch.no_grad():
        loss = contrastive_loss(image_BD, text_BD, 14.3)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        contrastive_loss(image_BD.detach(), text_BD.detach(), 14.3), expected, rtol=1e-12, atol=0
    )


def test_contrastive_grads_builds_no_graph_and_leaves_its_inputs_alone():
    image_BD, text_BD = leaves()
    before = [image_BD.detach().clone(), text_BD.detach().clone()]
    grads = contrastive_grads(image_BD, text_BD, torch.tensor(14.3, requires_grad=True), tile=4)
    assert not any(value.requires_grad for value in grads if isinstance(value, torch.Tensor))
    assert grads.pairs == 9
    assert before[0].equal(image_BD)
    assert before[1].equal(text_BD)


def test_embeddings_may_be_views_of_any_stride():
    image_BD, text_BD = make_pairs(9, 6)
    strided = [side_BD.T.contiguous().T for side_BD in (image_BD, text_BD)]
    assert_close(contrastive_grads(*strided, 14.3)[:4], dense_results(image_BD, text_BD, 14.3), relative=1e-10)


def test_one_pair_is_always_right():
    grads = contrastive_grads(*make_pairs(1, 6), 100.0)
    assert grads == ContrastiveGrads(0.0, *grads[1:3], 0.0, 1, 1.0, 1.0)
    assert not grads.d_image_ND.any()
    assert not grads.d_text_ND.any()


def test_no_pair_gives_zeros():
    grads = contrastive_grads(torch.empty(0, 6), torch.empty(0, 6), 14.3)
    assert grads == ContrastiveGrads(0.0, *grads[1:3], 0.0, 0, 0.0, 0.0)
    assert grads.d_image_ND.shape == grads.d_text_ND.shape == (0, 6)


IMAGE, TEXT = make_pairs(4, 6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((IMAGE, TEXT[:3], 14.3), r"shape \[4, 6\] and text embeddings \[3, 6\].*pass row i of each for pair i"),
        ((IMAGE[0], TEXT[0], 14.3), r"shape \[6\].*must be \[pairs, width\]"),
        ((IMAGE, TEXT.to("meta"), 14.3), "on cpu and text embeddings on meta.*move one"),
        ((IMAGE.long(), TEXT, 14.3), r"torch.int64 \(image\).*convert them with .float\(\)"),
        ((IMAGE, TEXT, torch.ones(2)), r"logit_scale has shape \[2\]: it must be one number"),
        ((IMAGE, TEXT, 0.0), r"logit_scale is 0.0: .*pass the factor itself, logit_scale.exp\(\)"),
        ((IMAGE, TEXT, torch.tensor(-1.0)), "logit_scale is -1.0"),
        ((IMAGE, TEXT, float("inf")), "logit_scale is inf"),
        ((IMAGE, TEXT, float("nan")), "logit_scale is nan"),
    ],
)
@pytest.mark.parametrize("door", [contrastive_loss, contrastive_grads])
def test_arguments_that_do_not_fit(door, arguments, message):
    with pytest.raises(ValueError, match=message):
        door(*arguments)


def test_options_that_do_not_fit():
    with pytest.raises(
        ValueError, match="precision 'double' is unknown: choose one of auto, fp16, bf16, tf32, fp32, fp64"
    ):
        contrastive_grads(IMAGE, TEXT, 14.3, precision="double")
    with pytest.raises(ValueError, match="tile is 0: it must be at least 1"):
        contrastive_loss(IMAGE, TEXT, 14.3, tile=0)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("side", ["image", "text"])
def test_a_bad_embedding_is_named(side, value):
    sides = {"image": IMAGE.clone(), "text": TEXT.clone()}
    sides[side][2, 1] = float(value)
    with pytest.raises(ValueError, match=f"{side} embedding 2 of rank 0 holds {value}, not finite"):
        contrastive_loss(sides["image"], sides["text"], 14.3)


def test_an_infinity_that_leaves_the_loss_finite_is_found():
    """Its own pair's logit is inf and no other's: each softmax is certain, and right."""
    image_BD = torch.tensor([[float("inf"), 1.0], [0.0, 1.0]])
    text_BD = torch.tensor([[1.0, 0.0], [-1.0, 0.5]])
    with pytest.raises(ValueError, match="image embedding 0 of rank 0 holds inf"):
        contrastive_grads(image_BD, text_BD, 1.0)


def test_finite_embeddings_whose_logits_overflow_are_told_apart():
    with pytest.raises(ValueError, match="the logits overflow: normalise the embeddings"):
        contrastive_grads(IMAGE.float() * 1e20, TEXT.float() * 1e20, 14.3)


def test_the_package_needs_torch_only():
    code = "import sys, clipscale.loss; print(*{name.split('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"open_clip", "timm", "webdataset", "triton", "omegaconf", "torchvision"} & set(loaded)
