"""`clipscale status`: what it says of a run that goes on, ended, died or was told to stop; from its folder alone."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
from tiny import YAML

from clipscale.checkpoint import RunFolder
from clipscale.cli import main
from clipscale.errors import UserError
from clipscale.files import append_rows, last_rows, read_numbers, read_rows
from clipscale.resilience.beats import write_beat
from clipscale.resilience.leaving import mark
from clipscale.status import read_status, status_lines


class Run:
    """A run's folder, written by hand: an attempt that began 100 s ago and took 10 s to its first step, and a row for
    each 10 s since."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.begin = folder / "run", time.time() - 100
        self.folder.mkdir()

    def attempt(self, *, step: int = 0, last_step: int = 20, started: float = 0.0) -> Run:
        begin = self.begin + started
        self._add("attempts", {"started": begin, "time": begin + 10, "step": step, "last_step": last_step})
        return self

    def steps(self, *steps: int, since: float = 10.0, **more) -> Run:
        for place, step in enumerate(steps, 1):
            row = {"step": step, "samples": 8 * step, "loss": 4 / step, "time": self.begin + since + 10 * place}
            self._add("metrics", row | more)
        return self

    def fault(self, kind: str, at: float, **more) -> Run:
        row = {"time": self.begin + at, "rank": 0, "kind": kind, "step": None, "what": f"{kind} fails", "action": "on"}
        self._add("faults", row | more)
        return self

    def checkpoint(self, step: int, *, cut: int = 0) -> Run:
        path = self.folder / "checkpoints" / f"step-{step:09}"
        path.mkdir(parents=True)
        (path / "model.pt").write_bytes(bytes(1000 - cut))
        (path / "manifest.json").write_text(json.dumps({"model.pt": {"bytes": 1000, "sha256": "?"}}))
        return self

    def read(self) -> dict:
        return read_status(str(self.folder))

    def lines(self) -> list[str]:
        return [line.replace(str(self.folder), "RUN") for line in status_lines(self.read())]

    def _add(self, name: str, row: dict) -> None:
        append_rows(self.folder / f"{name}.jsonl", [row])


@pytest.fixture
def run(tmp_path) -> Run:
    return Run(tmp_path)


def test_a_run_that_died_in_its_sixth_step(run):
    run.attempt().steps(1, 2, 3, 4, 5).checkpoint(2).checkpoint(4)
    found = run.read()
    assert (found["state"], found["step"], found["last_step"], found["samples"]) == ("stopped", 5, 20, 40)
    assert (found["seconds_a_step"], found["eta_seconds"]) == (pytest.approx(10, abs=0.01), pytest.approx(150, abs=0.2))
    assert 40 <= found["seconds_since_row"] < 100
    assert found["goodput"]["share"] == pytest.approx(50 / 60, abs=0.001)
    first, second, third, fourth, fifth = run.lines()
    assert first == (
        "RUN: not running: it ended without a word: killed, or its machine lost; the same command goes on from the "
        "newest checkpoint"
    )
    assert second.startswith("step 5 of 20 (25.0%), samples 40, loss 0.8000, ")
    assert second.endswith(" ago, 10 s a step, eta 2:30 once it runs")
    assert third.startswith("checkpoint: after step 4, 0:0")
    assert "1.00kB, sizes as written" in third
    assert fourth == "goodput 83.3% of 1:00 in 1 attempt; the rest: start-up 16.7%"
    assert fifth == "faults: none"


def test_a_run_that_goes_on_is_told_by_its_lock_and_one_that_is_late_too(run):
    run.attempt().steps(1, 2, 3)
    with closing(RunFolder(str(run.folder))):
        assert run.read()["state"] == "running"
        first, second, *_ = run.lines()
        assert first.startswith(f"RUN: running: process {os.getpid()} on {socket.gethostname()}")
        assert second.endswith("10 s a step, eta 2:50")  # the last row is 60 s old
        run.steps(4, 5, 6, since=-3000, loss=1.0)
        assert "the next one is late" in run.lines()[1]
    assert run.read()["state"] == "stopped"


def test_ranks_that_have_gone_silent_are_named_while_it_runs(run):
    run.attempt().steps(1)
    for rank, age in ((0, 1), (1, 95)):
        write_beat(run.folder, rank=rank, place="step 2, loss", still=0.0)
        os.utime(run.folder / "ranks" / f"{rank:05}", (time.time() - age,) * 2)
    with closing(RunFolder(str(run.folder))):
        name = f"rank 1 ({socket.gethostname()}, process {os.getpid()})"
        assert run.lines()[2] == f"silent: {name}: step 2, loss, 1:35 ago"
    assert run.read()["silent_ranks"] == []


def test_a_complete_run(run):
    assert run.attempt(last_step=3).steps(1, 2, 3).lines()[0] == "RUN: complete"
    assert run.read()["eta_seconds"] is None


def test_a_run_that_was_told_to_stop(run):
    run.attempt().steps(1, 2)
    (run.folder / "interrupted.json").write_text('{"job": "41", "restart": 0, "step": 2, "why": "SIGUSR1"}')
    assert run.read()["state"] == "interrupted"
    assert run.lines()[0].startswith("RUN: not running: told to stop (SIGUSR1), saved after step 2; the same command")
    mark(str(run.folder), step=None, why="SIGTERM")
    assert "told to stop (SIGTERM), before a step was done;" in run.lines()[0]


