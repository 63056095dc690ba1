"""The two functions of `tiles.py` as Triton kernels: the same block, at the speed of matrix products.

    launcher          kernel              what one program does with its tile of X = image text^T
    logsumexp_block   _logsumexp_kernel   partial statistics of its rows and of its columns, into slots of their own
    `merge.merge`     _merge_kernel       (slots into the running statistics, in a fixed order)
    gradient_block    _gradient_kernel    G = p + q, in the operands' type, into a workspace
                      torch.addmm         (d_image += G text and d_text += G^T image, with float32 sums)

A block is cut into macro-tiles of `tile` rows and columns, so that slots and workspace do not grow with it. Pass 1 does
2 B^2 D operations and pass 2 does 6. A kernel that also kept d_image and d_text would need float32 accumulators of
tile x D beside X: 393 KB for 128 rows at D 768, where a multiprocessor has 256 KB of registers. Hence the workspace,
and the library's products, which do 4 of the 8 B^2 D.

No atomics: a slot has one writer, and sums have one order, so that the same inputs give the same bits.

Shapes: M image rows and N text rows of the block, D width; R and C rows and columns of a tile, K a slice of D.
"""

import math
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from clipscale.loss.merge import finite, merge
from clipscale.loss.precision import OPERAND_DTYPE, exact_products
from clipscale.loss.statistics import Partial, Softmax
from clipscale.loss.tiles import tiles_of
from clipscale.loss.tuning import Shape, tuned

WORKSPACE_BYTES = 512 << 20
"""What G of a macro-tile may take, unless `tile` says otherwise."""

_LOW = tl.constexpr(-1e30)
"""A similarity whose exponential is 0 at any scale above 1e-27, and 0 times its distance from any other too."""

_CHAIN = tl.constexpr(16)
"""How many products float32 sums one after the other; it divides every depth."""

# Up to 2.9, and perhaps 2.10, torch.addmm takes half-precision operands to a float32 result but no float32 addend.
_ADDMM_WIDENS = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 11)


