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
from clipscale.resilience.beats import lost_ranks, read_beats, write_beat
from clipscale.resilience.watchdog import Watchdog
from clipscale.telemetry.parts import Parts

LOADED = {"modules": ("clipscale.training.trainer",)}  # before a rank begins: importing it takes seconds


@pytest.fixture(scope="module")
def urls(tmp_path_factory) -> str:
    return write_pairs(tmp_path_factory.mktemp("data"), 4, 8, size=16)


TRAIN = """
import os, signal, time
config, rank, ranks, port, act, words = sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4], sys.argv[5], sys.argv[6:]
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
os.environ |= {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank}
from clipscale.cli import main
from clipscale.training.learner import Learner
update = Learner.update

def asleep():
    time.sleep(3600)

def acting(self, *, step):
    if step == 2 and act == "sleep":
        asleep()
    if step == 2 and act != "nothing":
        time.sleep(1.5)
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


LOST = {
    "SIGSTOP": "is silent for [3-9] s, last at step 2, optimizer",
    "SIGKILL": "is gone, last at step 2, optimizer",
    "sleep": r"stands still at step 2, optimizer \(its threads: stacks-rank1.txt\)",
}


@pytest.mark.parametrize("act", LOST)
def test_the_others_end_when_a_rank_is_lost_and_name_it(tmp_path, urls, act):
    config, port = write_config(tmp_path, urls), free_port()
    words = ["run.timeout_seconds=4"]
    begin = time.monotonic()
    with start(TRAIN, config, 0, 2, port, "nothing", *words, **LOADED) as first:
        with start(TRAIN, config, 1, 2, port, act, *words, **LOADED) as second:
            assert first.ended(200)
            if act != "SIGKILL":
                second.kill()
        said = first.stderr.read()
    assert time.monotonic() - begin < 4 + 40
    assert first.status == RESTART, said
    line = next(line for line in said.splitlines() if "clipscale: error" in line)
    name = rf"rank 1 \({socket.gethostname()}, process {second.pid}\)"
    assert re.search(rf"another rank is lost: {name} {LOST[act]} \(", line), line
    assert "start the run again: it goes on from its newest checkpoint" in line
    assert "Traceback" not in said
    assert faults(tmp_path)[-1]["kind"] == "peer"
    if act == "sleep":
        assert "asleep" in (tmp_path / "run" / "stacks-rank1.txt").read_text()


HANGS = """
import ctypes, os, time
from pathlib import Path
import torch
from clipscale.resilience import watchdog
from clipscale.config import Run
from clipscale.dist import World
from clipscale.telemetry.parts import Parts
watchdog._TELL_SECONDS = watchdog._GRACE_SECONDS = 1.0
folder, how = sys.argv[1:]
watchdog.write_beat = lambda *_, **__: time.sleep(3600)
world, parts = World(0, 2, 0, torch.device("cpu")), Parts(torch.device("cpu"))
with watchdog.Watchdog(Run(folder, watchdog_seconds=1.0), world, parts, step=lambda: 7):
    if how == "python":
        ctypes.PyDLL(None).sleep(3600)
    time.sleep(3600)
"""


def test_a_file_system_that_hangs_too_holds_up_no_end(tmp_path):
    os.mkfifo(tmp_path / "stacks-rank0.txt")  # nobody reads it, so that opening it waits for ever
    with start(HANGS, tmp_path, "file system") as child:
        assert child.ended(60)
        said = child.stderr.read()
    assert child.status == RESTART
    assert "in <module>" in said, "the stacks"
    assert f"rank 0 hangs: step 7, other: no progress for 1 s (run.watchdog_seconds), and {tmp_path} cannot be" in said


def test_what_lets_no_other_thread_run_ends_too(tmp_path):
    with start(HANGS, tmp_path, "python") as child:
        assert child.ended(60)
        said = child.stderr.read()
    assert child.status == 1
    assert "Timeout (0:00:02)!" in said


DYING = """
import os, signal
config, rank, port, place = sys.argv[1:]
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
os.environ |= {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank}
from clipscale.cli import main
from clipscale.training.trainer import Trainer
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
        assert [beat.place for beat in read_beats(tmp_path)] == ["step 7, other"]
    assert not any((tmp_path / "ranks").iterdir())


