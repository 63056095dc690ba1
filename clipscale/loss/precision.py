"""What a product of the loss is rounded to: the names a user may ask for, and how plain torch multiplies under each.

Measured at B 4096, D 768: fp16 operands with fp32 accumulation have tf32's error, an eighth of bf16's.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

OPERAND_DTYPE = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "tf32": torch.float32,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
"""The type in which the operands of a product are kept, and in which text blocks travel."""

# Probabilities are about 1/B: lifted by 2^14 they stay normal numbers in float16, and 2 * 2^14 still fits.
HALF_GRADIENT_SCALE = 2.0**14

# torch 2.9 gave each backend its own switch; before that there was one for all.
_SWITCH_PER_BACKEND = hasattr(torch.backends.cuda.matmul, "fp32_precision")


def resolve_precision(precision: str, device: torch.device, dtype: torch.dtype) -> str:
    """The precision that `auto` stands for; any other name is checked and returned.

    `auto` is fp64 for float64 embeddings, else fp16 on CUDA and fp32 elsewhere (CPUs multiply halves 60 times slower).
    ValueError for an unknown name, and for tf32 off CUDA.
    """
    if precision == "auto":
        if dtype == torch.float64:
            return "fp64"
        return "fp16" if device.type == "cuda" else "fp32"
    if precision not in OPERAND_DTYPE:
        raise ValueError(f"precision {precision!r} is unknown: choose one of auto, {', '.join(OPERAND_DTYPE)}")
    if precision == "tf32" and device.type != "cuda":
        raise ValueError(f"precision 'tf32' exists only on CUDA, and the embeddings are on {device}: choose 'fp32'")
    return precision


def accumulator_dtype(precision: str) -> torch.dtype:
    """The type of logits, statistics and gradients."""
    return torch.float64 if precision == "fp64" else torch.float32


def round_operand(values: Tensor, precision: str) -> Tensor:
    """`values` rounded to the operand type, held in the accumulator's: a half times a half is exact in float32."""
    return values.to(OPERAND_DTYPE[precision]).to(accumulator_dtype(precision))


def gradient_scale(precision: str) -> float:
    """The power of two that dL/dS is multiplied by before it is rounded to the operand type."""
    return HALF_GRADIENT_SCALE if precision in ("fp16", "bf16") else 1.0


@contextmanager
def exact_products(precision: str, device: torch.device) -> Iterator[None]:
    """Within: matrix products of float32 tensors are as exact as `precision` asks, whatever the process has set.

    A value rounded to fp16 or bf16 is exact in TF32, so the tensor cores may be used for these. Autocast is off.
    """
    tensor_cores = device.type == "cuda" and precision in ("fp16", "bf16", "tf32")
    with torch.autocast(device.type, enabled=False), _tf32(allowed=tensor_cores):
        yield


@contextmanager
def _tf32(*, allowed: bool) -> Iterator[None]:
    if not _SWITCH_PER_BACKEND:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if allowed else "highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
        return
    switches = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    settings = [switch.fp32_precision for switch in switches]
    for switch in switches:
        switch.fp32_precision = "tf32" if allowed else "ieee"
    try:
        yield
    finally:
        for switch, setting in zip(switches, settings, strict=True):
            switch.fp32_precision = setting
