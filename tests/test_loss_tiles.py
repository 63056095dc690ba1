"""The tiled loss on one process, against the dense loss: accuracy of every precision, memory, determinism.

Shapes: B pairs, D width. Errors are Frobenius norms relative to the reference's.
"""

import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from clipscale.loss import contrastive_grads, dense_contrastive_loss
from clipscale.loss.precision import (
    OPERAND_DTYPE,
    exact_products,
    gradient_lift,
    resolve_precision,
    round_to_tf32,
    to_operand,
)
from clipscale.loss.tiles import gradient_block, logsumexp_block

PAIRS = (1, 2, 3, 63, 65, 127, 300)
WIDTHS = (5, 32, 130)
SCALES = (1.0, 14.3, 100.0)
QUANTITIES = ("loss", "d_image", "d_text", "d_scale")


def make_pairs(pairs, width, noise=0.7, offset=0.5):
    """Normalised images and texts [B, D] in float64: a shared offset, as real features have, a signal, and noise."""
    generator = torch.Generator().manual_seed(1000 * pairs + width)
    signal_BD, *noise_BD = torch.randn(3, pairs, width, generator=generator, dtype=torch.float64)
    return [F.normalize(offset + signal_BD + noise * own_BD) for own_BD in noise_BD]


def easy_pairs(pairs, cosine):
    """Pairs of this cosine, orthogonal to all others: at scale s the loss is log(1 + (B - 1) exp(-cosine s))."""
    basis = torch.linalg.qr(make_pairs(2 * pairs, 2 * pairs)[0].T)[0].T.contiguous()
    image_BD, other_BD = basis.chunk(2)
    return [image_BD, cosine * image_BD + (1 - cosine**2) ** 0.5 * other_BD]


def duplicated(image_BD, text_BD):
    image_BD[1], text_BD[1:4] = image_BD[0], text_BD[0]
    return [image_BD, text_BD]


HARD_CASES = {
    "random, scale 1": (*make_pairs(127, 32), 1.0),
    "random, scale 14.3": (*make_pairs(127, 32), 14.3),
    "random, scale 100": (*make_pairs(127, 32), 100.0),
    "cosines of 0.99 and more": (*make_pairs(300, 34, offset=20.0), 14.3),
    "duplicates": (*duplicated(*make_pairs(65, 32)), 100.0),
    "logits of hundreds": (*(20 * side_BD for side_BD in make_pairs(127, 32, noise=2.0)), 1.3),
    "logits of hundreds, all negative": (20 * make_pairs(65, 32)[0], -20 * make_pairs(65, 32)[1], 1.3),
    "logits of 1e-6": (*(1e-3 * side_BD for side_BD in make_pairs(65, 32)), 1.0),
    "scale 500": (*make_pairs(127, 32, noise=2.0), 500.0),
    "scale 500, all negative": (make_pairs(65, 32)[0], -make_pairs(65, 32)[1], 500.0),
    "scale 1e-6": (*make_pairs(65, 32), 1e-6),
    "loss 0.009": (*easy_pairs(65, 0.62), 14.3),
    "loss 1e-6": (*easy_pairs(65, 0.18), 100.0),
    "loss 6e-12": (*easy_pairs(65, 0.3), 100.0),
}


def stable_dense_loss(image_BD, text_BD, logit_scale, product=lambda image_BD, text_BD: image_BD @ text_BD.T):
    """The dense loss with the diagonal apart, which keeps its relative precision, and its gradients', near zero."""
    logits_BB = logit_scale * product(image_BD, text_BD)
    wrong_BB = logits_BB.masked_fill(torch.eye(len(logits_BB), dtype=torch.bool, device=logits_BB.device), -torch.inf)
    return sum(-F.logsigmoid(logits_BB.diagonal() - wrong_BB.logsumexp(dim)).mean() for dim in (0, 1)) / 2


