"""The public doors of the loss in one process: autograd, arguments, errors.

Shapes: B pairs, D width.
"""

import itertools
import subprocess
import sys

import pytest
import torch
from test_loss_tiles import LiveTensors, assert_close, dense_results, make_pairs
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode, mm_flop

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


def count_flops():
    """Of matrix products; in-place ones are not in torch's own table."""
    in_place = {torch.ops.aten.addmm_: lambda total, left, right, **_: mm_flop(left, right)}
    return FlopCounterMode(display=False, custom_mapping=in_place)


SIDES = list(itertools.product([True, False], repeat=3))[:-1]


@pytest.mark.parametrize("wanted", SIDES)
def test_only_the_inputs_that_want_a_gradient_get_one(wanted):
    """The same bits as with all of them."""
    pairs = make_pairs(9, 6)
    gradients = []
    for some in ((True, True, True), wanted):
        inputs = [*pairs, torch.tensor(14.3).double()]
        inputs = [value.clone().requires_grad_(wants) for value, wants in zip(inputs, some, strict=True)]
        contrastive_loss(*inputs, tile=4).backward()
        gradients.append([value.grad for value in inputs])
    for every, found, wants in zip(*gradients, wanted, strict=True):
        assert found.equal(every) if wants else found is None


@pytest.mark.parametrize("wanted", SIDES)
def test_a_locked_side_is_not_computed(wanted):
    """In units of B^2 D: two for pass 1; in pass 2 two for the logits, and two a side."""
    pairs, width = 64, 32
    image_BD, text_BD = make_pairs(pairs, width)
    sides = dict(zip(("image_grad", "text_grad", "scale_grad"), wanted, strict=True))
    with count_flops() as flops:
        grads = contrastive_grads(image_BD, text_BD, 14.3, tile=16, **sides)
    assert flops.get_total_flops() == (2 + 2 + 2 * sum(wanted[:2])) * pairs**2 * width
    every = contrastive_grads(image_BD, text_BD, 14.3, tile=16)
    for name, wants in zip(("d_image_ND", "d_text_ND", "d_logit_scale"), wanted, strict=True):
        assert getattr(grads, name).equal(getattr(every, name)) if wants else getattr(grads, name) is None
    assert (grads.loss, grads.image_accuracy) == (every.loss, every.image_accuracy)


def test_backward_makes_its_results_only_and_may_run_again():
    image_BD, text_BD = leaves(64, 64, dtype=torch.float32)
    loss = contrastive_loss(image_BD, text_BD, 14.3)
    with LiveTensors(image_BD, text_BD) as live:
        once = torch.autograd.grad(3 * loss, [image_BD, text_BD], retain_graph=True)
    assert live.peak_bytes < 2.1 * image_BD.nbytes
    again = torch.autograd.grad(loss, [image_BD, text_BD], grad_outputs=torch.tensor(3.0))
    assert all(a.equal(b) for a, b in zip(once, again, strict=True))


def test_double_backward_is_an_error():
    """At the first backward: a gradient penalty must not be taken for a constant."""
    image_BD, text_BD = leaves()
    loss = contrastive_loss(image_BD, text_BD, 14.3)
    with pytest.raises(RuntimeError, match="create_graph=True asks contrastive_loss for a second derivative"):
        torch.autograd.grad(loss, image_BD, create_graph=True)


