"""The Triton kernels against float64 autograd and against plain torch: in Triton's interpreter where there is no GPU.

bf16 and tf32 are for a GPU only (`test_loss_gpu.py`): the interpreter's bf16 products are wrong.

Shapes: B pairs, D width, M rows and N columns of a block.
"""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from interpreter import TileProduct
from test_loss_tiles import HARD_CASES, assert_close, assert_no_worse, dense_results, stable_dense_loss

from clipscale.loss import contrastive_grads, kernels, merge, tiles
from clipscale.loss.precision import to_operand
from clipscale.loss.tuning import Shape

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
SHAPES = {"pointers": Shape(64, 32, 32, 4, 1), "descriptors": Shape(32, 64, 64, 4, 1, descriptors=True)}
MACRO_TILE = 128
# The interpreter is slow, and gets tiles of 128: 63, 65 and 127 pairs are all one of them, and 200 are four.
PAIRS = (1, 2, 63, 65, 127, 300) if DEVICE == "cuda" else (1, 2, 127, 200)


@pytest.fixture(params=SHAPES)
def loads(request, monkeypatch):
    """Both ways to load; on a GPU too, in place of what is tuned there."""
    return run_with(monkeypatch, SHAPES[request.param])


def run_with(monkeypatch, shape):
    monkeypatch.setattr(kernels, "tuned", lambda *_: shape)
    return shape


def draw_pairs(pairs, width, draw):
    """As `make_pairs`, many times over."""
    generator = torch.Generator().manual_seed(1_000_000 * draw + 1000 * pairs + width)
    signal_BD, *noise_BD = torch.randn(3, pairs, width, generator=generator, dtype=torch.float64)
    return [F.normalize(0.5 + signal_BD + 0.7 * own_BD) for own_BD in noise_BD]


def grads_of(image_BD, text_BD, scale, precision, engine, tile=MACRO_TILE):
    inputs = (side_BD.to(DEVICE, DTYPES[precision]) for side_BD in (image_BD, text_BD))
    grads = contrastive_grads(*inputs, scale, precision=precision, engine=engine, tile=tile)
    return [value.double().cpu() for value in (grads.loss, grads.d_image_ND, grads.d_text_ND, grads.d_logit_scale)]


def dense_float32(image_BD, text_BD, scale, shape):
    """By autograd, on the same device; the diagonal apart, or the rival would have no digit of a loss near 0 right."""
    loss_fn = stable_dense_loss
    if DEVICE == "cpu":
        tile = shape.rows, shape.columns, shape.depth, kernels._CHAIN.value
        loss_fn = partial(stable_dense_loss, product=lambda *sides: TileProduct.apply(*sides, *tile))
    sides = (side_BD.to(DEVICE) for side_BD in (image_BD, text_BD))
    return [value.cpu() for value in dense_results(*sides, scale, loss_fn=loss_fn, dtype=torch.float32)]


def plain_torch(image_BD, text_BD, scale, precision, shape):
    """Float32: dense autograd. Float16: its operands rounded and G too, all else exact, as `tiles.py` does it."""
    if precision == "fp32":
        return dense_float32(image_BD, text_BD, scale, shape)
    return grads_of(image_BD, text_BD, scale, precision, "torch")


def relative_errors(results, references):
    return [
        (result - reference).norm() / reference.norm().clamp(min=1e-300)
        for result, reference in zip(results, references, strict=True)
    ]


def cut_off(scale, width, precision):
    """What tensor cores may add to a relative error: they sum 16 products at a time and cut the sum off where float32
    rounds it, which takes less than 2^-24 from a similarity below 1, always towards 0, so that D/16 cuts add up; the
    scale times that is what a probability may be off by, of itself. Plain torch's products are cut as well, but in
    another order, chosen by cuBLAS. On a CPU, and in fp32, nothing is cut."""
    return scale * math.ceil(width / 16) * 2.0**-24 if DEVICE == "cuda" and precision == "fp16" else 0.0


