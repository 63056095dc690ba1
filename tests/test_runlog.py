"""clipscale/telemetry/runlog.py: every step stands once, in JSON lines and in TensorBoard."""

from __future__ import annotations

import io
import json
import re
import socket
import time

import pytest
from processes import wait_until
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from clipscale import __version__
from clipscale.progress import duration, time_left
from clipscale.schedule import times_due
from clipscale.telemetry.runlog import Pace, RunLog
from clipscale.tell import tell


def write_steps(folder, start: int, stop: int, value: float) -> None:
    with RunLog(str(folder)) as log:
        log.begin(start, total_steps=9)
        for step in range(start + 1, stop + 1):
            log.metrics({"step": step, "loss": value, "zeroshot/top1": value / 10})
            log.advance(step, eta_seconds=9 - step)
        tell(f"reached {stop}")


def test_a_resumed_run_writes_every_step_once(tmp_path):
    write_steps(tmp_path, 0, 6, 1.0)
    second = int(time.time())
    wait_until(lambda: int(time.time()) > second)  # TensorBoard orders its files by the second in their names
    write_steps(tmp_path, 4, 9, 2.0)  # back to the checkpoint of step 4
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 10))
    assert [row["loss"] for row in rows] == [1.0] * 4 + [2.0] * 5
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("train/loss")] == [
        *((step, 1.0) for step in range(1, 5)),
        *((step, 2.0) for step in range(5, 10)),
    ]
    assert len(board.Scalars("zeroshot/top1")) == 9
    assert (tmp_path / "run.log").read_text().count("reached") == 2


@pytest.mark.parametrize("torn", ['{"step": 7, "lo', "{\x00\x00", "\u00e9"[:1]])
def test_a_torn_last_row_heals_and_is_told(tmp_path, torn):
    write_steps(tmp_path, 0, 6, 1.0)
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(torn.encode("latin-1"))
    write_steps(tmp_path, 6, 8, 2.0)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 9))
    (fault,) = [json.loads(line) for line in (tmp_path / "faults.jsonl").read_text().splitlines()]
    assert fault["what"] == f"{tmp_path}/metrics.jsonl had 1 line that a crash or a full disk cut short"
    assert not (tmp_path / "metrics.superseded.jsonl").exists()


def test_other_ranks_tell_what_only_they_know(tmp_path, capsys):
    with RunLog(str(tmp_path / "run"), rank=3) as log:
        log.begin(0, 3)
        log.metrics({"step": 1})
        log.advance(1, eta_seconds=2)
        tell("everyone knows")
        tell("a node without the folder", every_rank=True)
        assert not (tmp_path / "run").exists()
        (tmp_path / "run").mkdir()
        tell("only I know", every_rank=True)
    assert capsys.readouterr().err.splitlines() == ["rank 3: a node without the folder", "rank 3: only I know"]
    assert (tmp_path / "run" / "run.log").read_text().endswith(" rank 3: only I know\n")
    assert len([*(tmp_path / "run").iterdir()]) == 1


def test_pace():
    pace = Pace()
    assert pace.add(100, waited=1.0, seconds=4.0) == {"samples_per_second": 25.0, "data_wait_share": 0.25}
    pace.add(100, waited=0.0, seconds=1.0)
    assert pace.interval() == {"samples_per_second": 40.0, "data_wait_share": 0.2}
    pace.add(100, waited=0.0, seconds=1.0)
    assert pace.interval()["samples_per_second"] == 100.0


def test_a_log_line_has_the_parts_of_all_steps_since_the_last_one():
    pace = Pace()
    pace.add(100, waited=0.0, seconds=1.0)
    assert pace.spent({"loss": 0.5, "other": 0.25}) == {"seconds/loss": 0.5, "seconds/other": 0.25}
    pace.spent({"loss": 1.0, "evaluation": 4.0})
    found = pace.interval()
    parts = {"seconds/loss": 1.5, "seconds/other": 0.25, "seconds/evaluation": 4.0}
    assert {name: found[name] for name in found if name.startswith("seconds/")} == parts
    pace.add(100, waited=0.0, seconds=1.0)
    pace.spent({"loss": 2.0})
    assert pace.interval()["seconds/loss"] == 2.0


def test_the_time_left_is_that_of_recent_steps():
    """Not of the first, which tunes kernels, nor of the beginning, when the disk was still cold."""
    pace = Pace()
    pace.add(8, waited=0.0, seconds=60.0)
    assert pace.eta_seconds(10, {}) == 600.0
    for _ in range(150):
        pace.add(8, waited=0.0, seconds=9.0)
    assert pace.eta_seconds(10, {}) == pytest.approx(90.0)
    for _ in range(100):
        pace.add(8, waited=0.0, seconds=2.0)
    assert pace.eta_seconds(10, {}) == pytest.approx(20.0)


