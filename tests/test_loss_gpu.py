"""The loss on a GPU as a trainer runs it: tuned kernels, every precision, the same bits, memory.

Shapes: B pairs, D width. `test_loss_kernels.py` runs on the GPU too, with fixed shapes of tiles.
"""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_loss_kernels import relative_errors
from test_loss_tiles import stable_dense_loss

from clipscale.loss import contrastive_grads, contrastive_grads_in_place, contrastive_loss
from clipscale.loss.precision import OPERAND_DTYPE

pytestmark = pytest.mark.gpu
SCALE = 14.3


@pytest.fixture(scope="module", autouse=True)
def own_choices(tmp_path_factory):
    """Tuned here and now, not what an earlier run has left."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def draw_pairs(pairs, width, dtype, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    signal_BD, *noise_BD = torch.randn(3, pairs, width, generator=generator, device="cuda")
    return [F.normalize(0.5 + signal_BD + 0.7 * own_BD).to(dtype) for own_BD in noise_BD]


def four(grads):
    return [value.double() for value in (grads.loss, grads.d_image_ND, grads.d_text_ND, grads.d_logit_scale)]


@pytest.mark.parametrize("precision", ["fp16", "bf16", "tf32", "fp32"])
@pytest.mark.parametrize(("pairs", "width"), [(4096, 768), (5000, 512), (1000, 130), (3, 80)])
def test_no_less_exact_than_plain_torch(pairs, width, precision):
    image_BD, text_BD = draw_pairs(pairs, width, torch.float32)
    inputs = [side_BD.double().requires_grad_() for side_BD in (image_BD, text_BD)]
    scale = torch.tensor(SCALE, dtype=torch.float64, device="cuda", requires_grad=True)
    loss = stable_dense_loss(*inputs, scale)
    references = [loss.detach(), *torch.autograd.grad(loss, [*inputs, scale])]
    found, rival = (
        relative_errors(
            four(contrastive_grads(image_BD, text_BD, SCALE, precision=precision, engine=engine)), references
        )
        for engine in ("triton", "torch")
    )
    # Of 3 pairs single roundings decide: there only the order of magnitude counts.
    slack = 1e-6 if pairs > 3 else {"fp16": 1e-3, "bf16": 1e-2, "tf32": 1e-3, "fp32": 1e-5}[precision]
    for own, other in zip(found, rival, strict=True):
        assert own <= 1.1 * other + slack, (found, rival)


def fingerprint(pairs=20_000, width=768):
    grads = contrastive_grads(*draw_pairs(pairs, width, torch.float16), SCALE)
    digest = hashlib.sha256()
    for value in (grads.loss, grads.d_image_ND, grads.d_text_ND, grads.d_logit_scale):
        digest.update(value.cpu().numpy().tobytes())
    return digest.hexdigest()


def test_the_same_bits_under_load_and_after_a_restart():
    """20 repeats while copies run on another stream; then in a process of its own, which reads what was tuned here."""
    first = fingerprint()
    noise, side = torch.empty(1 << 28, device="cuda"), torch.cuda.Stream()
    for _ in range(20):
        with torch.cuda.stream(side):
            for _ in range(8):
                noise.copy_(noise.flip(0))
        assert fingerprint() == first
    code = "import test_loss_gpu; print(test_loss_gpu.fingerprint())"
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    again = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert again.stdout.split()[-1] == first


@pytest.mark.parametrize("pairs", [65_536, 262_144])
def test_extra_memory(pairs):
    """Beyond float16 inputs and float32 gradients: at most 600 MB and 32 bytes a pair."""
    inputs = draw_pairs(pairs, 768, torch.float16)
    contrastive_grads(*(side_BD[:20_000] for side_BD in inputs), SCALE)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    grads = contrastive_grads(*inputs, SCALE)
    extra = torch.cuda.max_memory_allocated() - before - grads.d_image_ND.nbytes - grads.d_text_ND.nbytes
    assert extra <= 600e6 + 32 * pairs


@pytest.mark.parametrize(("precision", "operand_bytes"), [("fp16", 2), ("tf32", 4), ("fp32", 4)])
def test_memory_where_inputs_are_consumed(precision, operand_bytes):
    """Beyond the inputs: the operands, and what other calls take."""
    pairs, width = 65_536, 768
    contrastive_grads_in_place(*draw_pairs(pairs, width, torch.float32), SCALE, precision=precision)
    image_BD, text_BD = draw_pairs(pairs, width, torch.float32)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    grads = contrastive_grads_in_place(image_BD, text_BD, SCALE, precision=precision)
    extra = torch.cuda.max_memory_allocated() - before - 2 * pairs * width * operand_bytes
    assert extra <= 600e6 + 32 * pairs
    assert grads.d_image_ND.data_ptr() == text_BD.data_ptr()
    assert grads.d_text_ND.data_ptr() == image_BD.data_ptr()


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_a_bad_embedding_is_named(precision):
    image_BD, text_BD = draw_pairs(3000, 768, OPERAND_DTYPE[precision])
    text_BD[2999, 767] = float("nan")
    with pytest.raises(ValueError, match=r"text embedding 2999 of rank 0 holds nan"):
        contrastive_grads(image_BD, text_BD, SCALE, precision=precision)


def test_autograd_in_mixed_precision():
    """Half-precision embeddings under autocast, as a trainer has them: the gradients of the float32 dense loss."""
    image_BD, text_BD = draw_pairs(2048, 768, torch.float32)
    gradients = []
    for loss_fn, dtype in ((contrastive_loss, torch.float16), (stable_dense_loss, torch.float32)):
        inputs = [side_BD.to(dtype).requires_grad_() for side_BD in (image_BD, text_BD)]
        scale = torch.tensor(SCALE, device="cuda", requires_grad=True)
        with torch.autocast("cuda", enabled=loss_fn is contrastive_loss):
            loss = 4096 * loss_fn(*inputs, scale)
        gradients.append([grad.double() for grad in torch.autograd.grad(loss, [*inputs, scale])])
    for own, reference in zip(*gradients, strict=True):
        assert (own - reference).norm() <= 2e-3 * reference.norm()