def dense_results(image_BD, text_BD, logit_scale, *, loss_fn=dense_contrastive_loss, dtype=torch.float64):
    """Loss, d image, d text and d scale by autograd in `dtype`, returned in float64."""
    inputs = [
        torch.as_tensor(value, dtype=dtype).clone().requires_grad_() for value in (image_BD, text_BD, logit_scale)
    ]
    loss = loss_fn(*inputs)
    return [value.double() for value in (loss.detach(), *torch.autograd.grad(loss, inputs))]


def rounded_results(image_BD, text_BD, logit_scale, precision):
    """What half-precision operands cost a dense computation that is otherwise exact: both products' operands rounded,
    dL/dS off the diagonal only, at the same power of two; all else float64."""
    dtype = OPERAND_DTYPE[precision]
    halves = image_BD.to(dtype).double(), text_BD.to(dtype).double()
    loss, *_, d_scale = dense_results(*halves, logit_scale, loss_fn=stable_dense_loss)
    logits_BB = logit_scale * halves[0] @ halves[1].T
    g_BB = (logits_BB.softmax(1) + logits_BB.softmax(0)).fill_diagonal_(0.0)
    missing_2B = torch.stack([logits_BB.softmax(dim).fill_diagonal_(0.0).sum(dim) for dim in (0, 1)])
    missing_B1 = missing_2B.sum(0)[:, None]
    lift = 2.0 ** (14 - math.ceil(math.log2(missing_2B.max())))
    g_BB = (g_BB * lift).to(dtype).double() / lift
    factor = logit_scale / (2 * len(image_BD))
    d_image_BD = factor * (g_BB @ halves[1] - missing_B1 * text_BD)
    d_text_BD = factor * (g_BB.T @ halves[0] - missing_B1 * image_BD)
    return [loss, d_image_BD, d_text_BD, d_scale]


def tiled_results(image_BD, text_BD, logit_scale, precision, tile):
    grads = contrastive_grads(image_BD, text_BD, logit_scale, precision=precision, tile=tile)
    return [value.double() for value in (grads.loss, grads.d_image_ND, grads.d_text_ND, grads.d_logit_scale)]


def assert_close(results, references, relative, floor=0.0):
    for name, result, reference in zip(QUANTITIES, results, references, strict=True):
        bar = relative * reference.norm() + floor
        assert (result - reference).norm() <= bar, f"{name}: {(result - reference).norm()} above {bar}"


def assert_no_worse(results, rivals, references, slack):
    """Each error at most 1.1 times the rival's, plus `slack` of the reference's norm."""
    for name, result, rival, reference in zip(QUANTITIES, results, rivals, references, strict=True):
        bar = 1.1 * (rival - reference).norm() + slack * reference.norm()
        assert (result - reference).norm() <= bar, f"{name}: {(result - reference).norm()} above {bar}"


class LiveTensors(TorchDispatchMode):
    """While active: the most elements any one tensor has, and the most bytes alive at a time of those made within.

    `inputs` were there before: views of them are no new bytes.
    """

    def __init__(self, *inputs):
        super().__init__()
        self.largest_numel = self.live_bytes = self.peak_bytes = 0
        self._seen = weakref.WeakSet(tensor.untyped_storage() for tensor in inputs)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor)
        return result

    def _count(self, tensor):
        self.largest_numel = max(self.largest_numel, tensor.numel())
        storage = tensor.untyped_storage()
        if storage not in self._seen:
            self._seen.add(storage)
            self.live_bytes += storage.nbytes()
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)
            weakref.finalize(storage, self._release, storage.nbytes())

    def _release(self, nbytes):
        self.live_bytes -= nbytes