def test_a_run_that_an_error_ended_and_one_that_was_killed_later(run):
    run.attempt().steps(1, 2).fault("error", at=35, step=2)
    assert "not running: an error ended it;" in run.lines()[0]
    run.attempt(step=2, started=60)
    assert "not running: it ended without a word" in run.lines()[0]


def test_faults_by_kind_and_the_last(run):
    run.attempt().steps(1).fault("data", at=15).fault("evaluation", at=20, step=3).fault("data", at=95, step=9)
    last = run.lines()[-1]
    assert last.startswith("faults: data 2, evaluation 1; the last (0:0")
    assert last.endswith(" ago, step 9): data fails; on")


def test_a_damaged_newest_checkpoint_is_not_what_a_run_goes_on_from(run):
    run.attempt().steps(1).checkpoint(2).checkpoint(4, cut=1)
    assert run.read()["checkpoint"]["step"] == 2
    assert run.lines()[2].endswith("; 1 newer one is damaged")
    (run.folder / "checkpoints" / "step-000000002" / "manifest.json").write_text("[]")
    assert run.lines()[2] == "checkpoint: none that is whole"


def test_before_the_first_step_and_in_a_run_of_an_older_version(run):
    run.attempt()
    assert run.lines()[:2] == ["RUN: not running, and no step is done", "no step is done yet, of 20"]
    assert run.read()["goodput"] is None
    (run.folder / "attempts.jsonl").unlink()
    append_rows(run.folder / "metrics.jsonl", [{"step": 1, "samples": 8, "loss": None}])
    assert run.lines()[1] == "step 1, samples 8, loss not finite"


def test_the_numbers_are_diagnosed_by_the_runs_own_config(run):
    row = {"logit_scale": 14.3, "grad_norm": 1.0, "lr": 1e-3, "image_accuracy": 0.1, "text_accuracy": 0.1}
    run.attempt().steps(1, 2, **row)
    config = YAML.format(run="run", urls="x.tar")
    for written, told in (("", False), (config, True), (config + "x: 1", False)):
        (run.folder / "config.yaml").write_text(written)
        assert any("that of guessing" in line for line in run.lines()) is told
    run.steps(3, 4, since=30, **row | {"logit_scale": 1e-6})
    (run.folder / "config.yaml").write_text(config)
    (line,) = [line for line in run.lines() if "logit scale" in line]
    assert line.startswith("diagnosis: logit scale 1e-06, near 0")


def test_what_a_crash_or_a_bad_disk_left_behind_is_passed_over(run):
    run.attempt().steps(1, 2)
    for name in ("metrics", "attempts", "faults"):
        with (run.folder / f"{name}.jsonl").open("ab") as file:
            file.write(b'\0\0\xff\n5\n{"step": 3, "time": 1')
    (run.folder / "interrupted.json").write_bytes(b"\xff")
    assert (run.read()["step"], run.read()["state"]) == (2, "stopped")


def test_what_is_no_run_is_one_line(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for name, says in (("no-such", "is no folder"), ("file", "is no folder"), ("empty", "is no run's folder: it hol")):
        with pytest.raises(UserError, match=says):
            read_status(str(tmp_path / name))
        assert main(["status", str(tmp_path / name)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("clipscale: error: ")


def test_the_command_for_people_and_for_scripts(run, capsys):
    run.attempt().steps(1, 2)
    assert main(["status", str(run.folder)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 5
    assert main(["status", str(run.folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 2


def test_columns_are_read_as_rows_are(tmp_path):
    path = tmp_path / "rows.jsonl"
    append_rows(path, [{"step": i, "x/a": [None, -1.5e-7, 3][i % 3], "x/b": 2} for i in range(9)])
    wanted = [{"step": row["step"], "x/a": row["x/a"]} for row in read_rows(path)]
    with path.open("a") as file:
        file.write('{"step": 1')
    assert list(read_numbers(path, ["step", "x/a"])) == wanted
    assert [row["step"] for row in last_rows(path)] == list(range(9))
    assert [row["step"] for row in last_rows(path, most_bytes=100)] == [7, 8]
    assert list(read_numbers(tmp_path / "none", ["step"])) == last_rows(tmp_path / "none") == []


def test_status_is_quick_and_leaves_torch_alone(run):
    """A second for 10,000 steps and all imports, of this process's own time: the machine may be busy."""
    more = {f"seconds/{place}": 0.123456789 for place in range(12)} | {f"value_{place}": 1.5 for place in range(12)}
    run.attempt(last_step=20_000).steps(*range(1, 10_001), **more)
    code = """
import sys, time
from clipscale.cli import main
assert main(["status", sys.argv[1]]) == 0
assert not {"torch", "numpy"} & set(sys.modules)
assert time.process_time() < 1, time.process_time()
"""
    subprocess.run([sys.executable, "-c", code, run.folder], check=True, timeout=60)