def draws_for(pairs, scale, precision):
    """Where roundings weigh most, many: above all of two pairs. One pair has loss and gradients of exactly 0."""
    hard = scale == 100.0 and precision == "fp32"
    if hard and pairs == 2:
        return 72
    if DEVICE == "cuda":
        return 24 if hard or pairs < 63 else 4
    if pairs == 1:
        return 1
    return 4 if hard or pairs == 2 else 2  # of many pairs each draw is many


WIDTHS = {32: "pointers", 80: "descriptors", 130: "pointers", 768: "descriptors"}
QUICK = {(2, 32), (127, 32), (127, 80), (200, 32)}  # both ways to load, some programs; with one pair: all
CASES = [
    pytest.param(
        pairs, width, loads, marks=[pytest.mark.slow] * (DEVICE == "cpu" and pairs > 1 and (pairs, width) not in QUICK)
    )
    for pairs in PAIRS
    for width, loads in WIDTHS.items()
]


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize(("pairs", "width", "loads"), CASES)
def test_no_less_exact_than_plain_torch(pairs, width, loads, precision, monkeypatch):
    """At most 1.1 times the rival's error, plus 1e-6 of the reference, both as root mean squares over draws: in one
    few roundings decide, and the error of a single number may happen to be near 0. In fp16 both make the same ones, but
    for what a GPU cuts off."""
    few_programs = {"rows": 128, "columns": 128} if DEVICE == "cpu" and pairs > 2 else {}  # the interpreter is slow
    shape = run_with(monkeypatch, SHAPES[loads]._replace(**few_programs))
    for scale in (1.0, 14.3, 100.0):
        errors, rivals = [], []
        for draw in range(draws_for(pairs, scale, precision)):
            image_BD, text_BD = (side_BD.float().double() for side_BD in draw_pairs(pairs, width, draw))
            references = dense_results(image_BD, text_BD, scale, loss_fn=stable_dense_loss)
            if 0 < references[0] < torch.finfo(torch.float32).tiny:
                continue  # float32 has no digits for such a loss, whoever computes it
            errors.append(relative_errors(grads_of(image_BD, text_BD, scale, precision, "triton"), references))
            rivals.append(relative_errors(plain_torch(image_BD, text_BD, scale, precision, shape), references))
        error, rival = (torch.tensor(found).square().mean(0).sqrt() for found in (errors, rivals))
        slack = 1e-6 + cut_off(scale, width, precision)
        assert (error <= 1.1 * rival + slack).all(), f"scale {scale}: {error} against {rival}"


FP16_CASES = [case for case in HARD_CASES if "logits" not in case]


@pytest.mark.parametrize("case", HARD_CASES)
def test_hard_cases_in_fp32(case, loads):
    image_BD, text_BD, scale = *(side_BD.float().double() for side_BD in HARD_CASES[case][:2]), HARD_CASES[case][2]
    references = dense_results(image_BD, text_BD, scale, loss_fn=stable_dense_loss)
    results = grads_of(image_BD, text_BD, scale, "fp32", "triton")
    assert_no_worse(results, dense_float32(image_BD, text_BD, scale, loads), references, slack=1e-6)
    if case.startswith("loss"):
        assert_close(results, references, relative=1e-5)


@pytest.mark.parametrize("case", FP16_CASES)
def test_hard_cases_in_fp16(case, loads):
    references = dense_results(*HARD_CASES[case], loss_fn=stable_dense_loss)
    results, rivals = (grads_of(*HARD_CASES[case], "fp16", engine) for engine in ("triton", "torch"))
    assert_no_worse(results, rivals, references, slack=1e-6)
    if case.startswith("loss"):
        assert_close(results, references, relative=5e-3)


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize(("pairs", "width"), [(5, 4096), (70, 5), (70, 17)])
def test_any_width(pairs, width, precision, loads):
    image_BD, text_BD = draw_pairs(pairs, width, 0)
    results, references = (grads_of(image_BD, text_BD, 14.3, precision, engine) for engine in ("triton", "torch"))
    relative = (1e-4 if precision == "fp16" else 5e-6) + cut_off(14.3, width, precision)
    assert_close(results, references, relative)


