"""Numbers that go wrong: steps are skipped on every rank alike, named, counted, and too many of them are divergence."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from shards import write_pairs
from spawn import run_ranks
from tiny import tiny_config

from clipscale.dist import World
from clipscale.errors import UserError
from clipscale.guard.divergence import Diverged, Guard
from clipscale.guard.health import Health, collapse_sign
from clipscale.resilience.injection import VARIABLE
from clipscale.towers import Tower
from clipscale.training.trainer import Trainer, train

ALONE = World(0, 1, 0, torch.device("cpu"))


@pytest.fixture(scope="module")
def urls(tmp_path_factory) -> str:
    return write_pairs(tmp_path_factory.mktemp("data"), 4, 8, size=16)


def rows(folder: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (folder / "run" / name).read_text().splitlines()]


def state_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Copies of every weight and moment."""
    tensors = dict(trainer.towers.model.state_dict())
    for number, slots in trainer.learner.optimizer.state_dict()["state"].items():
        tensors |= {f"{number} {name}": tensor for name, tensor in slots.items()}
    return {name: tensor.clone() for name, tensor in tensors.items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def watched(config, world: World) -> list[bool]:
    """Run it to its end; for each step, whether it left weights and moments as they were, bit for bit."""
    trainer, unchanged = Trainer(config, world), []
    step = trainer.step

    def compared(batch):
        before = state_of(trainer)
        row = step(batch)
        unchanged.append(same(before, state_of(trainer)))
        return row

    trainer.step = compared
    try:
        trainer.run()
    finally:
        trainer.close()
    return unchanged


def faulty_rank(rank: int, size: int, folder: str, urls: str, fault: str) -> tuple[list[bool], dict]:
    os.environ[VARIABLE] = fault
    config = tiny_config(Path(folder) / str(rank), urls, f"run.dir={folder}/run")
    world = World(rank, size, rank, torch.device("cpu"))
    trainers = []
    real = Trainer._begin
    Trainer._begin = lambda self: (trainers.append(self), real(self))[1]
    return watched(config, world), state_of(trainers[0])


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        (
            "nan_gradient",
            r"step 2: gradient norm is nan, first in visual\.[a-z_.]+; "
            r"rank 1 made it so in a chunk of 3 pictures \(\S+\.tar: \d+, .*\)",
        ),
        (
            "nan_embedding",
            r"step 2: the loss is not finite; rank 1 has text embeddings that are not, of 1 sample \(\S+\.tar: \d+\)",
        ),
    ],
)
def test_one_ranks_fault_is_a_skipped_step_of_all(tmp_path, urls, fault, named):
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
    (first, weights), (second, others) = run_ranks(faulty_rank, 2, str(tmp_path), urls, f"{fault}@2:1")
    assert first == second == [False, True, False, False]
    assert same(weights, others)
    found = rows(tmp_path)
    assert [row["grad_norm"] is None for row in found] == [False, True, False, False]
    assert [row["loss"] is None for row in found] == [False, fault == "nan_embedding", False, False]
    (reported,) = rows(tmp_path, "faults.jsonl")
    assert (reported["kind"], reported["step"], reported["lost_steps"]) == ("nonfinite", 2, 1)
    assert re.fullmatch(named, reported["what"])


@pytest.mark.parametrize("fault", ["nan_gradient", "nan_embedding"])
def test_the_samples_named_are_those_of_the_chunk_or_row(tmp_path, urls, monkeypatch, fault):
    monkeypatch.setenv(VARIABLE, f"{fault}@2:0")
    trainer = Trainer(tiny_config(tmp_path, urls), ALONE)
    batches, step = [], trainer.step
    trainer.step = lambda batch: (batches.append(batch), step(batch))[1]
    trainer.run()
    trainer.close()
    (reported,) = rows(tmp_path, "faults.jsonl")
    slots = [0, 1, 2] if fault == "nan_gradient" else [0]
    names = ", ".join(trainer.feed.keys(batches[1], slots))
    assert reported["what"].endswith(f"({names})")
    assert reported["action"] == "step skipped, 1 in a row, the weights stay as they were"


def test_a_run_skips_on_as_if_the_step_had_not_been(tmp_path, urls, monkeypatch):
    """In fp16 the loss scale alone changes, by its rule: for a gradient, not for an embedding."""
    scales = {}
    for fault in ("nan_gradient", "nan_embedding"):
        monkeypatch.setenv(VARIABLE, f"{fault}@2:0")
        folder = tmp_path / fault
        folder.mkdir()
        trainer = Trainer(tiny_config(folder, urls, "train.precision=fp16"), ALONE)
        before, after, step = [], [], trainer.step

        def seen(batch, step=step, trainer=trainer, before=before, after=after):
            before.append((state_of(trainer), trainer.learner.scaler.get_scale()))
            row = step(batch)
            after.append((state_of(trainer), trainer.learner.scaler.get_scale()))
            return row

        trainer.step = seen
        trainer.run()
        trainer.close()
        assert [same(old[0], new[0]) for old, new in zip(before, after, strict=True)] == [False, True, False, False]
        scales[fault] = after[1][1] / before[1][1]
    assert scales == {"nan_gradient": 0.5, "nan_embedding": 1.0}


