"""Why a loss is stuck: each sign, what it means and what to try, on rows that are made up and on those of real runs."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext

import pytest
from shards import write_pairs
from tiny import tiny_config

from clipscale.config import Config, Model, Optim, Train
from clipscale.errors import UserError
from clipscale.guard.diagnosis import diagnose
from clipscale.training.trainer import train

PAIRS = 4096
CONFIG = Config(
    train=Train(global_batch=PAIRS, samples=1000 * PAIRS), optim=Optim(warmup_steps=100), model=Model(name="ViT-B-32")
)
CHANCE = math.log(PAIRS)


def rows(*, first: int = 300, count: int = 50, **figures) -> list[dict]:
    """Of a healthy run, but for the figures given: each a number, or a function of how far the rows are (0 to 1)."""
    healthy = {
        "loss": lambda share: 5.0 - share,
        "logit_scale": 30.0,
        "grad_norm": 1.5,
        "lr": 4e-4,
        "image_accuracy": 0.2,
        "text_accuracy": 0.19,
        "repeated_captions": 3,
    }
    found = []
    for place in range(count):
        step = first + place
        values = {
            name: value(place / count) if callable(value) else value for name, value in (healthy | figures).items()
        }
        found.append({"step": step, "samples": step * PAIRS, **values})
    return found


def test_a_healthy_run_and_one_without_rows_have_nothing_conspicuous():
    assert diagnose(rows(), CONFIG) == []
    assert diagnose([], CONFIG) == []


@pytest.mark.parametrize(
    ("figures", "said"),
    [
        ({"loss": CHANCE}, ["loss 8.3178 against ln(4096) = 8.3178", "all alike (collapse)", "lower optim.lr"]),
        ({"loss": CHANCE + 0.02}, ["almost nothing is learned", "pictures and captions belong together"]),
        (
            {"loss": CHANCE, "first": 10, "lr": 1e-5},
            ["has only begun", "lr 1.00e-05 is still rising to 0.0005"],
        ),
        ({"loss": 4.0}, ["loss 4.0000 and then 4.0000 over the last 50 steps: it goes down no more"]),
        ({"logit_scale": 0.05}, ["logit scale 0.05, near 0 (it began at 14.3)"]),
        ({"logit_scale": 5.0}, ["logit scale 5, down from 14.3"]),
        ({"logit_scale": 100.0}, ["logit scale 100 is at its bound (model.logit_scale_max)"]),
        ({"grad_norm": 0.0}, ["gradient norm 0: nothing is learned any more"]),
        ({"grad_norm": 40.0}, ["are clipped to 1 at every step (train.grad_clip_norm)"]),
        ({"grad_norm": lambda share: None if share > 0.8 else 1.0}, ["9 of the last 50 steps were skipped"]),
        ({"loss": None, "grad_norm": None}, ["50 of the last 50 steps were skipped"]),
        ({"image_accuracy": 0.02, "text_accuracy": 0.4}, ["0.020 of pictures and 0.400 of captions"]),
        ({"lr": 1e-6, "first": 900}, ["lr 1.00e-06 is next to nothing beside its highest, 0.0005"]),
        ({"repeated_captions": 1000}, ["24.4% of a batch's captions repeat"]),
    ],
)
def test_each_sign_is_told_with_its_meaning(figures, said):
    lines = diagnose(rows(**figures), CONFIG)
    for words in said:
        assert any(words in line for line in lines), lines
    assert len(lines) <= 2


def test_it_says_nothing_of_repeats_where_no_row_counts_them():
    without = [{key: value for key, value in row.items() if key != "repeated_captions"} for row in rows()]
    assert diagnose(without, CONFIG) == []


def test_a_run_without_a_warm_up_that_learns_nothing_is_told_so():
    bare = Config(train=CONFIG.train, model=CONFIG.model)
    assert any("without a warm-up" in line for line in diagnose(rows(loss=8.0), bare))


@pytest.mark.slow
def test_real_rows_of_a_learning_rate_far_too_high_and_of_a_good_one(tmp_path):
    urls = write_pairs(tmp_path / "data", 4, 8, size=16)
    found = {}
    for lr in (5e-4, 0.1):
        folder = tmp_path / str(lr)
        folder.mkdir()
        config = tiny_config(folder, urls, f"optim.lr={lr}", "train.samples=640", "train.collapse_steps=55")
        with pytest.raises(UserError, match="collapse") if lr == 0.1 else nullcontext():
            train(config)
        lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
        found[lr] = diagnose([json.loads(line) for line in lines], config)
    assert any("all alike (collapse)" in line and "lower optim.lr" in line for line in found[0.1])
    assert any(line.startswith("gradient norm 0") for line in found[0.1])
    assert not any("collapse" in line for line in found[5e-4])
