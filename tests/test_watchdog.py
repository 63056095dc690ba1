"""Hangs, lost ranks and a launcher that is gone: the process ends in time, with the status that a restart may heal."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from forks import start
from shards import write_pairs
from tiny import write_config

from clipscale.checkpoint import find_checkpoint, load_checkpoint
from clipscale.config import Run
from clipscale.dist import World
from clipscale.errors import RESTART
from clipscale.parts import Parts
from clipscale.watchdog import Watchdog, not_heard_of

LOADED = {"modules": ("clipscale.train",)}  # before a rank begins: importing it takes seconds


@pytest.fixture(scope="module")
def urls(tmp_path_factory) -> str:
    return write_pairs(tmp_path_factory.mktemp("data"), 4, 8, size=16)


TRAIN = """
import os, signal, time
config, rank, ranks, port, act, words = sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4], sys.argv[5], sys.argv[6:]
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
os.environ |= {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank}
from clipscale import watchdog
from clipscale.cli import main
from clipscale.learner import Learner
watchdog._BEAT_SECONDS, watchdog._SILENT_SECONDS = 0.2, 1.0
update = Learner.update

def asleep():
    time.sleep(3600)

def acting(self, *, step):
    if step == 2 and act == "sleep":
        asleep()
    if step == 2 and act != "nothing":
        time.sleep(1)
        os.kill(os.getpid(), getattr(signal, act))
    return update(self, step=step)

Learner.update = acting
sys.exit(main(["train", config, *words]))
"""


def faults(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "run" / "faults.jsonl").read_text().splitlines()]


def rank_of(ranks: int) -> World:
    return World(0, ranks, 0, torch.device("cpu"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_rank_that_makes_no_progress_ends_and_says_where(tmp_path, urls):
    words = ["run.watchdog_seconds=1.5"]
    with start(TRAIN, write_config(tmp_path, urls), 0, 1, 0, "sleep", *words, **LOADED) as child:
        said = child.stderr.read()
    assert child.status == RESTART
    assert "rank 0 hangs: step 2, optimizer: no progress for" in said
    assert "asleep" in (tmp_path / "run" / "stacks-rank0.txt").read_text()
    (fault,) = faults(tmp_path)
    assert (fault["kind"], fault["step"]) == ("hang", 2)


@pytest.mark.parametrize(("act", "wanted"), [("SIGSTOP", "rank 1 ("), ("SIGKILL", "")])
def test_the_others_end_when_a_rank_is_lost_and_name_it(tmp_path, urls, act, wanted):
    config, port = write_config(tmp_path, urls), free_port()
    words = ["run.timeout_seconds=4"]
    with start(TRAIN, config, 0, 2, port, "nothing", *words, **LOADED) as first:
        with start(TRAIN, config, 1, 2, port, act, *words, **LOADED) as second:
            assert first.ended(200)
            if act == "SIGSTOP":
                second.kill()
        said = first.stderr.read()
    assert first.status == RESTART, said
    line = next(line for line in said.splitlines() if "clipscale: error" in line)
    assert "another rank is lost: " + wanted in line
    if wanted:
        assert "step 2, optimizer" in line
    assert "start the run again: it goes on from its newest checkpoint" in line
    assert "Traceback" not in said
    assert faults(tmp_path)[-1]["kind"] == "peer"


DYING = """
import os, signal
config, rank, port, place = sys.argv[1:]
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
os.environ |= {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank}
from clipscale.cli import main
from clipscale.train import Trainer
if rank == "1":
    setattr(Trainer, place, lambda *arguments: os.kill(os.getpid(), signal.SIGKILL))
sys.exit(main(["train", config, "run.timeout_seconds=100"]))
"""


@pytest.mark.parametrize("place", ["_build_data", "_summary"], ids=["building", "the end"])
def test_a_rank_that_is_lost_outside_of_the_steps_is_one_line_too(tmp_path, urls, place):
    config, port = write_config(tmp_path, urls), free_port()
    ranks = [start(DYING, config, rank, port, place, **LOADED) for rank in (0, 1)]
    with ranks[0] as first, ranks[1] as second:
        said = first.stderr.read()
    assert (first.status, second.status) == (RESTART, -signal.SIGKILL), said
    assert re.search(r"clipscale: error: rank 0 lost another rank \(.*by peer.*\); start the run again$", said.strip())
    assert "Traceback" not in said


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_does_not_come_is_one_line_too(rank):
    code = """