@pytest.mark.parametrize("pairs", PAIRS)
def test_float64_equals_the_dense_loss_and_open_clips(pairs):
    from open_clip.loss import ClipLoss

    for width in WIDTHS:
        image_BD, text_BD = make_pairs(pairs, width)
        for scale in SCALES:
            dense = dense_results(image_BD, text_BD, scale)
            open_clip = dense_results(image_BD, text_BD, scale, loss_fn=ClipLoss())
            for tile in {7 if pairs < 300 else 70, 50, pairs, 1024} if pairs > 7 else {1, 2, 1024}:
                tiled = tiled_results(image_BD, text_BD, scale, "auto", tile)
                assert_close(tiled, dense, relative=1e-10, floor=1e-14)
                assert_close(tiled, open_clip, relative=1e-10, floor=1e-14)


@pytest.mark.parametrize("tile", [16, 1024])
@pytest.mark.parametrize("case", HARD_CASES)
def test_float64_keeps_its_relative_precision(case, tile):
    """Also near a loss of zero, where the reference keeps the diagonal apart as well. The plain dense loss, against
    which that reference is held, does not: there every probability is off by the rounding of its logit."""
    image_BD, text_BD, scale = HARD_CASES[case]
    references = dense_results(image_BD, text_BD, scale, loss_fn=stable_dense_loss)
    largest = scale * image_BD.norm(dim=1).max() * text_BD.norm(dim=1).max()
    rounding = torch.finfo(torch.float64).eps * largest * max(1.0, scale / len(image_BD) ** 0.5)
    assert_close(references, dense_results(image_BD, text_BD, scale), relative=1e-10, floor=rounding)
    assert_close(tiled_results(image_BD, text_BD, scale, "fp64", tile), references, relative=1e-11)


@pytest.mark.parametrize("tile", [16, 50, 1024])
@pytest.mark.parametrize("case", HARD_CASES)
def test_float32_is_as_exact_as_dense_float32(case, tile):
    image_BD, text_BD, scale = *(side_BD.float() for side_BD in HARD_CASES[case][:2]), HARD_CASES[case][2]
    references = dense_results(image_BD.double(), text_BD.double(), scale, loss_fn=stable_dense_loss)
    tiled = tiled_results(image_BD, text_BD, scale, "auto", tile)
    assert_no_worse(tiled, dense_results(image_BD, text_BD, scale, dtype=torch.float32), references, slack=1e-6)
    if case.startswith("loss"):
        assert_close(tiled, references, relative=1e-5)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("case", HARD_CASES)
def test_half_precision_costs_no_more_than_rounding_the_operands(case, precision):
    """Slack 1e-4 for float32 logits, statistics and sums (of logits up to 600), a fifth of fp16's rounding."""
    if precision == "fp16" and case.startswith("logits of"):  # of embeddings of norm 20 and 0.001
        with pytest.raises(ValueError, match=r"takes norms from 0\.5 to 2\.0"):
            contrastive_grads(*HARD_CASES[case], precision="fp16")
        return
    references = dense_results(*HARD_CASES[case], loss_fn=stable_dense_loss)
    rivals = rounded_results(*HARD_CASES[case], precision)
    for tile in (16, 50, 1024):
        tiled = tiled_results(*HARD_CASES[case], precision, tile)
        assert_no_worse(tiled, rivals, references, slack=1e-4)
        assert_close(tiled, rivals, relative=1e-4)
        if case.startswith("loss"):
            assert_close(tiled, references, relative={"fp16": 5e-3, "bf16": 4e-2}[precision])


def test_the_lift_fills_half_precision_and_does_not_overflow_it():
    for missing in (1.0, 0.5000001, 0.5, 0.03, 1e-6, 1e-25):
        for precision in ("fp16", "bf16"):
            assert 2**14 < 2 * missing * gradient_lift(precision, missing) <= 2**15
        assert gradient_lift("fp32", missing) == 1.0
    assert gradient_lift("fp16", 0.0) == 1.0
    assert 1 / gradient_lift("fp16", 1e-300) >= torch.finfo(torch.float32).tiny


