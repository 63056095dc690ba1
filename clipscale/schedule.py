"""The learning rate and the length of a run, pure functions of the config and of the samples seen. No torch import.

learning_rate(config, samples_seen=0)  # of the step that begins there
total_steps(config)  # 3125
rate_jump(before, config, position)  # what to tell of a resume that bends the curve; "" where it does not
"""

from __future__ import annotations

import math

from clipscale.config import Config

_BEND = 0.01  # of the highest rate: a smaller change of course is not told


def learning_rate(config: Config, samples_seen: int) -> float:
    """Linear warm-up, then a cosine to `final_lr`, for the step that begins after `samples_seen` samples.

    In samples, so that it survives a change of the global batch; ranks do not enter at all.
    """
    optim, total, warmup = config.optim, config.train.samples, config.warmup_samples
    if samples_seen < warmup:
        return optim.lr * min(1.0, (samples_seen + config.train.global_batch) / warmup)
    progress = min(1.0, (samples_seen - warmup) / max(1, total - warmup))
    return optim.final_lr + (optim.lr - optim.final_lr) * (1 + math.cos(math.pi * progress)) / 2


def total_steps(config: Config, samples_seen: int = 0) -> int:
    """Steps still to do after `samples_seen` samples: ceil(rest / global batch)."""
    return max(0, -(-(config.train.samples - samples_seen) // config.train.global_batch))


def rate_jump(before: Config, now: Config, position: int) -> str:
    """One line where a run under `now` goes on after `position` samples at another rate than `before` would have had
    there: both rates, and what to do. Empty where the curve goes on as it was.
    """
    was, will = learning_rate(before, position), learning_rate(now, position)
    if position >= now.train.samples or abs(will - was) <= _BEND * max(before.optim.lr, now.optim.lr):
        return ""
    last = learning_rate(before, max(0, position - before.train.global_batch))
    return (
        f"warning: the learning rate jumps from {last:.3g} (the last step before) to {will:.3g} (the next one): the "
        f"curve is drawn by optim.* and train.samples, {now.train.samples:,} now and {before.train.samples:,} before; "
        "to go on gently set optim.lr to the highest rate that you want from here on"
    )


def is_due(every_steps: int, step: int, last_step: int) -> bool:
    """Whether what comes every so many steps (0: never) and at the last one comes after `step` steps."""
    return step == last_step or (every_steps > 0 and step % every_steps == 0)


def times_due(every_steps: int, done: int, last: int) -> int:
    """How often what is due every so many steps (0: never) and at the last one is still to come after `done` steps."""
    if done >= last:
        return 0
    return 1 + ((last - 1) // every_steps - done // every_steps if every_steps else 0)


def evaluations_due(config: Config, step: int, last_step: int) -> list[str]:
    """Names of the evaluations that come after `step` steps, in the order in which they are made.

    What comes every so many samples comes at the first step that has seen them.
    """
    batch = config.train.global_batch
    return [
        name
        for name, its in config.eval.evaluations().items()
        if is_due(its.every_steps, step, last_step)
        or (its.every_samples and step * batch // its.every_samples > (step - 1) * batch // its.every_samples)
    ]


def save_due(config: Config, step: int, last_step: int) -> bool:
    """Whether a checkpoint comes after `step` steps: one is due, or the evaluation that tells the best one is."""
    return is_due(config.checkpoint.every_steps, step, last_step) or _judge(config) in evaluations_due(
        config, step, last_step
    )


def others_left(config: Config, step: int, last_step: int) -> dict[str, int]:
    """How often what comes between the steps is still to come after `step` of them, by name."""
    batch = config.train.global_batch
    every = {
        name: -(-its.every_samples // batch) if its.every_samples else its.every_steps
        for name, its in config.eval.evaluations().items()
    }
    left = {name: times_due(steps, step, last_step) for name, steps in every.items()}
    saves = times_due(config.checkpoint.every_steps, step, last_step)
    return left | {"checkpoint": max(saves, left.get(_judge(config), 0))}


def _judge(config: Config) -> str:
    """Name of the evaluation whose score tells the best checkpoint, of the weights or of their average; "": none."""
    return (config.checkpoint.best or "").rpartition("/")[0].removeprefix("ema/")