def test_without_gradients_only_the_first_pass_runs():
    image_BD, text_BD = leaves()
    expected = dense_contrastive_loss(image_BD, text_BD, 14.3).detach()
    with torch.no_grad(), count_flops() as flops:
        loss = contrastive_loss(image_BD, text_BD, 14.3)
    assert flops.get_total_flops() == 2 * 9**2 * 6
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    assert contrastive_loss(image_BD.detach(), text_BD.detach(), 14.3).equal(loss)


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
        ((IMAGE.to("meta"), TEXT.to("meta"), 14.3), "on meta: the loss runs on cpu and cuda; .*make them there"),
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
    with pytest.raises(ValueError, match="tile is 0: it must be at least 1; leave it out for the engine's own"):
        contrastive_loss(IMAGE, TEXT, 14.3, tile=0)
    with pytest.raises(ValueError, match="engine 'cuda' is unknown: choose one of auto, triton, torch"):
        contrastive_loss(IMAGE, TEXT, 14.3, engine="cuda")
    with pytest.raises(ValueError, match="group 'mine' is unknown: pass a process group, 'self'"):
        contrastive_loss(IMAGE, TEXT, 14.3, "mine")


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


@pytest.mark.parametrize(
    ("side", "factor", "norm"), [("image", 2.5, "2.5"), ("text", 0.4, "0.4"), ("text", 1e-3, "0.001")]
)
def test_fp16_takes_normalised_embeddings(side, factor, norm):
    sides = {"image": IMAGE.clone(), "text": TEXT.clone()}
    sides[side][2:] *= factor
    with pytest.raises(ValueError) as caught:
        contrastive_loss(sides["image"], sides["text"], 14.3, precision="fp16")
    assert f"{side} embedding 2 of rank 0 has norm {norm}: precision 'fp16' takes norms from 0.5 to 2.0" in str(
        caught.value
    )
    assert "torch.nn.functional.normalize(x, dim=-1), or pass precision='tf32', 'bf16' or 'fp32'" in str(caught.value)
    for precision in ("bf16", "fp32", "fp64"):
        contrastive_loss(sides["image"], sides["text"], 14.3, precision=precision)


def test_fp16_takes_zeros_and_what_is_nearly_normalised():
    image_BD = IMAGE * torch.tensor([0.0, 0.51, 1.99, 1.0])[:, None]
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        contrastive_grads(image_BD.to(dtype), TEXT.to(dtype), 14.3, precision="fp16")


def test_a_value_that_is_not_finite_is_told_before_one_that_is_too_long():
    image_BD, text_BD = 3 * IMAGE, TEXT.clone()
    text_BD[3, 0] = float("nan")
    with pytest.raises(ValueError, match="text embedding 3 of rank 0 holds nan"):
        contrastive_grads(image_BD, text_BD, 14.3, precision="fp16")


@pytest.mark.parametrize("door", [contrastive_loss, contrastive_grads])
@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("grad_mode", [True, False])
def test_forward_mode_is_refused(door, which, grad_mode):
    """Not left out in silence, under no_grad either: forward mode has a switch of its own."""
    inputs = [IMAGE, TEXT, torch.tensor(14.3)]
    with forward_ad.dual_level(), torch.set_grad_enabled(grad_mode):
        inputs[which] = forward_ad.make_dual(inputs[which], torch.ones_like(inputs[which]))
        with pytest.raises(RuntimeError, match=r"forward-mode dual tensors, .*use loss.backward\(\)"):
            door(*inputs)


@pytest.mark.parametrize("door", [contrastive_loss, contrastive_grads])
@pytest.mark.parametrize(
    "transform",
    [
        lambda fn: torch.func.grad(fn)(IMAGE),
        lambda fn: torch.func.jacrev(fn)(IMAGE),
        lambda fn: torch.func.jvp(fn, (IMAGE,), (IMAGE,)),
        lambda fn: torch.func.vmap(fn)(IMAGE.expand(2, -1, -1)),
    ],
    ids=["grad", "jacrev", "jvp", "vmap"],
)
def test_transforms_are_refused(door, transform):
    with pytest.raises(RuntimeError, match=r"inside a torch.func transform .*or dense_contrastive_loss"):
        transform(lambda image_BD: door(image_BD, TEXT, 14.3))


def test_the_package_needs_torch_only():
    code = "import sys, clipscale.loss; print(*{name.split('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"open_clip", "timm", "webdataset", "triton", "omegaconf", "torchvision"} & set(loaded)
