"""fp16 under a loss scale: a step whose gradients overflow is skipped by all ranks alike; a resume goes on by bits."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from shards import write_pairs
from spawn import run_ranks
from test_divergence import ALONE, rows, same, state_of
from tiny import tiny_config

from clipscale.dist import World
from clipscale.training import learner
from clipscale.training.trainer import Trainer

SCALE = 2.0**19  # halves hold up to 2^16: at first gradients overflow, and later steps double the scale until they do
STEPS = 12


@pytest.fixture(scope="module")
def urls(tmp_path_factory) -> str:
    return write_pairs(tmp_path_factory.mktemp("data"), 4, 24, size=16)


def trained(folder: Path, urls: str, world: World, *words: str) -> tuple[list[tuple[bool, float]], dict]:
    """For each step whether it left weights and moments as they were, and the loss scale behind it; the end's state."""
    config = tiny_config(folder, urls, "train.precision=fp16", "train.grad_clip_norm=null", *words)
    trainer, told = Trainer(config, world), []
    step = trainer.step

    def seen(batch):
        before = state_of(trainer)
        row = step(batch)
        told.append((same(before, state_of(trainer)), trainer.learner.scaler.get_scale()))
        return row

    trainer.step = seen
    try:
        trainer.run()
    finally:
        trainer.close()
    scaler = trainer.learner.scaler.state_dict()
    return told, state_of(trainer) | {name: torch.tensor(float(value)) for name, value in scaler.items()}


def scaled_high(patch: pytest.MonkeyPatch) -> None:
    """A learner's scaler begins at SCALE and grows after every second good step."""
    scaler = partial(torch.amp.GradScaler, init_scale=SCALE, growth_interval=2)
    patch.setattr(learner.torch.amp, "GradScaler", scaler)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, urls):
    """A run without a stop."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        scaled_high(patch)
        words = f"train.samples={8 * STEPS}", "checkpoint.every_steps=1", "checkpoint.keep=100"
        return folder, *trained(folder, urls, ALONE, *words)


def test_a_step_that_overflows_is_skipped_and_halves_the_scale(whole):
    folder, told, _ = whole
    skipped = [skip for skip, _ in told]
    assert skipped[0], "SCALE is too low"
    assert any(skip and not earlier for earlier, skip in pairwise(skipped)), "it never grew again"
    assert skipped.count(False) >= 4
    scale, good = SCALE, 0
    for skip, after in told:
        good = 0 if skip else good + 1
        scale *= 0.5 if skip else 2.0 if good == 2 else 1.0
        good %= 2
        assert after == scale
    found = rows(folder)
    assert [row["grad_norm"] is None for row in found] == skipped
    assert all(math.isfinite(row["loss"]) for row in found), "the loss itself does not overflow"


@pytest.mark.parametrize("stop", [2, 7])
def test_a_resume_is_an_uninterrupted_run(whole, urls, tmp_path, stop):
    """Weights, moments, loss scale and how many steps it has been good: bit for bit, also right behind a skip. What a
    resume needs lies in the checkpoint: here no scaler begins at SCALE."""
    folder, told, end = whole
    start = folder / "run" / "checkpoints" / f"step-{stop:09}"
    found, state = trained(tmp_path, urls, ALONE, f"train.samples={8 * STEPS}", f"resume={start}")
    assert found == told[stop:]
    assert same(state, end)


def of_two(rank: int, size: int, folder: str, urls: str):
    with pytest.MonkeyPatch.context() as patch:
        scaled_high(patch)
        own = Path(folder) / str(rank)
        own.mkdir()
        world = World(rank, size, rank, torch.device("cpu"))
        return trained(own, urls, world, f"run.dir={folder}/run", f"train.samples={8 * STEPS}")


@pytest.mark.slow
def test_ranks_skip_alike(whole, urls, tmp_path):
    (first, weights), (second, others) = run_ranks(of_two, 2, str(tmp_path), urls)
    assert first == second
    assert same(weights, others)
    assert first[0] == whole[1][0] == (True, SCALE / 2)
    assert any(skip for skip, _ in first)
    assert not all(skip for skip, _ in first)
