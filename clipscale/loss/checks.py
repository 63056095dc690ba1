"""What the loss refuses, and what it says then: arguments, embeddings that are not finite or out of fp16's range.

Which embedding is at fault is looked for only after a number that travels with the statistics (`contrastive.py`) has
told of trouble.

Shapes: N pairs on this rank, D width.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from clipscale.loss.link import Link
from clipscale.loss.precision import OPERAND_DTYPE
from clipscale.loss.tiles import row_chunks

# fp16 has 5 bits of exponent: these norms keep products, and gradients of them, amid its normal numbers.
SHORTEST, LONGEST = 0.5, 2.0


class NotFiniteError(ValueError):
    """The loss of a batch is not finite; raised on every rank.

    side, rows: of this rank's embeddings that are not, those of the first side that has any; "" and none where all are.
    """

    def __init__(self, message: str, side: str = "", rows: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.side, self.rows = side, rows


class OutOfRangeError(ValueError):
    """An embedding is longer or shorter than the precision takes; raised on every rank.

    fact: without the fix, which is for callers of the loss.
    """

    def __init__(self, fact: str, fix: str) -> None:
        super().__init__(f"{fact}; {fix}")
        self.fact = fact


def check_arguments(image_ND: Tensor, text_ND: Tensor, tile: int | None) -> None:
    """ValueError unless the embeddings fit together."""
    if image_ND.dim() != 2 or image_ND.shape != text_ND.shape:
        raise ValueError(
            f"image embeddings have shape {list(image_ND.shape)} and text embeddings {list(text_ND.shape)}: "
            "both must be [pairs, width] and alike; pass row i of each for pair i"
        )
    if image_ND.device != text_ND.device:
        raise ValueError(
            f"image embeddings are on {image_ND.device} and text embeddings on {text_ND.device}: "
            "both must be on one device; move one of them"
        )
    if image_ND.device.type not in ("cpu", "cuda"):
        raise ValueError(
            f"embeddings are on {image_ND.device}: the loss runs on cpu and cuda; "
            + ("meta tensors hold no values, make them there" if image_ND.is_meta else "move them there with .to()")
        )
    if not (image_ND.is_floating_point() and text_ND.is_floating_point()):
        raise ValueError(
            f"embeddings are {image_ND.dtype} (image) and {text_ND.dtype} (text): "
            "both must be floating point; convert them with .float()"
        )
    if tile is not None and tile < 1:
        raise ValueError(f"tile is {tile}: it must be at least 1; leave it out for the engine's own")


def check_consumable(image_ND: Tensor, text_ND: Tensor, dtype: torch.dtype) -> None:
    """ValueError unless each input's memory can become the gradient of the other."""
    for side, embeddings_ND in (("image", image_ND), ("text", text_ND)):
        if embeddings_ND.dtype != dtype or not embeddings_ND.is_contiguous():
            raise ValueError(
                f"{side} embeddings are {embeddings_ND.dtype} with strides {list(embeddings_ND.stride())}: their "
                f"memory becomes a gradient, so they must be {dtype} and contiguous; or call contrastive_grads"
            )
    if len(image_ND) and image_ND.untyped_storage().data_ptr() == text_ND.untyped_storage().data_ptr():
        raise ValueError(
            "image and text embeddings share memory, and that of each becomes a gradient: pass a copy of one, or call "
            "contrastive_grads"
        )


def checked_scale(logit_scale: Tensor | float) -> float:
    """The scale as a number; ValueError unless it is one, finite and above 0."""
    if isinstance(logit_scale, Tensor) and logit_scale.numel() != 1:
        raise ValueError(f"logit_scale has shape {list(logit_scale.shape)}: it must be one number")
    scale = float(logit_scale)
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(
            f"logit_scale is {scale}: it must be finite and above 0; pass the factor itself, logit_scale.exp() in CLIP"
        )
    return scale