def write_beats(folder: Path, *beats: tuple[int, str, float], age: float = 0.0) -> None:
    for rank, place, still in beats:
        write_beat(folder, rank=rank, place=place, still=still)
        os.utime(folder / "ranks" / f"{rank:05}", (time.time() - age,) * 2)


def test_only_those_that_keep_a_rank_waiting_are_named(tmp_path):
    def lost() -> list[str]:
        return lost_ranks(tmp_path, 0, ranks=4, timeout_seconds=40)

    me = f"{socket.gethostname()}, process {os.getpid()}"
    assert lost() == []
    write_beats(tmp_path, (0, "step 7, loss", 30), (1, "step 7, loss", 31), (2, "step 7, copies", 3))
    write_beats(tmp_path, (3, "step 6, loss", 15), age=10)
    write_beats(tmp_path, (4, "step 2, loss", 0), age=10_000)  # of an attempt with more ranks
    assert lost() == []
    write_beats(tmp_path, (2, "step 7, copies", 33))
    assert lost() == [f"rank 2 ({me}) stands still at step 7, copies (its threads: stacks-rank2.txt)"]
    write_beats(tmp_path, (0, "step 7, loss", 3))
    assert lost() == [], "this one has not waited for long"
    write_beats(tmp_path, (3, "step 6, loss", 15), age=60)
    assert lost() == [f"rank 3 ({me}) is silent for 60 s, last at step 6, loss"]
    with start("import os; os._exit(0)") as child:
        pass
    for host, wanted in ((socket.gethostname(), "is gone, last"), ("elsewhere", "is silent for 60 s, last")):
        path = tmp_path / "ranks" / "00003"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"host": host, "pid": child.pid}))
        os.utime(path, (time.time() - 60,) * 2)
        assert lost() == [f"rank 3 ({host}, process {child.pid}) {wanted} at step 6, loss"]
    (tmp_path / "ranks" / "00003").write_text("another version's")
    assert lost() == []


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
from clipscale.training.learner import Learner
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
    """To the same bits as two ranks that torchrun never saw."""
    (tmp_path / "twin").mkdir()
    (tmp_path / "dies.py").write_text(DIES_ONCE)
    words, port = ["checkpoint.every_steps=2", "device=cpu"], free_port()
    twin = write_config(tmp_path / "twin", urls)
    ranks = [start(TRAIN, twin, rank, 2, port, "nothing", *words, **LOADED) for rank in (0, 1)]
    with ranks[0], ranks[1]:
        pass
    assert [rank.status for rank in ranks] == [0, 0]
    process = torchrun("--max-restarts=1", str(tmp_path / "dies.py"), write_config(tmp_path, urls), *words)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    one, other = (load_checkpoint(find_checkpoint(str(folder / "run"))) for folder in (tmp_path, tmp_path / "twin"))
    assert one.step == other.step == 4
    assert all(torch.equal(one.model[key], other.model[key]) for key in other.model)


@pytest.mark.slow
def test_ranks_do_not_outlive_a_torchrun_that_is_killed(tmp_path, urls):
    process = torchrun("-m", "clipscale", "train", write_config(tmp_path, urls), "train.samples=800_000")
    try:
        deadline = time.monotonic() + 200
        while len(beats := read_beats(tmp_path / "run")) < 2:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.2)
    finally:
        process.kill()
        process.stderr.close()
        process.wait()
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{beat.pid}").exists() for beat in beats):
        assert time.monotonic() < deadline, "they train on"
        time.sleep(0.1)