def block_results(engine, image_MD, text_ND, scale, precision, diagonal, tile):
    """All that a block's two passes give, with softmaxes as if the block were the whole batch."""
    options = {"diagonal": diagonal, "precision": precision, "tile": tile}
    image_MD, text_ND = (to_operand(side, precision, contiguous=False) for side in (image_MD, text_ND))
    rows, columns = engine.logsumexp_block(image_MD, text_ND, scale, **options)
    gradients = [torch.zeros(side.shape, device=DEVICE) for side in (image_MD, text_ND)]
    softmaxes = rows.softmax(scale), columns.softmax(scale)
    d_scale = engine.gradient_block(
        image_MD, text_ND, scale, *softmaxes, *gradients, origin=0.3, lift=2.0**14, **options
    )
    return [*rows, *columns, *gradients, d_scale]


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize(
    ("rows", "columns", "diagonal"), [(33, 130, False), (130, 33, False), (100, 100, True), (1, 1, True)]
)
def test_blocks_of_any_extent(rows, columns, diagonal, precision, loads):
    """Also macro-tiles that are no multiple of a tile, and of which the last are cut."""
    image_MD, text_ND = (draw_pairs(pairs, 48, 1)[0].to(DEVICE, DTYPES[precision]) for pairs in (rows, columns))
    references = block_results(tiles, image_MD, text_ND, 14.3, precision, diagonal, None)
    for tile in (70, 1024):
        results = block_results(kernels, image_MD, text_ND, 14.3, precision, diagonal, tile)
        for result, reference in zip(results, references, strict=True):
            torch.testing.assert_close(result, reference, rtol=1e-5, atol=2e-6 if precision == "fp32" else 1e-4)


@pytest.mark.parametrize(("rows", "columns"), [(0, 3), (3, 0), (0, 0)])
def test_a_block_may_be_empty(rows, columns):
    image_MD, text_ND = torch.randn(rows, 4, device=DEVICE), torch.randn(columns, 4, device=DEVICE)
    results = block_results(kernels, image_MD, text_ND, 1.0, "fp32", False, None)
    for result, reference in zip(
        results, block_results(tiles, image_MD, text_ND, 1.0, "fp32", False, None), strict=True
    ):
        assert result.equal(reference)


def test_strided_rows_and_columns(loads):
    """Columns cut from a wider buffer, rows that lie far apart, and a transposed buffer, against contiguous copies."""
    image_BD, text_BD = (side_BD.to(DEVICE, torch.float16) for side_BD in draw_pairs(70, 64, 2))
    expected = block_results(kernels, image_BD, text_BD, 14.3, "fp16", True, 50)
    wide, transposed = torch.cat([image_BD] * 3, dim=1), text_BD.T.contiguous().T
    assert not transposed.is_contiguous()
    for image, text in ((wide[:, 64:128], text_BD), (wide[:, :64], transposed), (image_BD, transposed)):
        results = block_results(kernels, image, text, 14.3, "fp16", True, 50)
        assert all(result.equal(reference) for result, reference in zip(results, expected, strict=True))


def test_offsets_beyond_31_bits(loads):
    """Rows 2^30 elements apart: the last begins at 3 * 2^30. Only the pages that are touched exist."""
    buffer = torch.empty(3 * 2**30 + 64, dtype=torch.float16, device=DEVICE)
    apart = buffer.as_strided((4, 64), (2**30, 1))
    image_BD, text_BD = (side_BD.to(DEVICE, torch.float16) for side_BD in draw_pairs(4, 64, 3))
    apart.copy_(image_BD)
    for pair, near in (((apart, text_BD), (image_BD, text_BD)), ((text_BD, apart), (text_BD, image_BD))):
        results, references = (block_results(kernels, *sides, 14.3, "fp16", True, None) for sides in (pair, near))
        assert all(result.equal(reference) for result, reference in zip(results, references, strict=True))


@pytest.mark.parametrize("precision", DTYPES)
def test_every_output_is_written(precision, loads):
    """torch fills new memory with NaN in this mode: none may be left, nor read."""
    image_BD, text_BD = draw_pairs(80, 48, 4)
    plain = grads_of(image_BD, text_BD, 14.3, precision, "triton", tile=64)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3, device=DEVICE).isnan().all(), "the check sees unwritten memory"
        poisoned = grads_of(image_BD, text_BD, 14.3, precision, "triton", tile=64)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(a.equal(b) for a, b in zip(plain, poisoned, strict=True))