def test_too_many_in_a_row_end_the_run_and_are_counted_over_restarts(tmp_path, urls, monkeypatch):
    """A restart does not begin to count anew; the checkpoint of the second skipped step holds what it was."""
    monkeypatch.setenv(VARIABLE, "nan_gradient@2:0,nan_gradient@3:0,nan_gradient@4:0")
    words = ["train.max_nonfinite_steps=3", "checkpoint.every_steps=1"]
    Path(tmp_path, "twin").mkdir()
    with pytest.raises(UserError, match=r"^step 4: 3 steps in a row without a finite gradient \(") as error:
        train(tiny_config(tmp_path / "twin", urls, "train.samples=64", *words))
    assert "lower optim.lr" in str(error.value)
    names = sorted(path.name for path in (tmp_path / "twin" / "run" / "checkpoints").iterdir())
    assert names == ["step-000000002", "step-000000003"]
    train(tiny_config(tmp_path, urls, "train.samples=24", *words))
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-000000003" / "state.json").read_text())
    assert state["health"]["nonfinite_in_a_row"] == 2
    with pytest.raises(UserError, match="step 4: 3 steps in a row without a finite gradient"):
        train(tiny_config(tmp_path, urls, "train.samples=64", *words))
    kinds = [row["kind"] for row in rows(tmp_path, "faults.jsonl")]
    assert kinds == ["nonfinite", "nonfinite", "nonfinite", "divergence", "error"]


def test_a_good_step_between_ends_the_count(tmp_path, urls, monkeypatch):
    monkeypatch.setenv(VARIABLE, "nan_gradient@1:0,nan_embedding@3:0")
    train(tiny_config(tmp_path, urls, "train.max_nonfinite_steps=2"))
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4]


def test_it_may_go_on_skipping(tmp_path, urls, monkeypatch):
    monkeypatch.setenv(VARIABLE, "nan_gradient@*:0")
    words = ["train.max_nonfinite_steps=2", "train.on_divergence=skip"]
    assert watched(tiny_config(tmp_path, urls, *words), ALONE) == [True] * 4
    found = rows(tmp_path, "faults.jsonl")
    assert [row["kind"] for row in found].count("divergence") == 1
    assert "train.on_divergence=skip" in found[2]["action"]


@pytest.mark.parametrize("scale", [math.nan, -1e4])
def test_weights_that_are_not_finite_end_the_run_at_once(tmp_path, urls, scale):
    """Skipping does not mend them. A logit scale that underflows to 0 is one of the last signs before."""
    trainer = Trainer(tiny_config(tmp_path, urls, "train.max_nonfinite_steps=2"), ALONE)
    with torch.no_grad():
        trainer.towers.model.logit_scale.fill_(scale)
    wanted = {True: "step 1: weights are not finite", False: "step 2: 2 steps in a row"}[math.isnan(scale)]
    with pytest.raises(UserError, match=wanted):
        trainer.run()
    trainer.close()
    what = rows(tmp_path, "faults.jsonl")[0]["what"]
    assert what.startswith(f"step 1: the logit scale is {'nan' if math.isnan(scale) else 0.0}")
    assert ("weight logit_scale of rank 0 is not finite" in what) == math.isnan(scale)


def test_a_tower_that_loses_its_head_names_the_weight(tmp_path, urls, monkeypatch):
    trainer = Trainer(tiny_config(tmp_path, urls), ALONE)
    with torch.no_grad():
        trainer.towers.model.text.ln_final.weight.fill_(math.nan)
    with pytest.raises(UserError, match=r"step 1: weights are not finite; lower optim\.lr or lengthen"):
        trainer.run()
    trainer.close()
    assert not list((tmp_path / "run" / "checkpoints").glob("*"))
    assert "weight text.ln_final.weight of rank 0 is not finite" in rows(tmp_path, "faults.jsonl")[0]["what"]


def test_a_gradient_lost_inside_a_tower_names_its_chunk(tmp_path, urls, monkeypatch):
    """In the backward of one chunk of captions: nothing before it shows anything."""
    embed, calls = Tower.__call__, []

    def spoilt(self, inputs, positions=None):
        out = embed(self, inputs, positions)
        if self.name == "text" and out.requires_grad:
            calls.append(len(inputs))
            if len(calls) == 2:
                out.register_hook(lambda grad: grad * math.nan)
        return out

    monkeypatch.setattr(Tower, "__call__", spoilt)
    train(tiny_config(tmp_path, urls, "train.samples=8"))
    assert len(calls) == 2
    assert "rank 0 made it so in a chunk of 3 captions (" in rows(tmp_path, "faults.jsonl")[0]["what"]