def test_no_tensor_is_larger_than_a_tile_or_an_input():
    image_BD, text_BD = (side_BD.float() for side_BD in make_pairs(300, 5))
    with LiveTensors() as tiled:
        contrastive_grads(image_BD, text_BD, 14.3, tile=32)
    assert tiled.largest_numel <= max(image_BD.numel(), 32 * 32)
    with LiveTensors() as dense:
        dense_contrastive_loss(image_BD, text_BD, 14.3)
    assert dense.largest_numel == 300 * 300, "the check sees a dense matrix"


def test_one_rank_makes_its_gradients_and_nothing_else_of_their_size(monkeypatch):
    """Beyond inputs and gradients: 32 bytes a pair of statistics, some tiles, and chunks of a fixed size."""
    pairs, width, tile, chunk = 1024, 256, 64, 1 << 13
    monkeypatch.setattr("clipscale.loss.tiles.CHUNK_ELEMENTS", chunk)
    image_BD, text_BD = (side_BD.float() for side_BD in make_pairs(pairs, width))
    for locked in ({}, {"text_grad": False}, {"image_grad": False, "text_grad": False}):
        with LiveTensors(image_BD, text_BD) as live:
            contrastive_grads(image_BD, text_BD, 14.3, tile=tile, **locked)
        gradients = (2 - len(locked)) * image_BD.nbytes
        allowed = 32 * pairs + 4 * (6 * tile**2 + 2 * chunk)
        assert allowed < image_BD.nbytes / 4
        assert gradients <= live.peak_bytes <= gradients + allowed


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_same_inputs_same_bits(precision):
    image_BD, text_BD = make_pairs(127, 32)
    first, second = (tiled_results(image_BD, text_BD, 14.3, precision, 50) for _ in range(2))
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))


def test_products_are_exact_whatever_the_process_has_set():
    """Autocast or a lower float32 precision around the loss changes nothing, and is as it was afterwards."""
    image_BD, text_BD = (side_BD.float() for side_BD in make_pairs(65, 32))
    plain = tiled_results(image_BD, text_BD, 14.3, "fp32", 16)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            wrapped = tiled_results(image_BD, text_BD, 14.3, "fp32", 16)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert all(a.equal(b) for a, b in zip(plain, wrapped, strict=True))


def test_half_precision_is_not_summed_in_halves():
    """Within; and outside it is as the process has set it, the way a sum may be split included."""
    switches = torch.backends.cuda.matmul
    names = [f"allow_{half}_reduced_precision_reduction" for half in ("fp16", "bf16")] + ["allow_fp16_accumulation"]
    before = [getattr(switches, name) for name in names]
    try:
        for settings in ((True, True, True), (False, True, False)):
            for name, setting in zip(names, settings, strict=True):
                setattr(switches, name, setting)
            with exact_products("fp16", torch.device("cpu")):
                assert not any(getattr(switches, name) for name in names)
            assert tuple(getattr(switches, name) for name in names) == settings
        if hasattr(switches, f"{names[0]}_split_k"):
            setattr(switches, names[0], (False, False))
            with exact_products("fp16", torch.device("cpu")):
                assert not getattr(switches, f"{names[0]}_split_k")
            assert not getattr(switches, f"{names[0]}_split_k")
    finally:
        for name, setting in zip(names, before, strict=True):
            setattr(switches, name, setting)


