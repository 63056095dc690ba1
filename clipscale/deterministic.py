"""`train.deterministic`: the same steps give the same bits on a GPU, as they do on a CPU anyway.

    prepare_cublas()                          # before CUDA starts: cuBLAS and torch look at the environment once
    with deterministic(config.train.deterministic):
        train(...)                            # torch is as it was afterwards

The loss has no atomics and needs none of this (loss/). In the towers, torch takes the deterministic form of each
operation, and refuses those that have none; attention may use any of torch's forms but cuDNN's, whose backward pass is
not repeatable.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from clipscale.errors import SharedError, require

_VARIABLE, _VALUES = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")


def prepare_cublas() -> None:
    """Set the environment variable by which cuBLAS keeps its results repeatable. No torch import.

    Raises:
        UserError: it is set to something else, or CUDA has started without it.
    """
    found = os.environ.get(_VARIABLE)
    if found is not None:
        require(
            found in _VALUES,
            f"train.deterministic=true, but {_VARIABLE}={found} is set; unset it, or set it to {_VALUES[0]}",
        )
        return
    torch = sys.modules.get("torch")
    require(
        torch is None or not torch.cuda.is_initialized(),
        f"train.deterministic=true, but CUDA has started without {_VARIABLE}; set it to {_VALUES[0]} beforehand",
    )
    os.environ[_VARIABLE] = _VALUES[0]


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Within, if it is wanted: torch's operations are repeatable, or an error.

    Raises:
        SharedError: in place of torch's error on an operation that is not.
    """
    if not wanted:
        yield
        return
    import torch

    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill, benchmark = torch.utils.deterministic.fill_uninitialized_memory, torch.backends.cudnn.benchmark
    attention = torch.backends.cuda.cudnn_sdp_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a write for each new tensor; none is read unwritten
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        with naming_who_is_not("the run"):
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory, torch.backends.cudnn.benchmark = fill, benchmark
        torch.backends.cuda.enable_cudnn_sdp(attention)


@contextmanager
def naming_who_is_not(what: str) -> Iterator[None]:
    """Torch's error on an operation of `what` that is not repeatable becomes a SharedError of one line: every rank has
    the same operations."""
    try:
        yield
    except RuntimeError as error:
        if not re.search("does not have a deterministic|deterministic behavior was enabled", str(error), re.IGNORECASE):
            raise
        why = str(error).splitlines()[0].partition(", but you set")[0]
        raise SharedError(
            f"train.deterministic=true, but an operation of {what} is not repeatable: {why}; set "
            "train.deterministic=false, or choose a tower without it"
        ) from error
