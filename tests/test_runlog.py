"""clipscale/runlog.py: every step stands once, in JSON lines and in TensorBoard."""

from __future__ import annotations

import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from clipscale.progress import duration
from clipscale.runlog import Pace, RunLog
from clipscale.tell import tell


def write_steps(folder, start: int, stop: int, value: float) -> None:
    with RunLog(str(folder)) as log:
        log.begin(start, total_steps=9)
        for step in range(start + 1, stop + 1):
            log.metrics({"step": step, "loss": value, "zeroshot/top1": value / 10})
            log.advance(step)
        tell(f"reached {stop}")


def test_a_resumed_run_writes_every_step_once(tmp_path):
    write_steps(tmp_path, 0, 6, 1.0)
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


def test_other_ranks_tell_what_only_they_know(tmp_path, capsys):
    with RunLog(str(tmp_path / "run"), rank=3) as log:
        log.begin(0, 3)
        log.metrics({"step": 1})
        log.advance(1)
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
    low, eta, high = 2 * pace.elapsed(), pace.eta_seconds(2, 6), 2 * pace.elapsed()
    assert low <= eta <= high


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (95.9, "1:35"), (4000, "1:06:40")])
def test_duration(seconds, text):
    assert duration(seconds) == text
