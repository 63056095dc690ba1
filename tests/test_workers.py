"""The loader in a process of its own: the same batches, and what happens when either side ends."""

from __future__ import annotations

import dataclasses
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from forks import start
from loading import CPU, open_loader, pipeline, read, take, tokenize
from processes import alive, wait_until
from shards import write_pairs

from clipscale.data.load import workers
from clipscale.data.load.fill import Job
from clipscale.data.load.loader import Loader
from clipscale.data.load.workers import LoaderError
from clipscale.tell import listening, tell

TESTS = Path(__file__).parent
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def urls(tmp_path_factory) -> str:
    """4 shards of 25 pairs, one of them broken."""
    return write_pairs(tmp_path_factory.mktemp("pairs"), 4, 25, size=28, broken={33})


def take_several(loader: Loader) -> None:
    """More than were filled already."""
    for _ in range(10):
        take(loader)


def test_the_same_batches_as_inline_and_a_clean_end(urls):
    expected = read(pipeline(urls, 40), 5, 40)
    loader = open_loader(pipeline(urls, 40), 40, mode="process", threads=3, chunk=7)
    found = [take(loader) for _ in range(5)]
    loader.close()
    assert [batch.chain() for batch in found] == [batch.chain() for batch in expected]
    assert [sorted(batch.skips) for batch in found] == [sorted(batch.skips) for batch in expected]
    assert not alive(loader.workers.pid)


def tokenize_and_tell(captions: list[str]) -> torch.Tensor:
    tell(f"process {os.getpid()} tells", every_rank=True)
    return tokenize(captions)


@pytest.mark.slow
def test_what_the_loaders_process_tells_is_heard_here(urls):
    heard = []
    loader = open_loader(dataclasses.replace(pipeline(urls, 40), tokenize=tokenize_and_tell), 40, mode="process")
    with listening(lambda *told: heard.append(told)):
        take(loader)
    loader.close()
    assert set(heard) == {(f"process {loader.workers.pid} tells", True)}


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


@pytest.mark.slow
def test_signals_to_it_do_not_end_it(urls):
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
    loader = open_loader(pipeline(urls, 40), 40, mode="process")
    take(loader)
    monkeypatch.setattr(workers, "_SILENCE_SECONDS", 1)  # from now on: its imports may take longer
    os.kill(loader.workers.pid, signal.SIGSTOP)
    with pytest.raises(LoaderError, match=r"has been silent for 1 s"):
        take_several(loader)
    loader.close()
    assert not alive(loader.workers.pid)


_SUSPENDED = """
import dataclasses
from loading import open_loader, pipeline, take
from test_workers import slow
from clipscale.data.load import workers
pipe = dataclasses.replace(pipeline(sys.argv[1], 96), tokenize=slow)
workers._START = workers._START.replace("main()", "main.__globals__['_SIGN_OF_LIFE_SECONDS'] = 0.5; main()")
loader = open_loader(pipe, 96, mode="process", threads=1, chunk=64)
take(loader)
workers._SILENCE_SECONDS = 4
print(loader.workers.pid, flush=True)
for _ in range(10):
    take(loader)
"""


@pytest.mark.slow
def test_a_job_that_is_suspended_as_a_whole_goes_on(urls):
    """Ctrl-Z and fg, or a scheduler's suspension: nobody was silent, nobody ran."""
    with start(_SUSPENDED, urls) as training:
        processes = training.pid, int(training.stdout.readline())
        for pid in processes:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(6)
        for pid in processes:
            os.kill(pid, signal.SIGCONT)
            time.sleep(0.5)
    assert training.status == 0


class SlowToNote:
    """In the loader's process, a job is done before anybody has asked to be told of it."""

    name = "characters"

    def __call__(self, captions: list[str]) -> torch.Tensor:
        return tokenize(captions)

    def __setstate__(self, _state: dict) -> None:
        note = Future.add_done_callback

        def note_late(future: Future, function: Callable) -> None:
            time.sleep(0.002)
            note(future, function)

        Future.add_done_callback = note_late

    def __getstate__(self) -> dict:
        return {"state": "not empty"}


@pytest.mark.slow
def test_thousands_of_jobs_at_once_do_not_fill_the_wire_both_ways(urls):
    pipe = dataclasses.replace(pipeline(urls, 40, image_size=8), tokenize=SlowToNote())
    loader = open_loader(pipe, 40, mode="process", chunk=1, ahead=2000)
    expected = read(pipeline(urls, 40, image_size=8), 1, 40)
    assert take(loader).chain() == expected[0].chain()
    loader.close()


def test_a_loader_that_is_halted_while_it_is_sent_jobs_is_an_error(urls, monkeypatch):
    monkeypatch.setattr(workers, "_SILENCE_SECONDS", 2)
    submit = workers.LoaderProcess.submit

    def submit_to_the_halted(self: workers.LoaderProcess, job: Job) -> None:
        os.kill(self.pid, signal.SIGSTOP)
        submit(self, job)

    monkeypatch.setattr(workers.LoaderProcess, "submit", submit_to_the_halted)
    with pytest.raises(LoaderError, match=r"has been silent for 2 s") as silent:
        open_loader(pipeline(urls, 40), 40, mode="process", chunk=1, ahead=2000)
    process = next(f.frame.f_locals["self"] for f in silent.traceback if f.name == "submit_to_the_halted")
    process.close()


