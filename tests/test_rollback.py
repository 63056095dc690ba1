"""A run that diverges goes back to its last good checkpoint, past the data that broke it, and is as repeatable so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from shards import write_pairs
from tiny import tiny_config

from clipscale.checkpoint import load_checkpoint
from clipscale.errors import UserError
from clipscale.guard.rollback import passed_over
from clipscale.resilience.injection import VARIABLE
from clipscale.training.trainer import Trainer, train

WORDS = ("train.on_divergence=rollback", "train.max_nonfinite_steps=3", "checkpoint.every_steps=2", "train.samples=80")


@pytest.fixture(scope="module")
def urls(tmp_path_factory) -> str:
    return write_pairs(tmp_path_factory.mktemp("data"), 4, 8, size=16)


def rows(folder: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (folder / "run" / name).read_text().splitlines()]


class Breaks:
    """Data at some positions that no step gets over: each makes the gradient of its step NaN."""

    def __init__(self, monkeypatch, *positions: int) -> None:
        self.seen: list[int] = []  # position of each step's batch, as the run went
        real = Trainer.step

        def step(trainer, batch):
            self.seen.append(batch.position)
            number = trainer.steps_done + 1
            monkeypatch.setenv(VARIABLE, f"nan_gradient@{number}:0" if batch.position in positions else "")
            if self.kill_at == len(self.seen):
                raise KeyboardInterrupt
            return real(trainer, batch)

        self.kill_at: int | None = None
        monkeypatch.setattr(Trainer, "step", step)


def last_state(folder: Path):
    return load_checkpoint(max((folder / "run" / "checkpoints").glob("step-*")))


def same(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.mark.slow
def test_a_run_goes_back_and_past_the_data_and_so_does_one_that_is_killed_anywhere(tmp_path, urls, monkeypatch):
    """Steps 5 to 7 break it; the checkpoint of step 6 holds good weights, but lies among bad steps."""
    (tmp_path / "twin").mkdir()
    breaks = Breaks(monkeypatch, 32, 40, 48)
    summary = train(tiny_config(tmp_path / "twin", urls, *WORDS))
    assert summary[0].startswith("trained 3 steps")
    assert breaks.seen == [0, 8, 16, 24, 32, 40, 48, 56, 64, 72]
    found = rows(tmp_path / "twin")
    assert [(row["step"], row["samples"]) for row in found] == [
        *((1, 8), (2, 16), (3, 24), (4, 32)),
        *((5, 64), (6, 72), (7, 80)),
    ]
    (back,) = rows(tmp_path / "twin", "rollbacks.jsonl")
    assert (back["step"], back["from"], back["to"]) == (4, 32, 56)
    fault = rows(tmp_path / "twin", "faults.jsonl")[-1]
    assert (fault["kind"], fault["step"], fault["lost_steps"]) == ("divergence", 7, 3)
    assert fault["action"] == (
        "back to the checkpoint of step 4; 24 samples from position 32 to 56 are passed over "
        "(train.on_divergence=rollback)"
    )
    wanted = last_state(tmp_path / "twin")
    for kill_at in (7, 8):  # the newest checkpoint lies among bad steps; the run has just gone back
        folder = tmp_path / str(kill_at)
        folder.mkdir()
        breaks.seen.clear()
        breaks.kill_at = kill_at
        with pytest.raises(KeyboardInterrupt):
            train(tiny_config(folder, urls, *WORDS))
        breaks.kill_at = None
        train(tiny_config(folder, urls, *WORDS))
        state = last_state(folder)
        assert (state.step, state.position) == (7, 80)
        assert same(state.model, wanted.model)
        assert same(state.optimizer, wanted.optimizer)
        assert [row["loss"] for row in rows(folder)] == [row["loss"] for row in found]
        assert len(rows(folder, "rollbacks.jsonl")) == 1


def test_the_number_of_ways_back_is_bounded(tmp_path, urls, monkeypatch):
    breaks = Breaks(monkeypatch, *range(32, 1000, 8))
    with pytest.raises(UserError, match=r"gone back 2 times already \(train\.max_rollbacks=2\)"):
        train(tiny_config(tmp_path, urls, *WORDS, "train.max_rollbacks=2", "train.samples=400"))
    assert breaks.seen == [*range(0, 104, 8)]
    assert [(row["step"], row["from"], row["to"]) for row in rows(tmp_path, "rollbacks.jsonl")] == [
        (4, 32, 56),
        (4, 56, 80),
    ]
    assert passed_over(str(tmp_path / "run"), 4, 32) == 80
    assert passed_over(str(tmp_path / "run"), 2, 16) == 16


def test_without_a_checkpoint_the_run_ends(tmp_path, urls, monkeypatch):
    Breaks(monkeypatch, 0, 8, 16)
    with pytest.raises(UserError, match=r"step 3: 3 steps in a row .* there is no checkpoint yet to go back to"):
        train(tiny_config(tmp_path, urls, *WORDS, "checkpoint.every_steps=50"))


def test_a_collapsed_run_goes_back_too(tmp_path, urls, monkeypatch):
    """Another learning rate is what it needs; the way back leaves it as it is, and so the bound ends it."""
    words = ["optim.lr=0.1", "train.samples=480", "train.collapse_steps=5", "checkpoint.every_steps=1"]
    with pytest.raises(UserError, match=r"collapsed: .* gone back 1 times already"):
        train(tiny_config(tmp_path, urls, *words, *WORDS[:1], "train.max_rollbacks=1"))
    (back,) = rows(tmp_path, "rollbacks.jsonl")
    kept = json.loads((tmp_path / "run" / "checkpoints" / f"step-{back['step']:09}" / "state.json").read_text())
    assert kept["health"]["collapsed_in_a_row"] == 0
