"""Settings for every test, set before torch is imported; optional components; and the order of the files."""

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: a second thread costs more than it brings
os.environ.setdefault("GOMP_SPINCOUNT", "5000")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for torch.use_deterministic_algorithms on a GPU
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # or each of some hundred processes compiles the package anew
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="clipscale-tests-")  # never the user's; one a test process

import components
import forks
import pytest
import torch
from http_server import Server, serve

from clipscale.data.pixels.decode import center_square
from clipscale.pool import map_in_processes
from clipscale.tell import listening

# Ignored in a job that a shell put in the background, and under nohup.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # the loss kernels on CPU tensors; read when they are imported

LONGEST_FIRST = (
    *("test_quickstart", "test_step_memory", "test_loss_kernels", "test_resume", "test_watchdog", "test_workers"),
    *("test_loss_compile", "test_export", "test_bench_gpu", "test_remote", "test_make_shards", "test_bench_data"),
    *("test_ranks", "test_evaluations", "test_train", "test_zeroshot", "test_wheel", "test_tokenize"),
)
"""Files that begin early, so that with several processes (a file to each at a time) none has the last one alone."""


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(components)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


def pytest_unconfigure() -> None:
    forks.close()
    shutil.rmtree(os.environ["XDG_CACHE_HOME"], ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def warm_fork_server() -> None:
    """In a long session pool.py's fork server begins with torch: it stays as it begins, and each process that it forks
    for packing or checking would import torch anew."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        list(map_in_processes(center_square, [1, 2], 2, 3))


@pytest.fixture
def told() -> Iterator[list[str]]:
    """What the code under test tells (clipscale/tell.py), line by line."""
    lines: list[str] = []
    with listening(lambda line, every_rank: lines.append(line)):
        yield lines


@pytest.fixture
def server(tmp_path) -> Iterator[Server]:
    """A web server over the empty folder tmp_path/served; some files have one of their own."""
    (tmp_path / "served").mkdir()
    with serve(tmp_path / "served") as running:
        yield running
