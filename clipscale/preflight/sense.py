"""Settings that are each valid and make no sense together: one warning a pair, with the arithmetic. No torch import.

odd_pairs(config)  # ["warning: optim.warmup_samples=20,000,000 is longer than the run ..."]

What cannot be at all is refused where the setting is (config/). What is here could be meant, in a trial for one.
"""

from __future__ import annotations

from collections.abc import Iterator

from clipscale.config import Checkpoint, Config, Model, Optim, Run, Validation
from clipscale.schedule import learning_rate, total_steps
from clipscale.upstream.open_clip_files import logit_bias_init
from clipscale.words import counted

_WARMUP_STEPS = 1_000  # fewer for a warm-up in samples are told: large batches make few steps of many samples


def odd_pairs(config: Config) -> list[str]:
    """What a person should hear before a new run."""
    found = [*_length(config), *_warm_up(config), *_unused(config), *_evaluations(config)]
    return [f"warning: {line}" for line in found]


def _length(config: Config) -> Iterator[str]:
    samples, batch, steps = config.train.samples, config.train.global_batch, total_steps(config)
    if samples < batch:
        yield (
            f"train.samples={samples:,} is less than one batch (train.global_batch={batch:,}): the run is 1 step, of "
            f"{batch:,} samples"
        )
    for setting, every, usual, what in (
        ("run.log_every_steps", config.run.log_every_steps, Run().log_every_steps, "no step but the last is told"),
        (
            "checkpoint.every_steps",
            config.checkpoint.every_steps,
            Checkpoint().every_steps,
            "nothing is saved before its end",
        ),
    ):
        if every > steps > usual:
            yield f"{setting}={every:,} is more than the run's {steps:,} steps: {what}"


def _warm_up(config: Config) -> Iterator[str]:
    optim, batch, steps = config.optim, config.train.global_batch, total_steps(config)
    setting = "warmup_samples" if optim.warmup_samples is not None else "warmup_steps"
    value, warmup = getattr(optim, setting), -(-config.warmup_samples // batch)
    rises, lasts, tenth = counted(warmup, "step"), counted(steps, "step"), max(1, steps // 10)
    if warmup >= steps and warmup > 1:
        reached = learning_rate(config, (steps - 1) * batch)
        highest = f"optim.lr={optim.lr:.3g}" if optim.lr_rule == "none" else f"{config.peak_lr:.3g}"
        yield (
            f"optim.{setting}={value:,} ({rises}) is no shorter than the run (train.samples="
            f"{config.train.samples:,}, {lasts}): the learning rate only rises, to {reached:.3g} at the last step, "
            f"{reached / config.peak_lr:.0%} of {highest}; a tenth of the run is optim.warmup_steps={tenth:,}"
        )
    elif 2 * warmup > steps and warmup > 1:
        yield (
            f"optim.{setting}={value:,} ({rises}) is more than half of the run (train.samples="
            f"{config.train.samples:,}, {lasts}); a tenth of it is optim.warmup_steps={tenth:,}"
        )
    elif setting == "warmup_samples" and 0 < warmup < _WARMUP_STEPS:
        yield (
            f"optim.warmup_samples={value:,} is a warm-up of {rises} at train.global_batch={batch:,}, of the run's "
            f"{steps:,}: a rate of {config.peak_lr:.3g} may need about {_WARMUP_STEPS:,}; say what is meant in steps "
            f"(optim.warmup_steps={warmup:,} and optim.warmup_samples=null for this one)"
        )


def _unused(config: Config) -> Iterator[str]:
    model, usual = config.model, Model()
    for name in ("embed_dim", "quick_gelu"):
        if model.name is not None and getattr(model, name) != getattr(usual, name):
            yield f"model.{name}={getattr(model, name)} is not used: model.name={model.name!r} brings its own"
    if (bias := logit_bias_init(model)) is not None:
        yield (
            f"model.name={model.name!r} has a bias of {bias:g} for its sigmoid loss (init_logit_bias), which has no "
            "part in the softmax loss that is trained here"
        )
    for name in ("init_towers", "init_strict", "init_context"):
        if model.init is None and getattr(model, name) != getattr(usual, name):
            yield f"model.{name}={getattr(model, name)} is not used: model.init is null"
    yield from _unused_rates(config.optim)
    for section, master, off in (("ema", "half_life_samples", 0), ("wandb", "project", None)):
        its = getattr(config, section)
        if getattr(its, master) == off and its != type(its)():
            yield f"{section}.* is not used: {section}.{master}={'null' if off is None else off}"
    evaluation = config.eval
    for kind, is_on, pictures in (
        ("zeroshot", evaluation.zeroshot.enabled, "urls or eval.zeroshot.folder"),
        ("validation", evaluation.validation.enabled, "urls"),
        ("retrieval", evaluation.retrieval.enabled, "urls"),
    ):
        for setting in ("every_steps", "every_samples"):
            every = getattr(getattr(evaluation, kind), setting)
            if every and not is_on:
                yield f"eval.{kind}.{setting}={every} without eval.{kind}.{pictures}: nothing is evaluated"


def _unused_rates(optim: Optim) -> Iterator[str]:
    unused = {}
    if not (optim.cooldown_samples or optim.cooldown_steps):
        unused["cooldown_power"] = "there is no cool-down (optim.cooldown_*)"
        if optim.schedule == "constant":
            unused["final_lr"] = "optim.schedule=constant without a cool-down (optim.cooldown_*)"
    if optim.schedule != "rsqrt":
        unused |= dict.fromkeys(("timescale_samples", "timescale_steps"), f"optim.schedule={optim.schedule}")
    if optim.lr_rule == "none":
        unused["lr_batch"] = "optim.lr_rule=none"
    for name, why in unused.items():
        if (value := getattr(optim, name)) != getattr(Optim(), name):
            yield f"optim.{name}={value} is not used: {why}"


def _evaluations(config: Config) -> Iterator[str]:
    for name, its in config.eval.evaluations().items():
        if isinstance(its, Validation) and its.samples < its.batch:
            key = config.eval.key(name)
            yield (
                f"{key}.samples={its.samples:,} is less than {key}.batch={its.batch:,}: "
                f"loss and accuracy are those of one batch of {its.samples:,}"
            )
