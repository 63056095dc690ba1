"""What the loss holds beside its inputs: the door that consumes them, and work done row by row in chunks.

Shapes: B pairs, D width.
"""

import pytest
import torch
from test_loss_tiles import LiveTensors, make_pairs
from torch.utils._python_dispatch import TorchDispatchMode

from clipscale.loss import contrastive_grads, contrastive_grads_in_place


@pytest.mark.parametrize(("precision", "operand_bytes"), [("fp32", 4), ("fp16", 2)])
def test_inputs_that_are_consumed_leave_room_for_operands_only(monkeypatch, precision, operand_bytes):
    """16 N D bytes in fp32 and 12 in fp16, 8 of them the inputs'; the gradients lie in these, to the same bits."""
    pairs, width, tile, chunk = 1024, 256, 64, 1 << 13
    monkeypatch.setattr("clipscale.loss.tiles.CHUNK_ELEMENTS", chunk)
    inputs = [side_BD.float() for side_BD in make_pairs(pairs, width)]
    expected = contrastive_grads(*inputs, 14.3, tile=tile, precision=precision)
    for locked in ({"image_grad": False, "text_grad": False}, {"text_grad": False}, {}):
        image_BD, text_BD = (side_BD.clone() for side_BD in inputs)
        with LiveTensors(image_BD, text_BD) as live:
            grads = contrastive_grads_in_place(image_BD, text_BD, 14.3, tile=tile, precision=precision, **locked)
        operands = 2 * pairs * width * operand_bytes
        allowed = 32 * pairs + 4 * (6 * tile**2 + 2 * chunk + 4 * tile * width)
        assert operands <= live.peak_bytes <= operands + allowed
        assert allowed < image_BD.nbytes / 2
        assert "image_grad" in locked or (grads.d_image_ND.data_ptr() == text_BD.data_ptr())
        assert text_BD.equal(inputs[1] if "image_grad" in locked else expected.d_image_ND)
        assert image_BD.equal(inputs[0] if "text_grad" in locked else expected.d_text_ND)


def test_only_inputs_that_can_become_gradients_are_consumed():
    image_BD, text_BD = (side_BD.float() for side_BD in make_pairs(6, 4))
    for inputs, why in (
        ((image_BD.half(), text_BD), "image embeddings are torch.float16 .* must be torch.float32"),
        ((image_BD, text_BD.T.contiguous().T), r"text embeddings are .* strides \[1, 6\].* and contiguous"),
        ((image_BD, image_BD), "share memory"),
    ):
        before = [side_BD.clone() for side_BD in inputs]
        with pytest.raises(ValueError, match=why):
            contrastive_grads_in_place(*inputs, 14.3, precision="fp32")
        assert all(side_BD.equal(same_BD) for side_BD, same_BD in zip(inputs, before, strict=True))


class LargestNorm(TorchDispatchMode):
    """While active: the most elements that any norm is taken over, of which torch may make a copy within."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.linalg_vector_norm.default:
            self.numel = max(self.numel, args[0].numel())
        return func(*args, **(kwargs or {}))


def test_norms_are_taken_by_chunks(monkeypatch):
    monkeypatch.setattr("clipscale.loss.tiles.CHUNK_ELEMENTS", 1000)
    image_BD, text_BD = (side_BD.half() for side_BD in make_pairs(127, 32))
    with LargestNorm() as largest:
        contrastive_grads(image_BD, text_BD, 14.3, precision="fp16")
        text_BD[100] *= 4
        with pytest.raises(ValueError, match=r"text embedding 100 of rank 0 has norm 4"):
            contrastive_grads(image_BD, text_BD, 14.3, precision="fp16")
        text_BD[100] = torch.nan
        with pytest.raises(ValueError, match=r"text embedding 100 of rank 0 holds nan"):
            contrastive_grads(image_BD, text_BD, 14.3, precision="fp16")
    assert 0 < largest.numel <= 1000
