"""The learning rate and the length of a run, pure functions of the config and of the samples seen. No torch import.

learning_rate(config, samples_seen=0)  # of the step that begins there
total_steps(config)  # 3125
schedule_lines(config)  # ["learning rate: 0.0005 from step 1 on; cosine to 0 (...)", ...]
rate_jump(before, config, position)  # what to tell of a resume that bends the curve; "" where it does not
"""

from __future__ import annotations

import math

from clipscale.config import AVERAGE_PREFIX, Config
from clipscale.words import counted

_MANY_STEPS, _LARGE_BATCH = 15_000, 4_096
_BEND = 0.01  # of the highest rate: a smaller change of course is not told


def learning_rate(config: Config, samples_seen: int) -> float:
    """Of the step that begins after `samples_seen` samples: warm-up, then `optim.schedule`, then the cool-down.

    In samples, so that it survives a change of the global batch; ranks do not enter at all. constant with a cool-down
    is open_clip's const-cooldown; rsqrt is that of big_vision (Zhai et al., arXiv 2106.04560): in the cool-down too its
    curve goes on, and is multiplied.
    """
    peak, warmup = config.peak_lr, config.warmup_samples
    if samples_seen < warmup:
        return peak * min(1.0, (samples_seen + config.train.global_batch) / warmup)
    rate, final, cooldown = _scheduled(config, samples_seen), config.final_lr, config.cooldown_samples
    passed = samples_seen - (config.train.samples - cooldown)
    if cooldown == 0 or passed <= 0:
        return rate
    return final + (rate - final) * max(0.0, 1 - passed / cooldown) ** config.optim.cooldown_power


def _scheduled(config: Config, samples_seen: int) -> float:
    """After the warm-up, without the cool-down."""
    kind, peak, final = config.optim.schedule, config.peak_lr, config.final_lr
    after = samples_seen - config.warmup_samples
    if kind == "constant":
        return peak
    if kind == "rsqrt":
        return max(final, peak / math.sqrt(1 + after / config.timescale_samples))
    progress = min(1.0, after / max(1, config.train.samples - config.warmup_samples))
    share = (1 + math.cos(math.pi * progress)) / 2 if kind == "cosine" else 1 - progress
    return final + (peak - final) * share


def schedule_lines(config: Config) -> list[str]:
    """What the learning rate will do, in steps; and where a large batch makes few of them, that it does."""
    optim, batch, steps = config.optim, config.train.global_batch, total_steps(config)
    warmup, begins = -(-config.warmup_samples // batch), config.train.samples - config.cooldown_samples
    rule = "" if optim.lr_rule == "none" else f" (optim.lr={optim.lr:g}, optim.lr_rule={optim.lr_rule})"
    if warmup >= steps and warmup > 1:
        line = f"rises to {learning_rate(config, (steps - 1) * batch):.3g} at the last step, {steps:,}"
    else:
        line = f"rises to {config.peak_lr:.3g}{rule} at step {warmup:,}" if warmup else f"{config.peak_lr:.3g}{rule}"
        course = {
            "cosine": "a cosine",
            "linear": "a line",
            "rsqrt": f"1 / sqrt of {config.timescale_samples:,} samples",
        }
        reached = f"{learning_rate(config, begins):.3g} at step {-(-begins // batch):,}"
        line += f", falls by {course[optim.schedule]} to {reached}" if optim.schedule in course else ", stays there"
        if config.cooldown_samples:
            power = f" by the power of {optim.cooldown_power:g}" if optim.cooldown_power != 1 else ""
            line += f" until step {-(-begins // batch):,}" if optim.schedule == "constant" else ""
            line += f", cools down{power} to {config.final_lr:.3g} at step {steps:,}"
    few = (
        f"{counted(steps, 'step')} are few for an optimizer (a rule of thumb: {_MANY_STEPS:,} and more): see more "
        f"samples (train.samples={_MANY_STEPS * batch:,}) or choose a smaller train.global_batch"
    )
    return [f"learning rate: {line}", *([few] if steps < _MANY_STEPS and batch >= _LARGE_BATCH else [])]


def total_steps(config: Config, samples_seen: int = 0) -> int:
    """Steps still to do after `samples_seen` samples: ceil(rest / global batch)."""
    return max(0, -(-(config.train.samples - samples_seen) // config.train.global_batch))


def rate_jump(before: Config, now: Config, position: int) -> str:
    """One line where a run under `now` goes on after `position` samples at another rate than `before` would have had
    there: both rates, and what to do. Empty where the curve goes on as it was.
    """
    was, will = learning_rate(before, position), learning_rate(now, position)
    if position >= now.train.samples or abs(will - was) <= _BEND * max(before.peak_lr, now.peak_lr):
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
    return (config.checkpoint.best or "").rpartition("/")[0].removeprefix(AVERAGE_PREFIX)
