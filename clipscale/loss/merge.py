"""Statistics of a macro-tile's tiles into the running ones of its rows and columns, in one launch.

    merge((rows.max, rows.sum, row_slots), (columns.max, columns.sum, column_slots), scale)

`kernels.py` has what writes the slots.

Shapes: M rows and N columns of the macro-tile, R of them in a program, K slots at a time.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

_ROWS, _SLOTS = 32, 16


def merge(rows: tuple[Tensor, Tensor, Tensor], columns: tuple[Tensor, Tensor, Tensor], scale: float) -> None:
    """Of each side: slots [2, tiles, R] into its running max and sum, in place."""
    sides = [(*side, side[0].shape[0], side[2].shape[1]) for side in (rows, columns)]
    programs = sum(triton.cdiv(side[3], _ROWS) for side in sides)
    # One warp: each thread has a row, and merges its slots in one order, however many rows a program has.
    _merge_kernel[(programs,)](*sides[0], *sides[1], scale / math.log(2), _ROWS, _SLOTS, num_warps=1)


@triton.jit
def finite(peak):
    """0 for -inf (nothing seen), so that -inf - peak is not NaN."""
    return tl.where(peak == float("-inf"), 0.0, peak)


@triton.jit(do_not_specialize=["M", "slots_M", "N", "slots_N"])
def _merge_kernel(
    max_M, sum_M, slots_M_ptr, M, slots_M, max_N, sum_N, slots_N_ptr, N, slots_N, scale_log2,
    ROWS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Both sides' running statistics: the rows' programs come first, then the columns'."""
    first = tl.program_id(0) * ROWS
    rows = tl.cdiv(M, ROWS) * ROWS
    if first < rows:
        _merge_side(first, max_M, sum_M, slots_M_ptr, M, slots_M, scale_log2, ROWS, SLOTS)
    else:
        _merge_side(first - rows, max_N, sum_N, slots_N_ptr, N, slots_N, scale_log2, ROWS, SLOTS)


@triton.jit
def _merge_side(first_row, max_ptr, sum_ptr, slots_ptr, M, slots, scale_log2, ROWS: tl.constexpr, SLOTS: tl.constexpr):
    """Running statistics [M], in place, with slots [2, slots, M] merged in order: `Partial.merge`."""
    rows_R = first_row + tl.arange(0, ROWS)
    max_R = tl.load(max_ptr + rows_R, mask=rows_R < M, other=float("-inf"))
    sum_R = tl.load(sum_ptr + rows_R, mask=rows_R < M, other=0.0)
    for first in range(0, slots, SLOTS):
        slots_K = first + tl.arange(0, SLOTS)
        inside_KR = (slots_K < slots)[:, None] & (rows_R < M)[None, :]
        slot_KR = slots_ptr + slots_K.to(tl.int64)[:, None] * M + rows_R[None, :]
        max_KR = tl.load(slot_KR, mask=inside_KR, other=float("-inf"))
        sum_KR = tl.load(slot_KR + slots.to(tl.int64) * M, mask=inside_KR, other=0.0)
        peak_R = tl.maximum(max_R, tl.max(max_KR, 0))
        base_R = finite(peak_R)
        sum_R *= tl.exp2((max_R - base_R) * scale_log2)
        sum_R += tl.sum(sum_KR * tl.exp2((max_KR - base_R[None, :]) * scale_log2), 0)
        max_R = peak_R
    tl.store(max_ptr + rows_R, max_R, mask=rows_R < M)
    tl.store(sum_ptr + rows_R, sum_R, mask=rows_R < M)