class Alignments:
    """A kernel, and the alignments that it was launched with: for each new one Triton compiles, in mid-training."""

    def __init__(self, kernel):
        self.kernel, self.seen = kernel, set()

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.seen.add(tuple(value.data_ptr() % 16 for value in arguments if isinstance(value, torch.Tensor)))
            return self.kernel[grid](*arguments, **options)

        return launch


def test_alignment_does_not_depend_on_the_number_of_pairs(monkeypatch):
    """Macro-tiles that are cut included."""
    run_with(monkeypatch, SHAPES["pointers"])
    kept = (kernels, "_logsumexp_kernel"), (merge, "_merge_kernel"), (kernels, "_gradient_kernel")
    launched = [Alignments(getattr(module, name)) for module, name in kept]
    for (module, name), kernel in zip(kept, launched, strict=True):
        monkeypatch.setattr(module, name, kernel)
    for pairs in (64, 65, 66, 67, 129):
        grads_of(*draw_pairs(pairs, 16, 9), 14.3, "fp16", "triton", tile=64)
    for (_, name), kernel in zip(kept, launched, strict=True):
        assert len(kernel.seen) == 1, name


@pytest.mark.parametrize("precision", DTYPES)
def test_the_order_of_tiles_changes_nothing(precision, monkeypatch):
    """Bit for bit: each has slots of its own. Other extents sum in another order: to rounding."""
    image_BD, text_BD = draw_pairs(100, 48, 5)
    shape = Shape(32, 32, 32, 4, 1)
    run_with(monkeypatch, shape)
    first = grads_of(image_BD, text_BD, 14.3, precision, "triton")
    for group in (1, 3):
        run_with(monkeypatch, shape._replace(group=group))
        again = grads_of(image_BD, text_BD, 14.3, precision, "triton")
        assert all(a.equal(b) for a, b in zip(first, again, strict=True))
    for tile, other in ((64, shape), (1024, Shape(64, 128, 16, 4, 1))):
        run_with(monkeypatch, other)
        again = grads_of(image_BD, text_BD, 14.3, precision, "triton", tile)
        assert_close(again, first, relative=1e-6 if precision == "fp32" else 2e-5)


def test_accuracy_counts_a_tie_as_a_miss(loads):
    image_BD, text_BD = draw_pairs(80, 12, 6)
    options = {"precision": "fp32", "tile": 64}
    for text in (text_BD, image_BD, image_BD[[0, *range(79)]]):
        inputs = image_BD.to(DEVICE, torch.float32), text.to(DEVICE, torch.float32)
        found, wanted = (contrastive_grads(*inputs, 14.3, engine=engine, **options) for engine in ("triton", "torch"))
        assert (found.image_accuracy, found.text_accuracy) == (wanted.image_accuracy, wanted.text_accuracy)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in the interpreter
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("side", ["image", "text"])
def test_a_bad_embedding_is_named(side, value, loads):
    sides = dict(
        zip(("image", "text"), (side_BD.to(DEVICE, torch.float16) for side_BD in draw_pairs(150, 48, 7)), strict=True)
    )
    sides[side][131, 3] = float(value)
    with pytest.raises(ValueError, match=f"{side} embedding 131 of rank 0 holds {value}, not finite"):
        contrastive_grads(sides["image"], sides["text"], 14.3, precision="fp16", engine="triton")


def test_a_locked_side_changes_no_bit_of_the_other(loads):
    inputs = [side_BD.to(DEVICE, torch.float16) for side_BD in draw_pairs(70, 48, 8)]
    options = {"precision": "fp16", "engine": "triton", "tile": 50}
    both = contrastive_grads(*inputs, 14.3, **options)
    text_only = contrastive_grads(*inputs, 14.3, **options, image_grad=False)
    assert text_only.d_image_ND is None
    assert text_only.d_text_ND.equal(both.d_text_ND)
    assert text_only.d_logit_scale.equal(both.d_logit_scale)
