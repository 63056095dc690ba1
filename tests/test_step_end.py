"""The end of a step: first its checkpoint, then its evaluations, then its row; and what happens where that is cut."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from shards import write_pairs
from tiny import tiny_config

from clipscale.checkpoint import SaveClock
from clipscale.config import Checkpoint
from clipscale.dist import World
from clipscale.errors import SharedError, UserError
from clipscale.eval.suite import EvalSuite
from clipscale.training.trainer import Trainer, train

ALONE = World(0, 1, 0, torch.device("cpu"))


@pytest.fixture(scope="module")
def urls(tmp_path_factory) -> str:
    return write_pairs(tmp_path_factory.mktemp("data"), 4, 8, size=16)


@pytest.fixture
def config(tmp_path, urls):
    """Four steps, each of the last two with a validation; checkpoints are on the disk when it begins."""
    words = ["checkpoint.every_steps=4", "eval.validation.every_steps=3", "checkpoint.background=false"]
    return lambda *more: tiny_config(
        tmp_path, urls, *words, f"eval.validation.urls={urls}", "eval.validation.batch=8", *more
    )


def rows(folder: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (folder / "run" / name).read_text().splitlines()]


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "run" / "checkpoints").glob("*"))


class Failing:
    """Validation that fails the first `times` times it is asked for, as `error`."""

    def __init__(self, monkeypatch, error: BaseException, times: int) -> None:
        real, self.asked, self.seen = EvalSuite.run, 0, []

        def run(suite, name):
            self.asked += 1
            self.seen.append(checkpoints(Path(suite.config.run.dir).parent))
            if self.asked <= times:
                raise error
            return real(suite, name)

        monkeypatch.setattr(EvalSuite, "run", run)


@pytest.mark.parametrize("error", [SharedError("0.tar: it is gone"), RuntimeError("a bug")])
def test_an_evaluation_that_fails_costs_its_scores_and_no_step(config, tmp_path, monkeypatch, error):
    Failing(monkeypatch, error, times=1)
    summary = train(config())
    assert summary[0].startswith("trained 4 steps")
    found = rows(tmp_path)
    assert [row.get("validation/failed") for row in found] == [None, None, 1.0, None]
    assert ["validation/loss" in row for row in found] == [False, False, False, True]
    (fault,) = rows(tmp_path, "faults.jsonl")
    what = (
        "step 3: the evaluation 'validation' failed: "
        + ("0.tar: it is gone", "RuntimeError: a bug")[type(error) is RuntimeError]
    )
    assert (fault["kind"], fault["step"], fault["lost_steps"], fault["what"]) == ("evaluation", 3, 0, what)
    assert f"warning: {what}; its scores are missing" in (tmp_path / "run" / "run.log").read_text()


def test_the_last_evaluation_may_fail_and_the_summary_says_so(config, tmp_path, monkeypatch):
    Failing(monkeypatch, SharedError("gone"), times=2)
    summary = train(config())
    assert "validation failed" in summary[1]
    assert train(config())[0].startswith("already complete")
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4]


def test_an_evaluation_may_end_the_run_behind_its_checkpoint_and_is_made_up_for(config, tmp_path, monkeypatch):
    failing = Failing(monkeypatch, SharedError("0.tar: it is gone"), times=3)
    stop = config("eval.on_error=stop", "checkpoint.every_steps=1")
    with pytest.raises(UserError, match=r"step 3: the evaluation 'validation' failed: 0\.tar: it is gone; mend it"):
        train(stop)
    assert failing.seen[-1] == ["step-000000002", "step-000000003"]
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]
    for _ in range(2):  # step 3 stays as it is, whatever becomes of its evaluation
        with pytest.raises(UserError, match="step 3: the evaluation"):
            train(stop)
    assert train(stop)[0].startswith("trained 1 step ")
    assert failing.asked == 5
    assert [(row["step"], "validation/loss" in row) for row in rows(tmp_path)] == [
        (1, False),
        (2, False),
        (3, True),
        (4, True),
    ]


def test_a_run_cut_in_its_last_evaluation_makes_up_for_that_alone(config, tmp_path, monkeypatch, urls):
    (tmp_path / "twin").mkdir()
    train(tiny_config(tmp_path / "twin", urls, f"eval.validation.urls={urls}", "eval.validation.batch=8"))
    failing = Failing(monkeypatch, KeyboardInterrupt(), times=1)
    whole = config("eval.validation.every_steps=0")
    with pytest.raises(KeyboardInterrupt):
        train(whole)
    assert failing.seen == [["step-000000004"]]
    assert len(rows(tmp_path)) == 3
    steps = []
    monkeypatch.setattr(Trainer, "step", lambda self, batch: steps.append(batch))
    summary = train(whole)
    assert not steps
    assert failing.asked == 2
    wanted = rows(tmp_path / "twin")
    for key in ("step", "samples", "loss", "grad_norm", "validation/loss", "validation/image_accuracy"):
        assert [row.get(key) for row in rows(tmp_path)] == [row.get(key) for row in wanted], key
    assert "validation loss" in summary[1]
    assert train(whole)[0].startswith("already complete")
    assert failing.asked == 2


def test_another_runs_checkpoint_is_not_evaluated_for_it(config, tmp_path, urls, monkeypatch):
    train(config("train.samples=24"))
    failing = Failing(monkeypatch, SharedError("gone"), times=0)
    (tmp_path / "other").mkdir()
    words = [f"resume={tmp_path / 'run'}", f"eval.validation.urls={urls}", "eval.validation.batch=8"]
    train(tiny_config(tmp_path / "other", urls, *words))
    assert failing.asked == 1
    assert [row["step"] for row in rows(tmp_path / "other")] == [4]


def test_what_an_evaluation_cannot_take_is_seen_before_the_first_step(config, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise UserError("its pictures have four channels")

    monkeypatch.setattr("clipscale.eval.evaluations.batches", refuse)
    with pytest.raises(UserError, match="its pictures have four channels"):
        train(config())
    assert not (tmp_path / "run").exists()


def test_a_runs_first_checkpoint_comes_early(tmp_path, urls, monkeypatch):
    saved = []
    monkeypatch.setattr(Trainer, "_save", lambda self: saved.append(self.steps_done))
    train(tiny_config(tmp_path, urls, "train.samples=96"))
    assert saved == [10, 12]


@pytest.mark.parametrize(
    ("every_minutes", "first", "minutes_a_step", "due"),
    [
        (30, False, 1, [30, 60]),
        (30, False, 40, [*range(1, 65)]),
        (0, False, 40, []),
        (30, True, 1, [5, 35]),
        (30, True, 0.1, [10]),
        (0, True, 0.1, [10]),
        (0.5, True, 0.1, [5, 10, 15, 20, 25, 30, 35, 40, 45, 50, 55, 60]),
    ],
)
def test_checkpoints_by_the_clock(monkeypatch, every_minutes, first, minutes_a_step, due):
    now = [0.0]
    monkeypatch.setattr("clipscale.checkpoint.due.time.monotonic", lambda: now[0])
    clock, found = SaveClock(Checkpoint(every_minutes=every_minutes), step=0 if first else 100), []
    for step in range(1, 65):
        now[0] += minutes_a_step * 60 + 1e-6
        if clock.wants(step=step):
            found.append(step)
            clock.saved()
    assert found == due