def test_tf32_operands_are_rounded_to_nearest():
    """The nearest number of 11 significant bits, ties away from zero, whatever the exponent; inf and nan stay."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (100_000,), generator=generator)
    values = torch.cat([bits.to(torch.int32).view(torch.float32), torch.tensor([1 + 2**-11, -1 - 2**-11, 0.0, -0.0])])
    values = values[values.isfinite() & (values.abs() < 3e38)].view(2, -1).T  # of any strides
    mantissa, exponent = torch.frexp(values.double())
    step = torch.exp2(exponent.clamp(min=-125).double() - 11)  # float32's subnormals have one step
    expected = (mantissa.sign() * (values.double() / step).abs().add(0.5).floor() * step).float()
    assert round_to_tf32(values).equal(expected)
    assert round_to_tf32(expected).equal(expected)
    assert to_operand(values, "tf32", contiguous=True).equal(expected)
    assert to_operand(values.double(), "tf32", contiguous=True).is_contiguous()

    nan_bits = torch.tensor([0x7FC00000, 0x7FFFFFFF, 0x7F800001, -1, -0x7FFFFF])
    assert round_to_tf32(nan_bits.to(torch.int32).view(torch.float32)).isnan().all()
    infinities = torch.tensor([torch.inf, -torch.inf])
    assert round_to_tf32(infinities).equal(infinities)


def test_an_operand_is_a_copy_only_where_it_must_be():
    rows_ND, columns_ND = torch.ones(4, 3), torch.ones(3, 4).T
    spaced_ND = torch.ones(4, 6)[:, :3]
    for values_ND in (rows_ND, spaced_ND):
        assert to_operand(values_ND, "fp32", contiguous=False) is values_ND
    assert to_operand(rows_ND, "fp32", contiguous=True) is rows_ND
    assert to_operand(spaced_ND, "fp32", contiguous=True).is_contiguous()
    assert to_operand(columns_ND, "fp32", contiguous=False).is_contiguous()
    assert to_operand(rows_ND, "bf16", contiguous=False).dtype == torch.bfloat16


@pytest.mark.parametrize("pairs", [1, 3, 127])
def test_accuracy_is_that_of_the_largest_logit(pairs):
    image_BD, text_BD = make_pairs(pairs, 5, noise=2.0)
    grads = contrastive_grads(image_BD, text_BD, 14.3, tile=50)
    logits_BB, right_B = image_BD @ text_BD.T, torch.arange(pairs)
    assert grads.image_accuracy == (logits_BB.argmax(1) == right_B).double().mean()
    assert grads.text_accuracy == (logits_BB.argmax(0) == right_B).double().mean()


def test_identical_pairs_are_all_missed():
    ones_BD = torch.ones(4, 8) / 8**0.5
    grads = contrastive_grads(ones_BD, ones_BD, 14.3)
    assert (grads.image_accuracy, grads.text_accuracy) == (0.0, 0.0)


@pytest.mark.parametrize(("rows", "columns"), [(0, 3), (3, 0), (0, 0)])
def test_a_block_may_be_empty(rows, columns):
    image_MD, text_ND = torch.randn(rows, 4), torch.randn(columns, 4)
    partials = logsumexp_block(image_MD, text_ND, 1.0, diagonal=False, precision="fp32")
    for partial in partials:
        assert partial.max.eq(-torch.inf).all()
        assert partial.sum.eq(0).all()
        assert partial.loss(1.0).eq(0).all()
        assert partial.softmax(1.0).missing.eq(0).all()
    softmaxes = [partial.softmax(1.0) for partial in partials]
    d_image_MD, d_text_ND = torch.zeros(rows, 4), torch.zeros(columns, 4)
    d_scale = gradient_block(
        image_MD,
        text_ND,
        1.0,
        *softmaxes,
        d_image_MD,
        d_text_ND,
        origin=0.0,
        lift=1.0,
        diagonal=False,
        precision="fp32",
    )
    assert d_scale == 0
    assert not d_image_MD.any()
    assert not d_text_ND.any()


def test_auto_precision_and_its_alternatives():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert resolve_precision("auto", cuda, torch.float32) == "fp16"
    assert resolve_precision("auto", cpu, torch.bfloat16) == "fp32"
    assert resolve_precision("auto", cuda, torch.float64) == "fp64"
    assert resolve_precision("tf32", cuda, torch.float32) == "tf32"
    with pytest.raises(ValueError, match=r"'fp8' is unknown: choose one of auto, fp16"):
        resolve_precision("fp8", cuda, torch.float32)
    with pytest.raises(ValueError, match=r"'tf32' exists only on CUDA.*cpu: choose 'fp32'"):
        resolve_precision("tf32", cpu, torch.float32)
