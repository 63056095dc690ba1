"""What a product of the loss is rounded to: the names a user may ask for, and how plain torch multiplies under each.

At B 4096, D 768 fp16's error is a seventh to a twelfth of bf16's (docs/benchmarks/precision-scale-*.md).
"""

import math
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

# fp16 ends at 65504: what is multiplied into it may reach half of that.
_HALF_TOP = 2.0**15
_LARGEST_LIFT = 2.0**100  # 1 / lift must be a float32

# torch 2.9 gave each backend its own switch; before that there was one for all.
_SWITCH_PER_BACKEND = hasattr(torch.backends.cuda.matmul, "fp32_precision")

_HALF_SUMS = (
    "allow_fp16_reduced_precision_reduction",
    "allow_bf16_reduced_precision_reduction",
    "allow_fp16_accumulation",
)


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
    if precision == "tf32":
        return round_to_tf32(values.float())
    return values.to(OPERAND_DTYPE[precision]).to(accumulator_dtype(precision))


def to_operand(values_ND: Tensor, precision: str, *, contiguous: bool, copy: bool = False) -> Tensor:
    """`values_ND` in the operand type, for every product of a call: `values_ND` itself where it is one already, unless
    a `copy` is asked for.

    Its last stride is 1; all of it is dense if `contiguous`.
    """
    original_ND = values_ND
    if precision == "tf32":
        values_ND = round_to_tf32(values_ND.float())
    operand_ND = values_ND.to(OPERAND_DTYPE[precision])
    operand_ND = operand_ND.contiguous() if contiguous or operand_ND.stride(1) != 1 else operand_ND
    return operand_ND.clone() if copy and operand_ND is original_ND else operand_ND


def round_to_tf32(values: Tensor) -> Tensor:
    """Float32 `values` rounded to the nearest TF32, which keeps 10 bits of the mantissa; ties away from zero.

    The tensor cores cut the other bits off, which is a bias as well as twice the error.
    """
    rounded = values.nan_to_num(torch.nan, torch.inf, -torch.inf)  # a copy in which every NaN has the same bits
    rounded.view(torch.int32).add_(0x1000).bitwise_and_(-0x2000)  # 0x1000 is half of the last bit that stays
    return rounded


def gradient_lift(precision: str, missing: float) -> float:
    """The power of two that p + q off the diagonal is multiplied by before it is rounded to the operand type.

    `missing` is the largest 1 - p_ii of the batch, which no p_ij of a wrong pair exceeds: so p + q is lifted to just
    below what float16 holds, and keeps its bits from 2^-29 of the largest on, however low the loss.
    """
    if precision not in ("fp16", "bf16"):
        return 1.0
    if missing <= 0.0:
        return 1.0  # there is no gradient
    return min(2.0 ** -math.ceil(math.log2(2 * missing / _HALF_TOP)), _LARGEST_LIFT)


@contextmanager
def exact_products(precision: str, device: torch.device) -> Iterator[None]:
    """Within: matrix products of float32 tensors are as exact as `precision` asks, whatever the process has set.

    A value rounded to fp16 or bf16 is exact in TF32, so the tensor cores may be used for these. Half-precision products
    are summed in float32 throughout. Autocast is off.
    """
    tensor_cores = device.type == "cuda" and precision in ("fp16", "bf16", "tf32")
    with torch.autocast(device.type, enabled=False), _tf32(allowed=tensor_cores), _no_half_sums():
        yield


@contextmanager
def _no_half_sums() -> Iterator[None]:
    """cuBLAS sums half-precision products in float32. What a newer torch lets it split is left as it is."""
    matmul = torch.backends.cuda.matmul
    settings = {name: (getattr(matmul, name), getattr(matmul, f"{name}_split_k", None)) for name in _HALF_SUMS}
    for name, (_, split_k) in settings.items():
        setattr(matmul, name, False if split_k is None else (False, split_k))
    try:
        yield
    finally:
        for name, (allowed, split_k) in settings.items():
            setattr(matmul, name, allowed if split_k is None else (allowed, split_k))


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