class Foreign:
    """A tokenizer that the loader's process cannot make."""

    name = "foreign"

    def __reduce__(self) -> tuple:
        return int, ("not a number",)


@pytest.mark.slow
def test_why_it_ended_is_told_also_to_one_who_is_still_sending_jobs(urls):
    pipe = dataclasses.replace(pipeline(urls, 40), tokenize=Foreign())
    loader = open_loader(pipe, 40, mode="process", chunk=1, ahead=2000)
    with pytest.raises(LoaderError, match="the loader failed: ValueError: invalid literal for int"):
        take(loader)
    loader.close()


def fail(captions: list[str]) -> torch.Tensor:
    raise RuntimeError("tokenizer")


def slow(captions: list[str]) -> torch.Tensor:
    time.sleep(0.2)
    return tokenize(captions)


def test_a_fault_of_ours_comes_with_its_traceback(urls):
    loader = open_loader(dataclasses.replace(pipeline(urls, 40), tokenize=fail), 40, mode="process")
    with pytest.raises(LoaderError, match=r"(?s)the loader failed: RuntimeError: tokenizer; Traceback.*fail"):
        take(loader)
    loader.close()


@pytest.mark.slow
def test_close_gives_up_what_is_not_decoded(urls):
    pipe = dataclasses.replace(pipeline(urls, 192, allow_repeats=True), tokenize=slow)
    loader = open_loader(pipe, 192, mode="process", threads=1, chunk=16, ahead=60)
    next(next(loader).images.first(CPU))
    begin = time.monotonic()
    loader.close()
    assert time.monotonic() - begin < 10  # of 14


_ONE_BATCH = """
import os, sys
for file in map(int, "".join(sys.argv[2:])):
    os.close(file)
from loading import open_loader, pipeline, take
loader = open_loader(pipeline(sys.argv[1], 40), 40, mode="process")
take(loader)
loader.close()
"""


@pytest.mark.slow
def test_files_in_the_working_directory_are_not_taken_for_modules(urls, tmp_path):
    (tmp_path / "queue.py").write_text("raise SystemExit('not the real one')")
    script = tmp_path / "elsewhere" / "train.py"
    script.parent.mkdir()
    script.write_text(_ONE_BATCH)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    subprocess.run([sys.executable, script, urls], cwd=tmp_path, env=environment, timeout=300, check=True)


@pytest.mark.slow
def test_a_mixture_of_many_shards_has_files_enough(tmp_path):
    """Of each source 64 stay open, with an index each: eight sources come to 1,024, the limit of many systems."""
    pipe = pipeline(write_pairs(tmp_path, 60, 2, size=8), 120, image_size=8)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, before[1]))
    try:
        loader = open_loader(pipe, 120, mode="process")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert take(loader).valid.all()
    loader.close()


@pytest.mark.parametrize("files", [pytest.param("0", marks=pytest.mark.slow), "012"])
def test_without_standard_streams(urls, files):
    """The first files that a process opens then get their numbers."""
    with start(_ONE_BATCH, urls, files) as training:
        pass
    assert training.status == 0


_ENDLESS = """
import sys
from loading import open_loader, pipeline, take
loader = open_loader(pipeline(sys.argv[1], 40), 40, mode="process")
take(loader)
print(loader.workers.pid, flush=True)
while True:
    take(loader)
"""


@pytest.mark.parametrize(
    "number",
    [signal.SIGKILL, *(pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGTERM, signal.SIGINT))],
)
def test_it_ends_with_the_training_process_however_that_ends(urls, number):
    """The signal goes to the training process alone."""
    with start(_ENDLESS, urls) as training:
        loader = int(training.stdout.readline())
        assert alive(loader)
        training.kill(number)
    wait_until(lambda: not alive(loader))


_GROUPED = """
import os, signal
from loading import open_loader, pipeline, take
numbers = (signal.SIGUSR1, signal.SIGTERM)
for number in numbers:
    signal.signal(number, lambda *_: None)  # a handler, as a trainer has one: not inherited by the loader
loader = open_loader(pipeline(sys.argv[1], 40), 40, mode="process")
assert os.getpgid(loader.workers.pid) == os.getpgid(0)
for step in range(4):
    for number in numbers:
        os.killpg(0, number)
    print(take(loader).chain(), flush=True)
loader.close()
"""


def test_signals_to_the_whole_group_do_not_end_it(urls):
    """The loader is in the training process's group, and the first signals come while it starts."""
    expected = [str(batch.chain()) for batch in read(pipeline(urls, 40), 4, 40)]
    with start(_GROUPED, urls, session=True) as training:
        assert training.stdout.read().split() == expected, training.stderr.read()
    assert training.status == 0