import os
rank, port = sys.argv[1:]
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "WORLD_SIZE": "2"}
from clipscale.dist import start_world
from clipscale.errors import RestartError
try:
    with start_world("cpu", 1.0):
        print("met")
except RestartError as error:
    print(error)
"""
    port = free_port()
    with start(code, rank, port) as child:
        said = child.stdout.read()
    wanted = rf"rank {rank} did not meet the other ranks of 2 at 127\.0\.0\.1:{port} \(.*timed out.*\); start the run "
    assert re.match(wanted, said, re.IGNORECASE)


def test_parts_that_begin_are_progress(tmp_path):
    parts = Parts(torch.device("cpu"))
    with Watchdog(Run(str(tmp_path), watchdog_seconds=1.2), rank_of(2), parts, step=lambda: 7):  # or it ends
        for _ in range(5):
            time.sleep(0.5)
            with parts.part("evaluation"):
                pass
        assert "step 7, other" in (tmp_path / "ranks" / "00000").read_text()
    assert not any((tmp_path / "ranks").iterdir())


def test_only_those_that_are_silent_are_named(tmp_path):
    (tmp_path / "ranks").mkdir()
    now = time.time()
    for rank, age in ((0, 0), (1, 60), (2, 3)):
        path = tmp_path / "ranks" / f"{rank:05}"
        path.write_text(f"node{rank}, process 4{rank}): step 6, loss")
        os.utime(path, (now - age, now - age))
    assert not_heard_of(str(tmp_path), rank_of(4)) == "rank 1 (node1, process 41): step 6, loss, 60 s ago"
    assert not_heard_of(str(tmp_path / "nowhere"), rank_of(4)) == ""


def test_a_rank_ends_with_its_torchrun():
    code = """
import os, time
from clipscale.launch import end_with_parent
if os.fork() == 0:
    os.environ["TORCHELASTIC_RUN_ID"] = "x"
    end_with_parent()
    print("on", flush=True)
    time.sleep(100)
    print("still there", flush=True)
time.sleep(0.2)
os._exit(0)
"""
    begin = time.monotonic()
    with start(code) as child:
        said, told = child.stdout.read(), child.stderr.read()
    assert said == "on\n"
    assert told == "clipscale: torchrun is gone: this rank ends\n"
    assert time.monotonic() - begin < 50


# --- the real torchrun ------------------------------------------------------------------------------------------------


def torchrun(*words: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "cwd": Path(__file__).parent}
    return subprocess.Popen([*command, *words], **options)


DIES_ONCE = """
import os, signal, sys
from clipscale.cli import main
from clipscale.learner import Learner
update = Learner.update

def deadly(self, *, step):
    if step == 3 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return update(self, step=step)

Learner.update = deadly
sys.exit(main(["train", *sys.argv[1:]]))
"""


@pytest.mark.slow
def test_torchrun_starts_the_ranks_again_and_they_go_on(tmp_path, urls):
    (tmp_path / "twin").mkdir()
    (tmp_path / "dies.py").write_text(DIES_ONCE)
    for folder, words in ((tmp_path / "twin", ["-m", "clipscale", "train"]), (tmp_path, [str(tmp_path / "dies.py")])):
        process = torchrun("--max-restarts=1", *words, write_config(folder, urls), "checkpoint.every_steps=2")
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said
    one, other = (load_checkpoint(find_checkpoint(str(folder / "run"))) for folder in (tmp_path, tmp_path / "twin"))
    assert one.step == other.step == 4
    assert all(torch.equal(one.model[key], other.model[key]) for key in other.model)


@pytest.mark.slow
def test_ranks_do_not_outlive_a_torchrun_that_is_killed(tmp_path, urls):
    process = torchrun("-m", "clipscale", "train", write_config(tmp_path, urls), "train.samples=800_000")
    try:
        beats, deadline = tmp_path / "run" / "ranks", time.monotonic() + 200
        while not (beats.is_dir() and len(list(beats.iterdir())) == 2 and all(map(Path.read_text, beats.iterdir()))):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.2)
        pids = [int(path.read_text().partition("process ")[2].partition(")")[0]) for path in beats.iterdir()]
    finally:
        process.kill()
        process.stderr.close()
        process.wait()
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline, "they train on"
        time.sleep(0.1)
