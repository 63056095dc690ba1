"""Triton's interpreter on NumPy: mended where NumPy 2.4 broke it, and its matrix products for a rival to use.

    from interpreter import TileProduct        # importing mends; without a GPU, TRITON_INTERPRET=1 does the rest

Shapes: B pairs, D width, R and C rows and columns of a tile.
"""

import itertools
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

_patch_tensor, _patch_language = interpreter._patch_lang_tensor, interpreter._patch_lang
_find_np_dtype = interpreter._get_np_dtype
_patched: set[str] = set()
_np_dtypes: dict[str, np.dtype] = {}


def _patch_lang_tensor(tensor: type, *scope: object) -> None:
    """Triton 3.4 to 3.6 take int() of an array of one element, which NumPy 2.4 refuses."""
    _patch_tensor(tensor, *scope)
    tensor.__index__ = lambda self: self.handle.data.item()


def _patch_lang(fn: Callable) -> SimpleNamespace:
    """Once for the kernels of a module, and for good: at every call it is a third of the interpreter's time."""
    if fn.__module__ not in _patched:
        _patched.add(fn.__module__)
        _patch_language(fn)
    return SimpleNamespace(restore=lambda: None)


def _get_np_dtype(dtype: tl.dtype) -> np.dtype:
    """Once for each type: a table of all of them, made anew for every value, is a tenth of the interpreter's time."""
    name = dtype.scalar.name
    if name not in _np_dtypes:
        _np_dtypes[name] = _find_np_dtype(dtype)
    return _np_dtypes[name]


interpreter._patch_lang_tensor, interpreter._patch_lang = _patch_lang_tensor, _patch_lang
interpreter._get_np_dtype = _get_np_dtype


class TileProduct(torch.autograd.Function):
    """image text^T [B, B] in float32, summed as the interpreted kernels sum it: by NumPy, tile by tile, slice by slice,
    each in steps.

    NumPy and torch bring a matrix library each, which choose an order of sums by CPU and size: of two pairs at scale
    100, one may be twice as exact as the other. So the interpreted kernels' rival takes its products from here.
    """

    @staticmethod
    def forward(ctx, image_BD: Tensor, text_BD: Tensor, rows: int, columns: int, depth: int, step: int) -> Tensor:
        ctx.save_for_backward(image_BD, text_BD)
        pairs, width = image_BD.shape
        image_RD = F.pad(image_BD, (0, -width % depth, 0, -pairs % rows)).numpy()
        text_CD = F.pad(text_BD, (0, -width % depth, 0, -pairs % columns)).numpy()
        product = np.zeros((len(image_RD), len(text_CD)), np.float32)
        for r, c in itertools.product(range(0, pairs, rows), range(0, pairs, columns)):
            for d in range(0, width, depth):
                parts = [
                    (side[:, k : k + step].copy() for side in (image_RD[r : r + rows], text_CD[c : c + columns]))
                    for k in range(d, d + depth, step)
                ]
                product[r : r + rows, c : c + columns] += sum(np.matmul(image, text.T) for image, text in parts)
        return torch.from_numpy(product)[:pairs, :pairs]

    @staticmethod
    def backward(ctx, grad_BB: Tensor) -> tuple:
        image_BD, text_BD = ctx.saved_tensors
        return grad_BB @ text_BD, grad_BB.T @ image_BD, None, None, None, None
