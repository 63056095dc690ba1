"""clipscale/sense.py and rate_jump: settings that are valid alone and senseless together, told with the arithmetic."""

from __future__ import annotations

import pytest
from shards import write_pairs
from tiny import tiny_config

from clipscale.config.load import load_config
from clipscale.config.recipes import list_recipes
from clipscale.preflight.sense import odd_pairs
from clipscale.schedule import learning_rate, rate_jump, total_steps
from clipscale.training.trainer import train

PAIRS = [
    (
        ["train.samples=5_000_000", "optim.warmup_samples=20_000_000", "train.global_batch=32768", "optim.lr=1e-3"],
        "optim.warmup_samples=20,000,000 (611 steps) is no shorter than the run (train.samples=5,000,000, 153 steps): "
        "the learning rate only rises, to 0.000251 at the last step, 25% of optim.lr=0.001; a tenth of the run is "
        "optim.warmup_steps=15",
    ),
    (
        ["train.samples=1000", "train.global_batch=10", "optim.warmup_steps=100"],
        "optim.warmup_steps=100 (100 steps) is no shorter than the run (train.samples=1,000, 100 steps): the learning "
        "rate only rises, to 0.0005 at the last step, 100% of optim.lr=0.0005; a tenth of the run is "
        "optim.warmup_steps=10",
    ),
    (
        ["train.samples=400_000_000", "train.global_batch=1_000_000", "optim.warmup_samples=20_000_000"],
        "optim.warmup_samples=20,000,000 is a warm-up of 20 steps at train.global_batch=1,000,000, of the run's 400: a "
        "rate of 0.0005 may need about 1,000; say what is meant in steps (optim.warmup_steps=20 and "
        "optim.warmup_samples=null for this one)",
    ),
    (
        ["train.samples=1000", "train.global_batch=10", "optim.warmup_steps=60"],
        "optim.warmup_steps=60 (60 steps) is more than half of the run (train.samples=1,000, 100 steps); a tenth of it "
        "is optim.warmup_steps=10",
    ),
    (
        ["train.samples=100", "train.global_batch=4096"],
        "train.samples=100 is less than one batch (train.global_batch=4,096): the run is 1 step, of 4,096 samples",
    ),
    (
        ["checkpoint.every_steps=5000"],
        "checkpoint.every_steps=5,000 is more than the run's 3,125 steps: nothing is saved",
    ),
    (
        ["run.log_every_steps=5000"],
        "run.log_every_steps=5,000 is more than the run's 3,125 steps: no step but the last",
    ),
    (["model.name=ViT-B-32", "model.embed_dim=256"], "model.embed_dim=256 is not used: model.name='ViT-B-32' brings"),
    (
        ["model.name=ViT-B-32", "model.quick_gelu=true"],
        "model.quick_gelu=True is not used: model.name='ViT-B-32' brings",
    ),
    (
        ["optim.schedule=constant", "optim.final_lr=1e-5"],
        "optim.final_lr=1e-05 is not used: optim.schedule=constant without a cool-down",
    ),
    (["optim.cooldown_power=2"], "optim.cooldown_power=2.0 is not used: there is no cool-down"),
    (["optim.timescale_steps=10"], "optim.timescale_steps=10 is not used: optim.schedule=cosine"),
    (["optim.lr_batch=256"], "optim.lr_batch=256 is not used: optim.lr_rule=none"),
    (["ema.evaluate=only"], "ema.* is not used: ema.half_life_samples=0"),
    (["wandb.mode=offline"], "wandb.* is not used: wandb.project=null"),
    (["model.name=ViT-B-16-SigLIP"], "model.name='ViT-B-16-SigLIP' has a bias of -10 for its sigmoid loss"),
    (["eval.zeroshot.every_steps=5"], "eval.zeroshot.every_steps=5 without eval.zeroshot.urls or eval.zeroshot.folder"),
    (["eval.retrieval.every_samples=800"], "eval.retrieval.every_samples=800 without eval.retrieval.urls: nothing is"),
    (["eval.validation.every_steps=5"], "eval.validation.every_steps=5 without eval.validation.urls: nothing is"),
    (
        ["eval.validation.urls=x.tar", "eval.validation.samples=100"],
        "eval.validation.samples=100 is less than eval.validation.batch=1,024: loss and accuracy are those of one",
    ),
]


@pytest.mark.parametrize(("words", "said"), PAIRS, ids=lambda value: value[-1] if isinstance(value, list) else "")
def test_a_senseless_pair_is_told_with_its_arithmetic(words, said):
    (line,) = odd_pairs(load_config(words))
    assert line.startswith(f"warning: {said}")


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["optim.warmup_steps=20"],  # said in steps, it is meant
        ["optim.warmup_samples=4_096_000"],
        ["optim.warmup_steps=1", "train.samples=4096"],
        ["train.samples=4096"],  # one step, and fewer than the usual intervals
    ],
)
def test_what_can_be_meant_is_not_told(words):
    assert odd_pairs(load_config(words)) == []


@pytest.mark.parametrize("recipe", list_recipes())
def test_recipes_have_no_senseless_pair(recipe):
    assert odd_pairs(load_config([recipe])) == []


def test_the_rate_that_is_told_is_the_one_that_is_reached():
    config = load_config(["train.samples=5_000_000", "optim.warmup_samples=20_000_000", "train.global_batch=32768"])
    rates = [learning_rate(config, step * 32768) for step in range(total_steps(config))]
    assert max(rates) == rates[-1]
    assert f"to {max(rates):.3g} at the last step" in odd_pairs(config)[0]


# --- a resume that bends the curve ------------------------------------------------------------------------------------


def schedule(*words: str):
    return load_config(["train.global_batch=10", "train.samples=1000", "optim.lr=0.5", *words])


def test_more_samples_for_a_finished_run_make_the_rate_jump():
    line = rate_jump(schedule(), schedule("train.samples=2000"), 1000)
    assert "the learning rate jumps from 0.000123 (the last step before) to 0.25 (the next one)" in line
    assert "train.samples, 2,000 now and 1,000 before" in line


@pytest.mark.parametrize(
    ("words", "position"),
    [([], 500), (["train.samples=2000"], 0), (["train.samples=2000"], 10), (["train.global_batch=20"], 500)],
)
def test_a_curve_that_goes_on_is_not_told(words, position):
    assert rate_jump(schedule(), schedule(*words), position) == ""


def test_another_rate_or_warm_up_is_told():
    assert rate_jump(schedule(), schedule("optim.lr=0.4"), 500)
    assert rate_jump(schedule("optim.warmup_steps=10"), schedule("optim.warmup_steps=50"), 100)


def test_a_cool_down_that_is_undone_is_told_and_one_that_is_put_off_is_not():
    cooled = schedule("optim.schedule=constant", "optim.cooldown_samples=200")
    longer = schedule("optim.schedule=constant", "optim.cooldown_samples=200", "train.samples=2000")
    assert rate_jump(cooled, longer, 800) == ""
    assert "jumps from 0.025 (the last step before) to 0.5 (the next one)" in rate_jump(cooled, longer, 1000)


def test_a_run_that_goes_on_says_both_rates(tmp_path):
    urls = write_pairs(tmp_path / "pairs", 2, 8, size=16)
    train(tiny_config(tmp_path, urls))
    train(tiny_config(tmp_path, urls, "train.samples=64"))
    log = (tmp_path / "run" / "run.log").read_text()
    assert log.count("the learning rate jumps from 7.32e-05 (the last step before) to 0.00025 (the next one)") == 1
