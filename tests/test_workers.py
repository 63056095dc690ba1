"""The loader in a process of its own: the same batches, and what happens when either side ends."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from loading import CPU, open_loader, pipeline, read, take, tokenize
from processes import alive
from shards import write_pairs

from clipscale.data import workers
from clipscale.data.loader import Loader
from clipscale.data.workers import LoaderError

TESTS = Path(__file__).parent
pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def urls(tmp_path_factory) -> str:
    """4 shards of 25 pairs, one of them broken."""
    return write_pairs(tmp_path_factory.mktemp("pairs"), 4, 25, size=28, broken={33})


def wait_until_gone(pid: int, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while alive(pid):
        assert time.monotonic() < deadline, f"process {pid} is still there after {seconds} s"
        time.sleep(0.05)


def take_several(loader: Loader) -> None:
    """More than were filled already."""
    for _ in range(10):
        take(loader)


def test_the_same_batches_as_inline_and_a_clean_end(urls):
    expected = read(pipeline(urls, 40), 5, 40)
    loader = open_loader(pipeline(urls, 40), 40, mode="process", threads=3, block=7)
    found = [take(loader) for _ in range(5)]
    loader.close()
    assert [batch.chain() for batch in found] == [batch.chain() for batch in expected]
    assert [sorted(batch.skips) for batch in found] == [sorted(batch.skips) for batch in expected]
    wait_until_gone(loader.workers.pid, 0)


@pytest.mark.parametrize("when", ["at once", "in the middle"])
def test_a_loader_that_is_killed_is_an_error_within_seconds(urls, when):
    loader = open_loader(pipeline(urls, 40), 40, mode="process")
    if when == "in the middle":
        take(loader)
    os.kill(loader.workers.pid, signal.SIGKILL)
    begin = time.monotonic()
    with pytest.raises(LoaderError, match=r"the loader \(process \d+\) was killed by SIGKILL; .* out of memory"):
        take_several(loader)
    assert time.monotonic() - begin < 10
    loader.close()


def test_signals_to_the_whole_group_do_not_end_it(urls):
    """Also those that come while it starts."""
    expected = read(pipeline(urls, 40), 3, 40)
    loader = open_loader(pipeline(urls, 40), 40, mode="process")
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        os.kill(loader.workers.pid, number)
    found = [take(loader)]
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2):
        os.kill(loader.workers.pid, number)
    found += [take(loader), take(loader)]
    assert [batch.chain() for batch in found] == [batch.chain() for batch in expected]
    loader.close()


def test_a_loader_that_is_silent_is_an_error(urls, monkeypatch):
    monkeypatch.setattr(workers, "_SILENCE_SECONDS", 8.0)  # a sign of life comes every five
    loader = open_loader(pipeline(urls, 40), 40, mode="process")
    take(loader)
    os.kill(loader.workers.pid, signal.SIGSTOP)
    with pytest.raises(LoaderError, match=r"has been silent for 8 s"):
        take_several(loader)
    loader.close()
    wait_until_gone(loader.workers.pid, 0)


def fail(captions: list[str]) -> torch.Tensor:
    raise RuntimeError("tokenizer")


def slow(captions: list[str]) -> torch.Tensor:
    time.sleep(0.2)
    return tokenize(captions)


def test_a_fault_of_ours_comes_with_its_traceback(urls):
    loader = open_loader(dataclasses.replace(pipeline(urls, 40), tokenize=fail), 40, mode="process")
    with pytest.raises(LoaderError, match=r"(?s)the loader failed: Traceback.*RuntimeError: tokenizer"):
        take(loader)
    loader.close()


def test_close_gives_up_what_is_not_decoded(urls):
    pipe = dataclasses.replace(pipeline(urls, 192, allow_repeats=True), tokenize=slow)
    loader = open_loader(pipe, 192, mode="process", threads=1, block=16, ahead=60)
    next(next(loader).images.first(CPU))
    begin = time.monotonic()
    loader.close()
    assert time.monotonic() - begin < 5


_ENDLESS = """
import sys
from loading import open_loader, pipeline, take
from processes import alive
loader = open_loader(pipeline(sys.argv[1], 40), 40, mode="process")
take(loader)
print(loader.workers.pid, flush=True)
while True:
    take(loader)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_it_ends_with_the_training_process_however_that_ends(urls, number):
    """The signal goes to the training process alone."""
    training = subprocess.Popen(
        [sys.executable, "-c", _ENDLESS, urls], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=TESTS
    )
    loader = int(training.stdout.readline())
    assert alive(loader)
    training.send_signal(number)
    training.wait(20)
    wait_until_gone(loader, 10)
    training.stdout.close()