def test_a_learning_rate_far_too_high_is_collapse_and_its_state_is_no_checkpoint(tmp_path, urls):
    """A real one: all embeddings of a side become one, the gradient 0."""
    words = ["optim.lr=0.1", "train.samples=480", "train.collapse_steps=5", "checkpoint.every_steps=1"]
    with pytest.raises(UserError, match=r"^step \d+: collapsed: the .*, for 5 steps .*; lower optim\.lr"):
        train(tiny_config(tmp_path, urls, *words, "checkpoint.keep=100"))
    found, faults = rows(tmp_path), rows(tmp_path, "faults.jsonl")
    last = found[-1]["step"] + 1  # the one that ended it has no row
    saved = sorted(int(path.name[5:]) for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert saved == [*range(1, last - 4)]
    assert [row["kind"] for row in faults] == [*["checkpoint"] * 4, "collapse", "error"]
    assert faults[0]["what"] == f"step {last - 4}: no checkpoint is written: the run shows collapse, for 1 step"


def row_of(step: int, loss: float, scale: float = 14.0, grad_norm: float = 1.0) -> dict:
    return {"step": step, "samples": 8 * step, "loss": loss, "logit_scale": scale, "grad_norm": grad_norm}


@pytest.mark.parametrize(
    ("losses", "ends"),
    [
        ([math.log(8)] * 40, None),  # a run that has only begun: warm-up and as many steps again
        ([math.log(8)] * 60, 50),
        ([1.5, *[math.log(8)] * 20], 11),
        ([1.5, *[math.log(8)] * 9, 2.0, *[math.log(8)] * 9], None),
        ([*[2.2] * 30, *[2.07] * 60], None),
    ],
)
def test_a_loss_of_guessing_is_collapse_once_the_run_had_learned_or_should_have(tmp_path, urls, losses, ends):
    config = tiny_config(tmp_path, urls, "train.collapse_steps=10", "optim.warmup_steps=30")
    guard = Guard(config, None, ALONE, {})
    with pytest.raises(Diverged) if ends else nullcontext() as ended:
        for step, loss in enumerate(losses, start=1):
            guard.look(row_of(step, loss), 8, None, None)
    assert ends is None or ended.value.step == ends


@pytest.mark.parametrize(
    ("row", "pairs", "sign"),
    [
        (row_of(1, 2.05, scale=0.1), 8, "the logit scale is 0.1, near 0"),
        (row_of(1, 2.05, scale=0.2), 8, ""),
        (row_of(1, 2.05, grad_norm=0.0), 8, "the gradient is 0"),
        (row_of(1, 0.0, grad_norm=0.0), 8, ""),  # nothing is left to learn
        (row_of(1, 0.0, grad_norm=0.0), 1, ""),  # a pair alone is never wrong
        (row_of(1, 2.0790), 8, "the loss is 2.0790, ln(8): that of guessing"),
        (row_of(1, 2.0770), 8, ""),
    ],
)
def test_signs_of_collapse(row, pairs, sign):
    assert collapse_sign(row, pairs=pairs, scale_init=1 / 0.07, chance=True) == sign


def test_the_counts_survive_and_may_be_switched_off(tmp_path, urls):
    guard = Guard(tiny_config(tmp_path, urls, "train.collapse_steps=3"), None, ALONE, {})
    for step in (1, 2):
        guard.look(row_of(step, 2.05, grad_norm=0.0), 8, None, None)
    guard.look(row_of(3, 0.0, grad_norm=0.0), 0, None, None)  # no pair at all: it says nothing
    again = Guard(tiny_config(tmp_path, urls, "train.collapse_steps=3"), None, ALONE, guard.record())
    with pytest.raises(Diverged, match="step 4: collapsed: the gradient is 0, for 3 steps"):
        again.look(row_of(4, 2.05, grad_norm=0.0), 8, None, None)
    never = Guard(tiny_config(tmp_path, urls, "train.collapse_steps=0"), None, ALONE, {})
    for step in range(20):
        never.look(row_of(step, 2.05, grad_norm=0.0), 8, None, None)
    assert never.record() == dataclasses.asdict(Health())


def test_embeddings_that_are_too_long_are_told_in_the_words_of_the_settings(tmp_path, urls, monkeypatch):
    """The loss's own words are for its callers: they name its arguments."""
    embed = Tower.__call__
    monkeypatch.setattr(Tower, "__call__", lambda self, *inputs: 9 * embed(self, *inputs))
    said = r"^step 1: image embedding 0 of rank 0 has norm 9: .*; set loss\.precision=bf16 or fp32, or lower optim\.lr$"
    with pytest.raises(UserError, match=said):
        train(tiny_config(tmp_path, urls, "loss.precision=fp16"))