def test_evaluations_do_not_pass_for_slow_steps(monkeypatch):
    """One that takes a minute, right after a resume: it costs a minute for each that is to come, and no more."""
    now = [0.0]
    monkeypatch.setattr("clipscale.telemetry.runlog.time.perf_counter", lambda: now[0])
    pace = Pace()
    pace.add(8, waited=0.0, seconds=1.0)
    before = pace.eta_seconds(10_000, {"zeroshot": 20})
    with pace.other("zeroshot"):
        now[0] += 60.0
    assert (before, pace.eta_seconds(10_000, {"zeroshot": 20})) == (10_000.0, 11_200.0)


@pytest.mark.parametrize(("every", "last"), [(0, 12), (1, 12), (5, 12), (4, 12), (12, 12), (50, 12)])
def test_how_often_something_is_still_due(every, last):
    due = [step for step in range(1, last + 1) if step == last or (every and step % every == 0)]
    for done in range(last + 1):
        assert times_due(every, done, last) == sum(step > done for step in due)


def test_the_bar_shows_the_same_time_left(tmp_path):
    with RunLog(str(tmp_path)) as log:
        log.begin(0, 400)
        log.advance(1, eta_seconds=4000)
        shown = io.StringIO()
        Console(file=shown, width=120).print(log._progress.make_tasks_table(log._progress.tasks))
    assert re.search(r"step .* 1/400 .* eta 1h06m", shown.getvalue())


@pytest.mark.parametrize(
    ("seconds", "text", "left"),
    [
        (0, "0:00", "0:00"),
        (95.9, "1:35", "1:35"),
        (4000, "1:06:40", "1h06m"),
        (86_399, "23:59:59", "23h59m"),
        (100_000, "27:46:40", "1d03h"),
    ],
)
def test_durations(seconds, text, left):
    assert (duration(seconds), time_left(seconds)) == (text, left)


# --- attempts, and rows that were superseded --------------------------------------------------------------------------


def rows(folder, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_rows_of_steps_that_are_done_again_are_set_aside_with_when_and_why(tmp_path):
    begin = time.time()
    write_steps(tmp_path, 0, 6, 1.0)
    assert not (tmp_path / "metrics.superseded.jsonl").exists()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')  # cut by a crash
    write_steps(tmp_path, 4, 9, 2.0)
    write_steps(tmp_path, 8, 9, 3.0)
    about, fifth, sixth, later, ninth = rows(tmp_path, "metrics.superseded.jsonl")
    assert [(row["step"], row["loss"]) for row in (fifth, sixth, ninth)] == [(5, 1.0), (6, 1.0), (9, 2.0)]
    assert [(row["resumed_after_step"], row["superseded"], row["why"]) for row in (about, later)] == [
        (4, 2, "started again"),
        (8, 1, "started again"),
    ]
    assert begin <= fifth["time"] <= about["time"] <= later["time"] <= time.time()
    assert [row["loss"] for row in rows(tmp_path, "metrics.jsonl")] == [1.0] * 4 + [2.0] * 4 + [3.0]


@pytest.mark.parametrize(
    ("variables", "job", "restart"),
    [
        ({}, "", 0),
        ({"SLURM_JOB_ID": "41"}, "41", 0),
        ({"SLURM_JOB_ID": "41", "SLURM_RESTART_COUNT": "2", "TORCHELASTIC_RESTART_COUNT": "0"}, "41", 2),
        ({"SLURM_JOB_ID": "44", "SLURM_ARRAY_JOB_ID": "41", "SLURM_ARRAY_TASK_ID": "3"}, "41_3", 0),
        ({"TORCHELASTIC_RESTART_COUNT": "1"}, "", 1),
    ],
)
def test_each_attempt_is_written_down_as_it_begins(tmp_path, monkeypatch, variables, job, restart):
    for name in ("JOB_ID", "RESTART_COUNT", "ARRAY_JOB_ID", "ARRAY_TASK_ID"):
        monkeypatch.delenv(f"SLURM_{name}", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with RunLog(str(tmp_path), rank=1, ranks=2) as log:
        log.begin(4, total_steps=9)
    with RunLog(str(tmp_path), rank=0, ranks=2) as log:
        built = time.time()
        log.begin(4, total_steps=9)
    (row,) = rows(tmp_path, "attempts.jsonl")
    assert row.pop("started") <= built + 0.001
    assert built - 0.001 <= row.pop("time") <= time.time() + 0.001
    assert row == {
        "host": socket.gethostname(),
        "job": job,
        "restart": restart,
        "ranks": 2,
        "step": 4,
        "last_step": 9,
        "version": __version__,
    }
