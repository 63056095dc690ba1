"""One macro-tile of the loss, piece by piece: what each reaches of a plain matrix product, in every tile shape.

list(piece_rows(world))                  # {"piece": "logsumexp 128x128x64 ...", "ms": 0.89, "of matmul": 0.61}, ...

The pieces are those of `clipscale/loss/kernels.py`. Rates are on 2 M^2 D operations, which each but the merge
does once.

Shapes: M pairs of a macro-tile, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from clipscale.bench.common.failures import first_line
from clipscale.bench.gpu.timing import product_rate, timed
from clipscale.bench.loss.inputs import draw_pairs
from clipscale.dist import World
from clipscale.loss import kernels
from clipscale.loss.merge import merge
from clipscale.loss.precision import exact_products
from clipscale.loss.statistics import Partial
from clipscale.loss.tuning import INTERPRETED, Shape, candidates

_SIZES = {"cuda": (16384, 768), "cpu": (64, 16)}  # M, D
_TIMING = {"cuda": {"rounds": 8, "calls": 5}, "cpu": {"rounds": 1, "calls": 1}}
_SCALE = 14.3
_PRECISION = "fp16"


def piece_rows(world: World) -> Iterator[dict[str, Any]]:
    """Milliseconds, TFLOP/s and the share of the same run's fp16 product, as rows; last, the loss that they add up to.

    A tile shape that does not run has a note instead.
    """
    device = world.device
    size, width = _SIZES[device.type]
    rate = product_rate(_PRECISION, device).tflops
    fastest: dict[str, float] = {}

    def row(kind: str, name: str, call: Callable[[], Any], flop: int = 2 * size**2 * width) -> dict[str, Any]:
        """Measures it. `kind`: what it is one of several ways to do."""
        milliseconds = timed(call, device, **_TIMING[device.type]).device_ms
        fastest[kind] = min(milliseconds, fastest.get(kind, milliseconds))
        return _row(name, milliseconds, flop, rate)

    image_MD, text_MD = draw_pairs(range(size), width, seed=0, device=device, dtype=torch.float16)
    total_MD, g_MM = torch.zeros(size, width, device=device), torch.randn(size, size, device=device).half()
    with exact_products(_PRECISION, device):
        yield row("image", "addmm d_image += G text", partial(kernels._accumulate, total_MD, g_MM, text_MD, 1e-4))
        yield row("text", "addmm d_text += G^T image", partial(kernels._accumulate, total_MD, g_MM.T, image_MD, 1e-4))
        half_MD = torch.empty_like(text_MD)
        yield row("fp16", "G text in fp16, for comparison", lambda: torch.mm(g_MM, text_MD, out=half_MD))
        diag_M, level_M = torch.zeros(size, device=device), torch.full((size,), 0.4, device=device)
        logsumexp = partial(kernels._logsumexp_tile, image_MD, text_MD, _SCALE, size, diag_M, _PRECISION)
        gradient = partial(
            kernels._gradient_tile, image_MD, text_MD, _SCALE, size, [level_M] * 4, 0.1, g_MM, _PRECISION
        )
        for shape in _shapes(device):
            for kind, call in (("logsumexp", logsumexp), ("gradient", gradient)):
                try:
                    yield row(kind, f"{kind} {_shape_name(shape)}", partial(call, shape))
                except Exception as error:  # of the compiler, the driver, the options
                    yield {"piece": f"{kind} {_shape_name(shape)}", "note": f"failed: {first_line(error)}"}
                    if device.type == "cuda":
                        torch.cuda.synchronize()  # after an illegal access nothing runs any more: no further rows
        running = [Partial.empty(size, level_M) for _ in range(2)]
        slots = logsumexp(_shapes(device)[0])
        sides = [(one.max, one.sum, its_slots) for one, its_slots in zip(running, slots, strict=True)]
        yield row("merge", "merge of both sides", partial(merge, *sides, _SCALE), 0)
    whole = sum(fastest[kind] for kind in ("logsumexp", "gradient", "image", "text", "merge"))
    yield _row("all of one macro-tile, the fastest of each", whole, 8 * size**2 * width, rate)


def _shapes(device: torch.device) -> tuple[Shape, ...]:
    if device.type == "cpu":
        return (INTERPRETED,)
    return candidates(_PRECISION, torch.cuda.get_device_capability(device))


def _shape_name(shape: Shape) -> str:
    loads = "descriptors" if shape.descriptors else "pointers"
    size = f"{shape.rows}x{shape.columns}x{shape.depth} {shape.warps} warps {shape.stages} stages group {shape.group}"
    return f"{size} {loads}" + (f" {shape.registers} registers" if shape.registers else "")


def _row(name: str, milliseconds: float, flop: int, rate: float) -> dict[str, Any]:
    if not flop:
        return {"piece": name, "ms": milliseconds}
    tflops = flop / milliseconds / 1e9
    return {"piece": name, "ms": milliseconds, "TFLOP/s": tflops, "of matmul": tflops / rate}