@triton.jit
def _tile_origin(tile, M, N, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """First row and column of a tile: GROUP tiles down, then one to the right, so that operands are met again in L2."""
    row_tiles = tl.cdiv(M, ROWS)
    per_group = GROUP * tl.cdiv(N, COLUMNS)
    first = tile // per_group * GROUP
    height = tl.minimum(row_tiles - first, GROUP)
    return (first + tile % per_group % height) * ROWS, tile % per_group // height * COLUMNS


@triton.jit
def _similarities(
    image, text, row, column, M, N, D, image_stride, text_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """X [R, C] of a tile, in float32. What lies beyond M or N is finite and has no meaning.

    Under fp32 no sum is long: of at most `_CHAIN` products, of these within a slice, and of slices. One chain of D
    fused additions would have 6 times the error at D 768. Triton makes that chain of dot(a, b) + c as well, unless
    max_num_imprecise_acc is given, which means nothing else here.
    """
    dot: tl.constexpr = "tf32" if PRECISION == "tf32" else "ieee"
    STEP: tl.constexpr = _CHAIN if PRECISION == "fp32" else DEPTH
    x_RC = tl.zeros([ROWS, COLUMNS], tl.float32)
    if not DESCRIPTORS:
        rows_R = tl.minimum(row + tl.arange(0, ROWS), M - 1).to(tl.int64)
        columns_C = tl.minimum(column + tl.arange(0, COLUMNS), N - 1).to(tl.int64)
        depth_K = tl.arange(0, STEP)
        image_RK = image + rows_R[:, None] * image_stride + depth_K[None, :]
        text_KC = text + columns_C[None, :] * text_stride + depth_K[:, None]
    for d in range(0, D, DEPTH):
        slice_RC = tl.zeros([ROWS, COLUMNS], tl.float32)
        for k in tl.static_range(0, DEPTH, STEP):
            if DESCRIPTORS:
                part_RK, part_KC = image.load([row, d + k]), text.load([column, d + k]).T
            else:
                inside_K = depth_K < D - d - k
                part_RK = tl.load(image_RK + d + k, mask=inside_K[None, :], other=0.0)
                part_KC = tl.load(text_KC + d + k, mask=inside_K[:, None], other=0.0)
            if PRECISION == "fp32":
                slice_RC += tl.dot(part_RK, part_KC, input_precision=dot, max_num_imprecise_acc=STEP)
            else:
                x_RC = tl.dot(part_RK, part_KC, x_RC, input_precision=dot)
        if PRECISION == "fp32":
            x_RC += slice_RC
    return x_RC


@triton.jit
def _power(x_RC, level, scale_log2, PRECISION: tl.constexpr):
    """2^(scale_log2 (X - level)): below float32's precision by one fused multiplication and addition an entry."""
    if PRECISION == "fp32":
        return tl.exp2((x_RC - level) * scale_log2)
    return tl.exp2(x_RC * scale_log2 - level * scale_log2)


@triton.jit(do_not_specialize=["M", "N", "offset"])
def _logsumexp_kernel(
    image, text, M, N, D, image_stride, text_stride, offset, scale_log2, row_slots, column_slots, diag,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
    DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Row i's right pair is column i + offset, of which there is none at an offset of N or more.

    row_slots [2, ceil(N / C), M] and column_slots [2, ceil(M / R), N] take each tile's largest X and its sum of
    2^(scale_log2 (X - max)) over wrong pairs (`Partial`); diag [M] takes X_ii.
    """
    row, column = _tile_origin(tl.program_id(0), M, N, ROWS, COLUMNS, GROUP)
    x_RC = _similarities(
        image, text, row, column, M, N, D, image_stride, text_stride, ROWS, COLUMNS, DEPTH, DESCRIPTORS, PRECISION
    )
    rows_R = row + tl.arange(0, ROWS)
    columns_C = column + tl.arange(0, COLUMNS)
    if row + offset < column + COLUMNS and column < row + offset + ROWS:
        right_RC = (rows_R + offset)[:, None] == columns_C[None, :]
        diag_R = tl.sum(tl.where(right_RC, x_RC, 0.0), 1)
        mine_R = (rows_R + offset >= column) & (rows_R + offset < tl.minimum(column + COLUMNS, N)) & (rows_R < M)
        tl.store(diag + rows_R, diag_R, mask=mine_R)
        x_RC = tl.where(right_RC, float("-inf"), x_RC)
    if row + ROWS > M or column + COLUMNS > N:
        x_RC = tl.where((rows_R < M)[:, None] & (columns_C < N)[None, :], x_RC, float("-inf"))

    slot_R = row_slots + (column // COLUMNS).to(tl.int64) * M + rows_R
    max_R = tl.max(x_RC, 1)
    sum_R = tl.sum(_power(x_RC, finite(max_R)[:, None], scale_log2, PRECISION), 1)
    tl.store(slot_R, max_R, mask=rows_R < M)
    tl.store(slot_R + tl.cdiv(N, COLUMNS).to(tl.int64) * M, sum_R, mask=rows_R < M)

    slot_C = column_slots + (row // ROWS).to(tl.int64) * N + columns_C
    max_C = tl.max(x_RC, 0)
    sum_C = tl.sum(_power(x_RC, finite(max_C)[None, :], scale_log2, PRECISION), 0)
    tl.store(slot_C, max_C, mask=columns_C < N)
    tl.store(slot_C + tl.cdiv(M, ROWS).to(tl.int64) * N, sum_C, mask=columns_C < N)


@triton.jit(do_not_specialize=["M", "N", "offset"])
def _gradient_kernel(
    image, text, M, N, D, image_stride, text_stride, offset, scale_log2,
    row_level, row_factor, column_level, column_factor, origin, g, g_stride, d_scale_slots,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
    DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """g [M, N] = lift (p + q) off the diagonal, which row i has at column i + offset, and 0 there. Rows are padded to a
    multiple of 16 entries.

    lift p_ij = 2^(scale_log2 (X_ij - level_i)), times factor_i in fp32 (`_levels`), and q alike with the columns'.
    d_scale_slots takes each tile's sum of g (X - origin), before g is rounded.
    """
    row, column = _tile_origin(tl.program_id(0), M, N, ROWS, COLUMNS, GROUP)
    x_RC = _similarities(
        image, text, row, column, M, N, D, image_stride, text_stride, ROWS, COLUMNS, DEPTH, DESCRIPTORS, PRECISION
    )
    rows_R = row + tl.arange(0, ROWS)
    columns_C = column + tl.arange(0, COLUMNS)
    if row + offset < column + COLUMNS and column < row + offset + ROWS:
        x_RC = tl.where((rows_R + offset)[:, None] == columns_C[None, :], _LOW, x_RC)
    if row + ROWS > M or column + COLUMNS > N:
        x_RC = tl.where((rows_R < M)[:, None] & (columns_C < N)[None, :], x_RC, _LOW)
    level_R = tl.load(row_level + rows_R, mask=rows_R < M, other=0.0)
    level_C = tl.load(column_level + columns_C, mask=columns_C < N, other=0.0)
    p_RC = _power(x_RC, level_R[:, None], scale_log2, PRECISION)
    q_RC = _power(x_RC, level_C[None, :], scale_log2, PRECISION)
    if PRECISION == "fp32":
        p_RC *= tl.load(row_factor + rows_R, mask=rows_R < M, other=0.0)[:, None]
        q_RC *= tl.load(column_factor + columns_C, mask=columns_C < N, other=0.0)[None, :]
    g_RC = p_RC + q_RC
    tl.store(d_scale_slots + tl.program_id(0), tl.sum(g_RC * (x_RC - origin)))
    if PRECISION == "tf32":  # to nearest: the tensor cores cut off what tf32 has no bits for
        g_RC = ((g_RC.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    if DESCRIPTORS:
        g.store([row, column], g_RC.to(g.dtype))
    else:
        g_ptr = g + row.to(tl.int64) * g_stride + column
        g_ptr += (tl.arange(0, ROWS) * g_stride)[:, None] + tl.arange(0, COLUMNS)[None, :]
        # Up to the end of a row's padding, where g is 0: so the compiler sees that it may store 16 entries together.
        inside_RC = (rows_R < M)[:, None] & (columns_C < tl.cdiv(N, 16) * 16)[None, :]
        tl.store(g_ptr, g_RC.to(g.dtype.element_ty), mask=inside_RC)


def logsumexp_block(
    image_MD: Tensor,
    text_ND: Tensor,
    logit_scale: float,
    *,
    diagonal: bool,
    precision: str,
    tile: int | None = None,
) -> tuple[Partial, Partial]:
    """Pass 1 over one block of operands (`precision.to_operand`): `tiles.logsumexp_block`.

    `tile`: rows and columns that are worked on between merges.
    """
    rows, columns = (Partial.empty(len(side), side.new_empty(0, dtype=torch.float32)) for side in (image_MD, text_ND))
    shape = None
    with torch.cuda.device_of(image_MD):
        for row_slice, column_slice in tiles_of(len(image_MD), len(text_ND), tile or _default_tile(precision)):
            image_RD, text_CD = image_MD[row_slice], text_ND[column_slice]
            offset = _offset(row_slice, column_slice, diagonal)
            visit = partial(_logsumexp_tile, image_RD, text_CD, logit_scale, offset, rows.diag[row_slice], precision)
            shape = shape or tuned("logsumexp", image_RD, text_CD, precision, visit)
            row_slots, column_slots = visit(shape)
            own = (rows.max[row_slice], rows.sum[row_slice], row_slots)
            merge(own, (columns.max[column_slice], columns.sum[column_slice], column_slots), logit_scale)
    if diagonal:
        columns.diag.copy_(rows.diag)
    return rows, columns


def gradient_block(
    image_MD: Tensor,
    text_ND: Tensor,
    logit_scale: float,
    rows: Softmax,
    columns: Softmax,
    d_image_MD: Tensor | None,
    d_text_ND: Tensor | None,
    *,
    origin: float,
    lift: float,
    diagonal: bool,
    precision: str,
    tile: int | None = None,
) -> Tensor:
    """Pass 2 over one block of operands (`precision.to_operand`): `tiles.gradient_block`.

    `tile`: rows and columns of G that exist at a time.
    """
    d_scale = image_MD.new_zeros((), dtype=torch.float64)
    tile = tile or _default_tile(precision)
    row_levels, column_levels = (_levels(side, logit_scale, lift, precision) for side in (rows, columns))
    g_RC = image_MD.new_empty(min(len(image_MD), tile), triton.cdiv(min(len(text_ND), tile), 16) * 16)
    shape = None
    with torch.cuda.device_of(image_MD), exact_products(precision, image_MD.device):
        for row_slice, column_slice in tiles_of(len(image_MD), len(text_ND), tile):
            image_RD, text_CD = image_MD[row_slice], text_ND[column_slice]
            part_RC = g_RC[: len(image_RD), : len(text_CD)]
            levels = [level[row_slice] for level in row_levels] + [level[column_slice] for level in column_levels]
            offset = _offset(row_slice, column_slice, diagonal)
            visit = partial(_gradient_tile, image_RD, text_CD, logit_scale, offset, levels, origin, part_RC, precision)
            shape = shape or tuned("gradient", image_RD, text_CD, precision, visit)
            d_scale += visit(shape).sum(dtype=torch.float64)
            if d_image_MD is not None:
                _accumulate(d_image_MD[row_slice], part_RC, text_CD, 1 / lift)
            if d_text_ND is not None:
                _accumulate(d_text_ND[column_slice], part_RC.T, image_RD, 1 / lift)
    return d_scale / lift


def _default_tile(precision: str) -> int:
    """The largest power of two whose G keeps to the workspace."""
    return 1 << int(math.log2(WORKSPACE_BYTES / OPERAND_DTYPE[precision].itemsize) / 2)


def _offset(row_slice: slice, column_slice: slice, diagonal: bool) -> int:
    """Row i of the macro-tile pairs with its column i + offset; one that lies outside if there are no right pairs."""
    return row_slice.start - column_slice.start if diagonal else column_slice.stop - column_slice.start


def _levels(softmax: Softmax, scale: float, lift: float, precision: str) -> tuple[Tensor, Tensor]:
    """(level, factor) such that lift p_ij = exp(s (X_ij - level_i)) factor_i.

    Below float32's precision the factor is moved into the level (and what is returned as one is not read). Its rounding
    costs p of normalised embeddings up to 1e-5 of itself at a scale of 100, where fp16 rounds p to 5e-4, and the kernel
    is spared the registers of one more value a column.
    """
    if precision == "fp32":
        return softmax.peak, softmax.inverse * lift
    level = softmax.inverse.log().add_(math.log(lift)).div_(-scale).add_(softmax.peak)
    return level, level


def _logsumexp_tile(
    image_RD: Tensor, text_CD: Tensor, scale: float, offset: int, diag_R: Tensor, precision: str, shape: Shape
) -> tuple[Tensor, Tensor]:
    """Slots of a macro-tile's rows [2, tiles across, R] and columns [2, tiles down, C]; X_ii goes to `diag_R`."""
    row_slots = diag_R.new_empty(2, triton.cdiv(len(text_CD), shape.columns), len(image_RD))
    column_slots = diag_R.new_empty(2, triton.cdiv(len(image_RD), shape.rows), len(text_CD))
    descriptors = shape.descriptors and all(map(_describable, (image_RD, text_CD)))
    others = (row_slots, column_slots, diag_R)
    _launch(_logsumexp_kernel, image_RD, text_CD, scale, offset, others, precision, shape, descriptors)
    return row_slots, column_slots


def _gradient_tile(
    image_RD: Tensor,
    text_CD: Tensor,
    scale: float,
    offset: int,
    levels: list[Tensor],
    origin: float,
    g_RC: Tensor,
    precision: str,
    shape: Shape,
) -> Tensor:
    """G of a macro-tile, into `g_RC`; returns each tile's sum of g (X - origin), [tiles]."""
    d_scale_slots = levels[0].new_empty(_programs(image_RD, text_CD, shape))
    descriptors = shape.descriptors and all(map(_describable, (image_RD, text_CD, g_RC)))
    g = TensorDescriptor.from_tensor(g_RC, [shape.rows, shape.columns]) if descriptors else g_RC
    others = (*levels, origin, g, g_RC.stride(0), d_scale_slots)
    _launch(_gradient_kernel, image_RD, text_CD, scale, offset, others, precision, shape, descriptors)
    return d_scale_slots


def _launch(
    kernel: triton.JITFunction,
    image_RD: Tensor,
    text_CD: Tensor,
    scale: float,
    offset: int,
    others: tuple,
    precision: str,
    shape: Shape,
    descriptors: bool,
) -> None:
    """One program a tile, with the arguments that both kernels begin and end with."""
    image, text = image_RD, text_CD
    if descriptors:
        step = _CHAIN.value if precision == "fp32" else shape.depth
        image = TensorDescriptor.from_tensor(image_RD, [shape.rows, step])
        text = TensorDescriptor.from_tensor(text_CD, [shape.columns, step])
    extents = (*image_RD.shape[:1], *text_CD.shape, image_RD.stride(0), text_CD.stride(0))
    kernel[(_programs(image_RD, text_CD, shape),)](
        image, text, *extents, offset, scale / math.log(2), *others,
        shape.rows, shape.columns, shape.depth, shape.group, descriptors, precision, **shape.options(descriptors),
    )  # fmt: skip


def _programs(image_RD: Tensor, text_CD: Tensor, shape: Shape) -> int:
    return triton.cdiv(len(image_RD), shape.rows) * triton.cdiv(len(text_CD), shape.columns)


def _describable(values_RD: Tensor) -> bool:
    """Whether a tensor descriptor can hold it: rows that do not overlap, a base that 16 bytes divide and a stride that
    16 entries divide."""
    stride = values_RD.stride(0)
    return values_RD.data_ptr() % 16 == 0 and stride % 16 == 0 and stride >= values_RD.shape[1]


def _accumulate(total: Tensor, left: Tensor, right: Tensor, alpha: float) -> None:
    """total += alpha left right, in place, summed in `total`'s type."""
    if left.dtype == total.dtype:
        total.addmm_(left, right, alpha=alpha)
    elif total.is_cuda and _ADDMM_WIDENS:
        torch.addmm(total, left, right, out_dtype=total.dtype, alpha=alpha, out=total)
    elif total.is_cuda:
        total.add_(torch.mm(left, right, out_dtype=total.dtype), alpha=alpha)
    else:  # the interpreter: torch has no such product on a CPU
        total.addmm_(left.to(total.dtype), right.to(total.dtype), alpha=alpha)
