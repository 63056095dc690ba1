"""Which code computes a block: Triton kernels on a GPU, plain torch elsewhere. Both have the same two functions."""

import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from clipscale.loss import tiles
from clipscale.loss.precision import resolve_precision
from clipscale.loss.statistics import Partial

ENGINES = ("auto", "triton", "torch")


class Engine(NamedTuple):
    name: str
    logsumexp_block: Callable[..., tuple[Partial, Partial]]
    """Pass 1 over one block: see `tiles.logsumexp_block`."""
    gradient_block: Callable[..., Tensor]
    """Pass 2 over one block: see `tiles.gradient_block`."""


def resolve_engine(engine: str, device: torch.device, precision: str) -> Engine:
    """The code for `engine` (auto: triton on a GPU that can run it) at a resolved precision.

    ValueError for an unknown name, and for triton where it cannot run: fp64, a GPU before sm_80 or AMD, a CPU (unless
    Triton interprets its kernels there: TRITON_INTERPRET=1).
    """
    if engine not in ENGINES:
        raise ValueError(f"loss engine {engine!r} is unknown: choose one of {', '.join(ENGINES)}")
    obstacle = _obstacle(device, precision)
    if engine == "torch" or (engine == "auto" and (obstacle or device.type != "cuda")):
        return Engine("torch", tiles.logsumexp_block, tiles.gradient_block)
    if obstacle:
        raise ValueError(f"loss engine 'triton' {obstacle}: choose 'auto' or 'torch'")
    from clipscale.loss import kernels  # here, so that the package needs torch only

    return Engine("triton", kernels.logsumexp_block, kernels.gradient_block)


def check_engine(engine: str, precision: str, device: torch.device) -> None:
    """ValueError where float32 embeddings on `device` cannot be evaluated so."""
    resolve_engine(engine, device, resolve_precision(precision, device, torch.float32))


def tuned_shapes() -> dict[str, list]:
    """What the kernels of this process have been tuned to (`tuning.chosen`); empty where there are none."""
    tuning = sys.modules.get("clipscale.loss.tuning")
    return tuning.chosen() if tuning else {}


def adopt_shapes(shapes: dict[str, list]) -> None:
    """The inverse of `tuned_shapes`."""
    if shapes:
        from clipscale.loss import tuning

        tuning.adopt(shapes)


def _obstacle(device: torch.device, precision: str) -> str | None:
    """Why the kernels cannot run, or None."""
    if precision == "fp64":
        return "has no precision fp64"
    try:
        import triton
    except ImportError:
        return "needs the package triton, which is not installed"
    if device.type == "cpu" and triton.knobs.runtime.interpret:
        return None
    if device.type != "cuda":
        return f"needs a GPU, and the embeddings are on {device}"
    if torch.version.hip is not None:
        return "has not been tried on AMD GPUs"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"needs compute capability 8.0 or newer, and {torch.cuda.get_device_name(device)} has less"
    return None