def refuse_transforms(*inputs: Tensor | float) -> None:
    """RuntimeError under torch.func and for forward-mode derivatives, which would be left out in silence."""
    if torch._C._are_functorch_transforms_active():
        what = "inside a torch.func transform (grad, vmap, jvp and their like)"
    elif any(isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None for value in inputs):
        what = "on forward-mode dual tensors"
    else:
        return
    raise RuntimeError(
        f"the contrastive loss was called {what}, and has backward-mode gradients only: use loss.backward() or "
        "torch.autograd.grad outside, or dense_contrastive_loss"
    )


def count_out_of_range(image_ND: Tensor, text_ND: Tensor, precision: str) -> Tensor:
    """How many embeddings have a norm that precision fp16 does not take; 0 in the others. [1], float64."""
    count = image_ND.new_zeros(1, dtype=torch.float64)
    if precision == "fp16":
        for embeddings_ND in (image_ND, text_ND):
            count += _out_of_range(_norms(embeddings_ND)).sum()
    return count


def _norms(embeddings_ND: Tensor) -> Tensor:
    """Euclidean norm of each row, [N], in float32 at least; by chunks, since of halves torch makes a float32 copy."""
    dtype = torch.promote_types(embeddings_ND.dtype, torch.float32)
    norms_N = embeddings_ND.new_empty(len(embeddings_ND), dtype=dtype)
    for rows in row_chunks(*embeddings_ND.shape):
        norms_N[rows] = torch.linalg.vector_norm(embeddings_ND[rows], dim=1, dtype=dtype)
    return norms_N


def _out_of_range(norms_N: Tensor) -> Tensor:
    """A row of zeros passes."""
    return (norms_N > LONGEST) | ((norms_N > 0) & (norms_N < SHORTEST))


def out_of_range_error(image_ND: Tensor, text_ND: Tensor, link: Link) -> OutOfRangeError:
    """Names the first embedding of the first rank that has one. Collective; the same on every rank."""
    mine = torch.zeros(3, dtype=torch.float64)  # 1 for an image, 2 for a text, 0 for none; its row; its norm
    for side, embeddings_ND in ((1, image_ND), (2, text_ND)):
        norms_N = _norms(embeddings_ND)
        rows = _out_of_range(norms_N).nonzero().flatten().tolist()
        if rows and not mine[0]:
            mine = torch.tensor([side, rows[0], norms_N[rows[0]]], dtype=torch.float64)
    everyone = link.gather(mine.view(torch.int64).to(image_ND.device)).view(torch.float64).tolist()
    rank, (side, row, norm) = next((rank, facts) for rank, facts in enumerate(everyone) if facts[0])
    return OutOfRangeError(
        f"{'image' if side == 1 else 'text'} embedding {int(row)} of rank {rank} has norm {norm:.4g}: precision 'fp16' "
        f"takes norms from {SHORTEST} to {LONGEST}, and rows of zeros",
        "normalise the embeddings with torch.nn.functional.normalize(x, dim=-1), or pass precision='tf32', 'bf16' or "
        "'fp32'",
    )


def not_finite_error(image_ND: Tensor, text_ND: Tensor, rank: int, precision: str) -> NotFiniteError:
    """For a batch whose loss is not finite: names this rank's first embedding that is not, if it has one."""
    for side, embeddings_ND in (("image", image_ND), ("text", text_ND)):
        bad_rows: list[int] = []
        for rows in row_chunks(*embeddings_ND.shape):
            bad_M = ~embeddings_ND[rows].to(OPERAND_DTYPE[precision]).isfinite().all(dim=1)
            bad_rows += (bad_M.nonzero().flatten() + rows.start).tolist()
        if not bad_rows:
            continue
        row = embeddings_ND[bad_rows[0]]
        value = row[~row.to(OPERAND_DTYPE[precision]).isfinite()][0].item()
        return NotFiniteError(
            f"{side} embedding {bad_rows[0]} of rank {rank} holds {value}, not finite in the working precision "
            f"{precision}: look into the {side} tower's output for it (learning rate, mixed precision, input), or "
            "normalise embeddings that are finite but too large",
            side,
            bad_rows,
        )
    return NotFiniteError(
        f"the contrastive loss is not finite, though rank {rank}'s {len(image_ND)} pairs are in precision {precision}: "
        "see the errors of the other ranks; if none names an embedding, the logits overflow: normalise the embeddings"
    )
