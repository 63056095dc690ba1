"""clipscale/schedule.py: each course of the learning rate against open_clip's schedulers, or its published formula."""

from __future__ import annotations

import math

import pytest
from open_clip_train.scheduler import const_lr, const_lr_cooldown, cosine_lr
from torch.optim import Optimizer

from clipscale.config import Config
from clipscale.config.load import load_config
from clipscale.schedule import learning_rate, schedule_lines, total_steps

BATCH, STEPS, WARMUP, COOLDOWN, LR, END = 10, 120, 15, 40, 0.5, 0.02


def config(*words: str, batch: int = BATCH, samples: int = BATCH * STEPS) -> Config:
    return load_config([f"train.global_batch={batch}", f"train.samples={samples}", f"optim.lr={LR}", *words])


def rates(settings: Config) -> list[float]:
    batch = settings.train.global_batch
    return [learning_rate(settings, step * batch) for step in range(total_steps(settings))]


class Holder(Optimizer):
    """What open_clip's schedulers set a rate on."""

    def __init__(self) -> None:
        self.param_groups = [{}]


@pytest.mark.parametrize(
    ("theirs", "words"),
    [
        (cosine_lr(Holder(), LR, WARMUP, STEPS), ["optim.schedule=cosine"]),
        (const_lr(Holder(), LR, WARMUP, STEPS), ["optim.schedule=constant"]),
        (
            const_lr_cooldown(Holder(), LR, WARMUP, STEPS, COOLDOWN, 1.0, END),
            ["optim.schedule=constant", f"optim.cooldown_steps={COOLDOWN}", f"optim.final_lr={END}"],
        ),
        (
            const_lr_cooldown(Holder(), LR, WARMUP, STEPS, COOLDOWN, 2.5, 0.0),
            ["optim.schedule=constant", f"optim.cooldown_samples={COOLDOWN * BATCH}", "optim.cooldown_power=2.5"],
        ),
    ],
    ids=["cosine", "const", "const-cooldown", "const-cooldown, power 2.5"],
)
def test_every_step_has_the_rate_of_open_clip(theirs, words):
    ours = rates(config(f"optim.warmup_steps={WARMUP}", *words))
    assert len(ours) == STEPS
    assert ours == pytest.approx([theirs(step) for step in range(STEPS)], rel=1e-12)


def test_rsqrt_follows_the_formula_of_big_vision():
    """lr / sqrt(1 + (step - warm-up) / timescale), times what is left of the cool-down; Zhai et al., 2106.04560."""
    words = ["optim.schedule=rsqrt", "optim.timescale_steps=25", f"optim.warmup_steps={WARMUP}"]
    curve = [LR / math.sqrt(1 + (step - WARMUP) / 25) for step in range(WARMUP, STEPS)]
    left = [min(1.0, (STEPS - step) / COOLDOWN) for step in range(WARMUP, STEPS)]
    rising = [LR * (step + 1) / WARMUP for step in range(WARMUP)]
    assert rates(config(*words)) == pytest.approx(rising + curve, rel=1e-12)
    cooled = rates(config(*words, f"optim.cooldown_steps={COOLDOWN}"))
    assert cooled == pytest.approx(rising + [rate * share for rate, share in zip(curve, left, strict=True)], rel=1e-12)
    floor = rates(config(*words, "optim.final_lr=0.3"))
    assert floor == pytest.approx(rising + [max(0.3, rate) for rate in curve], rel=1e-12)


def test_a_line_falls_from_the_peak_to_the_end():
    settings = config("optim.schedule=linear", f"optim.warmup_steps={WARMUP}", f"optim.final_lr={END}")
    falling = [LR + (END - LR) * step / (STEPS - WARMUP) for step in range(STEPS - WARMUP)]
    assert rates(settings)[WARMUP:] == pytest.approx(falling, rel=1e-12)
    assert learning_rate(settings, BATCH * STEPS) == END


@pytest.mark.parametrize("kind", ["cosine", "constant", "linear", "rsqrt"])
def test_another_batch_keeps_the_curve(kind):
    words = [f"optim.schedule={kind}", "optim.warmup_samples=100", "optim.cooldown_samples=350"]
    words += ["optim.timescale_samples=300"] if kind == "rsqrt" else []
    small, large = config(*words, batch=10, samples=1195), config(*words, batch=50, samples=1195)
    assert [learning_rate(small, seen) for seen in range(100, 1250, 50)] == [
        learning_rate(large, seen) for seen in range(100, 1250, 50)
    ]
    assert learning_rate(small, 1195) == learning_rate(small, 1200) == 0.0


@pytest.mark.parametrize(("rule", "factor"), [("linear", 4.0), ("sqrt", 2.0), ("none", 1.0)])
def test_a_rule_multiplies_peak_and_end_by_the_batch(rule, factor):
    words = [f"optim.final_lr={END}", "optim.warmup_samples=200", "optim.lr_batch=10"]
    settings, plain = config(*words, f"optim.lr_rule={rule}", batch=40), config(*words, batch=40)
    assert rates(settings) == pytest.approx([factor * rate for rate in rates(plain)], rel=1e-12)
    assert max(rates(settings)) == factor * LR
    assert learning_rate(settings, settings.train.samples) == factor * END


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "0.5, falls by a cosine to 0 at step 120"),
        (["optim.warmup_samples=145"], "rises to 0.5 at step 15, falls by a cosine to 0 at step 120"),
        (["optim.schedule=constant"], "0.5, stays there"),
        (
            ["optim.schedule=constant", "optim.cooldown_steps=40", "optim.cooldown_power=2", "optim.final_lr=0.1"],
            "0.5, stays there until step 80, cools down by the power of 2 to 0.1 at step 120",
        ),
        (
            ["optim.schedule=rsqrt", "optim.timescale_samples=400", "optim.cooldown_samples=400"],
            "0.5, falls by 1 / sqrt of 400 samples to 0.289 at step 80, cools down to 0 at step 120",
        ),
        (
            ["optim.lr_rule=sqrt", "optim.lr_batch=40", "optim.schedule=linear"],
            "0.25 (optim.lr=0.5, optim.lr_rule=sqrt), falls by a line to 0 at step 120",
        ),
        (["optim.warmup_steps=240"], "rises to 0.25 at the last step, 120"),
    ],
)
def test_what_the_rate_will_do_is_one_line(words, said):
    assert schedule_lines(config(*words)) == [f"learning rate: {said}"]


def test_few_steps_of_a_large_batch_are_told_with_what_would_make_more():
    line = schedule_lines(load_config(["train.global_batch=32768", "train.samples=400_000_000"]))[1]
    assert line.startswith("12,208 steps are few for an optimizer (a rule of thumb: 15,000 and more)")
    assert "train.samples=491,520,000" in line
    assert len(schedule_lines(load_config(["train.global_batch=32768", "train.samples=491_520_000"]))) == 1
