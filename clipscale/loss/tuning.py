"""Which tile shape a kernel runs with: the fastest of a few, timed once a machine and then remembered in a file.

    shape = tuned("gradient", image_RD, text_CD, "fp16", visit)      # visit(shape) launches the kernel

A restart reads the file, so it does not tune again and computes the same bits. The file is `kernels.json` in the
user's cache folder ($XDG_CACHE_HOME/clipscale, else ~/.cache/clipscale); its keys name all that a choice depends on,
and beside each choice stand the times of all candidates. A checkpoint holds the choices too, for a resume on a machine
without that file. CLIPSCALE_TUNE=0 takes the first of a list, untimed.
"""

import hashlib
import os
from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
import triton
import triton.testing
from torch import Tensor
from triton.errors import TritonError

from clipscale.remembered import Remembered
from clipscale.tell import tell


class Shape(NamedTuple):
    """A tile, and what computes it."""

    rows: int
    columns: int
    depth: int
    """Of the slices of the operands that are multiplied at a time."""
    warps: int
    stages: int
    """Slices in flight."""
    group: int = 8
    """Rows of tiles that are visited together, so that operands are met again in the cache."""
    descriptors: bool = False
    """Loads and stores by tensor descriptors (TMA), where alignment allows them."""
    registers: int | None = None
    """Most registers a thread may have where it loads by descriptors (addresses take more): 128 let two programs of 8
    warps share a multiprocessor."""

    def options(self, descriptors: bool) -> dict[str, int]:
        """For the compiler."""
        options = {"num_warps": self.warps, "num_stages": self.stages}
        return options | ({"maxnreg": self.registers} if descriptors and self.registers else {})


INTERPRETED = Shape(64, 64, 64, 4, 1)
"""For Triton's interpreter, which has nothing to tune."""

_AMPERE = (Shape(128, 128, 32, 4, 4), Shape(128, 128, 32, 8, 3), Shape(64, 128, 64, 4, 3), Shape(128, 64, 64, 4, 3))
_HOPPER = (
    Shape(128, 128, 64, 8, 3, descriptors=True, registers=128),
    Shape(128, 128, 64, 8, 3),
    Shape(256, 128, 64, 8, 4, descriptors=True),
    Shape(128, 256, 64, 8, 4, descriptors=True),
    Shape(128, 128, 64, 4, 3, descriptors=True),
)
_BLACKWELL = (Shape(128, 128, 64, 8, 3, descriptors=True), Shape(128, 128, 64, 8, 3))
_TF32 = (Shape(128, 128, 32, 8, 3), Shape(128, 128, 32, 8, 3, descriptors=True))
_TF32_AMPERE = (Shape(128, 128, 32, 8, 3), Shape(64, 128, 32, 4, 3))
_FLOAT32 = (Shape(64, 64, 64, 4, 2), Shape(128, 64, 64, 8, 2), Shape(64, 64, 32, 4, 2))


def candidates(precision: str, capability: tuple[int, int]) -> tuple[Shape, ...]:
    """The shapes worth timing on a GPU of this compute capability, the likeliest first.

    None of them spills registers (Triton 3.6 and 3.9): `tests/test_loss_compile.py` compiles each.
    """
    if precision == "fp32":
        return _FLOAT32
    family = {9: _HOPPER, 10: _BLACKWELL}.get(capability[0])
    if precision == "tf32":
        return _TF32 if family else _TF32_AMPERE
    return family or _AMPERE


_DOES_NOT_FIT = ("PassManager::run failed", "[CUDA]: invalid argument", "[CUDA]: out of memory", "out of resource")
"""Found in an error that has no class of its own: of Triton's compiler, and of a driver that refuses to load or launch
a kernel, before anything ran."""

_chosen: dict[str, Shape] = {}
_KERNELS = Remembered("kernels.json", "loss kernels", check=lambda record: Shape(*record["shape"]))


def tuned(kernel: str, image_RD: Tensor, text_CD: Tensor, precision: str, visit: Callable[[Shape], object]) -> Shape:
    """The shape for this kernel at operands like these; `visit` runs it on them, as often as it takes to time it."""
    if image_RD.device.type == "cpu":
        return INTERPRETED
    shapes = candidates(precision, torch.cuda.get_device_capability(image_RD.device))
    if os.environ.get("CLIPSCALE_TUNE") == "0":
        return shapes[0]
    key = _key(kernel, image_RD, text_CD, precision)
    if key not in _chosen:
        _chosen[key] = _remembered(key) or _remember(key, _timed(key, shapes, visit))
    return _chosen[key]


def chosen() -> dict[str, list]:
    """What has been chosen in this process, as JSON can hold it: for a checkpoint."""
    return {key: [*shape] for key, shape in _chosen.items()}


def adopt(choices: dict[str, list]) -> None:
    """Take over what `chosen` told elsewhere. Keys that do not fit this machine or these kernels never match."""
    _chosen.update({key: Shape(*shape) for key, shape in choices.items()})


def _key(kernel: str, image_RD: Tensor, text_CD: Tensor, precision: str) -> str:
    """All that a choice depends on; sizes to the next power of two, so that a few masked samples change nothing."""
    sizes = [1 << (len(side) - 1).bit_length() for side in (image_RD, text_CD)]
    device = torch.cuda.get_device_name(image_RD.device)
    return (
        f"{kernel} {precision} {sizes[0]} x {sizes[1]} x {text_CD.shape[1]} on {device}, "
        f"triton {triton.__version__}, source {_source_hash()}"
    )


@cache
def _source_hash() -> str:
    """Of the kernels and of the candidates: what was chosen among others is no choice."""
    files = (Path(__file__).with_name("kernels.py"), Path(__file__))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def _timed(key: str, shapes: Iterable[Shape], visit: Callable[[Shape], object]) -> dict[Shape, float]:
    """Median milliseconds, the fastest first. A shape that does not compile or fit is left out.

    RuntimeError if none is left; and for any other fault of the device, which after an illegal access fails every
    shape alike.
    """
    times = {}
    for shape in shapes:
        try:
            times[shape] = triton.testing.do_bench(partial(visit, shape), return_mode="median")
        except torch.OutOfMemoryError:
            raise
        except (TritonError, RuntimeError, AssertionError, KeyError) as error:  # the compiler, the driver, the options
            if isinstance(error, RuntimeError) and not any(sign in str(error) for sign in _DOES_NOT_FIT):
                raise RuntimeError(
                    f"{key}: {shape} failed while it was timed, and not because it does not compile or fit: {error}; "
                    "choose engine='torch', and run with CUDA_LAUNCH_BLOCKING=1 to see which kernel it was"
                ) from error
            tell(f"{key}: {shape} is left out: {error}")
    if not times:
        raise RuntimeError(f"none of the loss kernel's shapes runs ({key}): choose engine='torch'")
    return dict(sorted(times.items(), key=lambda item: item[1]))


def _remember(key: str, times: dict[Shape, float]) -> Shape:
    """Write the choice down, and what it was chosen among. Ranks that tuned at the same time end with one choice."""
    shape = next(iter(times))
    tell(f"{key}: {shape} in {times[shape]:.3f} ms, of {len(times)} timed")
    timings = [[*timed, milliseconds] for timed, milliseconds in times.items()]
    return Shape(*_KERNELS.keep(key, {"shape": [*shape], "timings": timings})["shape"])


def _remembered(key: str) -> Shape | None:
    record = _KERNELS.find(key)
    return record and Shape(*record["shape"])
