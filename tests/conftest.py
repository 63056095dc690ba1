"""Settings for every test, set before torch is imported."""

import os
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: a second thread costs more than it brings
os.environ.setdefault("GOMP_SPINCOUNT", "5000")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for torch.use_deterministic_algorithms on a GPU

import pytest
import torch

from clipscale.tell import listening

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # the loss kernels on CPU tensors; read when they are imported


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` skip themselves, with the reason, where there is no GPU."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU; torch finds none here")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def told() -> Iterator[list[str]]:
    """What the code under test tells (clipscale/tell.py), line by line."""
    lines: list[str] = []
    with listening(lambda line, every_rank: lines.append(line)):
        yield lines
