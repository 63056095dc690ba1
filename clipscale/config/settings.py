"""The settings of a run as a whole; those of `model`, `towers`, `data`, `replay`, `optim` and `eval` have files of
their own.

A value or combination that cannot be raises `UserError` with one line that holds the value, the rule and the fix.
Units live in names (`_steps`, `_samples`, `_bytes`, `_seconds`). `load.py` fills these in from YAML. No torch import.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from clipscale.config.data import Data, Replay, SourceSettings
from clipscale.config.evaluation import AVERAGE_PREFIX, EVALUATIONS, JUDGED_BY, Eval, Retrieval, Validation
from clipscale.config.model import Model
from clipscale.config.optim import Optim
from clipscale.config.towers import TowerSettings
from clipscale.errors import require
from clipscale.paths import LocalPath


@dataclass(frozen=True)
class Run:
    """Where a run lies, and how often it says something."""

    dir: LocalPath = "runs/default"  # checkpoints, metrics.jsonl, TensorBoard and the resolved config go here
    log_every_steps: int = 10  # one line in the log for so many steps; metrics.jsonl has every step
    timeout_seconds: float = 1800.0  # a rank that another has not heard of for so long is lost, and the run ends
    watchdog_seconds: float = 2400.0  # a rank that makes no progress for so long ends, and says where; 0: never
    leave_before_seconds: float = 120.0  # before a Slurm job's time is over: save and leave; 0: go on until killed

    def __post_init__(self) -> None:
        require(self.log_every_steps >= 1, f"run.log_every_steps={self.log_every_steps} must be at least 1")
        require(self.timeout_seconds > 0, f"run.timeout_seconds={self.timeout_seconds} must be above 0")
        for name in ("watchdog_seconds", "leave_before_seconds"):
            value = getattr(self, name)
            require(value >= 0, f"run.{name}={value} must not be negative")


@dataclass(frozen=True)
class Lock:
    """What keeps the weights it begins with: a tower as open_clip locks it, or parameters by pattern."""

    image: bool = False  # the image tower; of a timm backbone, all but the projection behind it
    text: bool = False  # the text tower; one of Hugging Face's, all but the projection behind it
    image_groups: int = 0  # so many layers of a locked image tower learn all the same, from the top: 1, the projection
    text_groups: int = 0  # the same of a locked text tower
    learn: tuple[str, ...] = ()  # what learns in locked towers: norms, biases, or patterns: ["visual.*ln_*"]
    patterns: tuple[str, ...] = ()  # what is locked beside: ["text.token_embedding.*", "logit_scale"]

    def __post_init__(self) -> None:
        for tower in ("image", "text"):
            groups = getattr(self, f"{tower}_groups")
            require(groups >= 0, f"train.lock.{tower}_groups={groups} must not be negative")
            require(
                groups == 0 or getattr(self, tower),
                f"train.lock.{tower}_groups={groups} unlocks layers of a tower that is not locked; set train.lock."
                f"{tower}=true",
            )
        require(
            not self.learn or self.image or self.text,
            f"train.lock.learn={list(self.learn)} is what learns in locked towers, and none is; set "
            "train.lock.image or train.lock.text to true",
        )

    def whole(self) -> list[str]:
        """The towers of which no layer is to learn, by these settings alone."""
        return [name for name in ("image", "text") if getattr(self, name) and not getattr(self, f"{name}_groups")]


@dataclass(frozen=True)
class Train:
    """How much is trained, at which batch and in which precision."""

    global_batch: int = 4096  # pairs a step, over all ranks
    samples: int = 12_800_000  # pairs to see in all; steps = ceil(samples / global_batch)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # autocast of the towers; auto: bf16 on CUDA, else fp32
    grad_clip_norm: float | None = 1.0  # a gradient that is longer is scaled down to this; null: never
    deterministic: bool = False  # on a GPU too, the same steps give the same bits; some operations become slower
    max_nonfinite_steps: int = 10  # a step whose gradient is not finite is skipped; so many in a row are divergence
    collapse_steps: int = 1000  # so many steps in a row without a sign of learning are collapse; 0: not looked for
    on_divergence: Literal["stop", "skip", "rollback"] = "stop"  # end, go on, or back to a checkpoint, past these data
    check_ranks_every_steps: int = 100  # ranks compare their weights so often, and before a checkpoint; 0: never
    max_rollbacks: int = 3  # a run goes back so many times at most
    lock: Lock = field(default_factory=Lock)

    def __post_init__(self) -> None:
        require(self.global_batch >= 1, f"train.global_batch={self.global_batch} must be at least 1")
        require(self.samples >= 1, f"train.samples={self.samples} must be at least 1")
        require(
            self.max_nonfinite_steps >= 1, f"train.max_nonfinite_steps={self.max_nonfinite_steps} must be at least 1"
        )
        require(
            self.check_ranks_every_steps >= 0,
            f"train.check_ranks_every_steps={self.check_ranks_every_steps} must not be negative",
        )
        require(self.max_rollbacks >= 1, f"train.max_rollbacks={self.max_rollbacks} must be at least 1")
        require(self.collapse_steps >= 0, f"train.collapse_steps={self.collapse_steps} must not be negative")
        require(
            self.grad_clip_norm is None or self.grad_clip_norm > 0,
            f"train.grad_clip_norm={self.grad_clip_norm} must be above 0, or null to switch clipping off",
        )


@dataclass(frozen=True)
class Ema:
    """An exponential moving average of the weights: evaluated, kept in checkpoints, exported."""

    half_life_samples: int = 0  # after so many samples a step's weights count half as much; 0: no average
    ramp_up: float = 0.05  # at first the half-life is this share of the samples seen; 0: the full one from the start
    evaluate: Literal["both", "only"] = "both"  # while training: the weights and their average, or the average only

    def __post_init__(self) -> None:
        require(self.half_life_samples >= 0, f"ema.half_life_samples={self.half_life_samples} must not be negative")
        require(self.ramp_up >= 0, f"ema.ramp_up={self.ramp_up} must not be negative")

    @property
    def enabled(self) -> bool:
        return self.half_life_samples > 0


@dataclass(frozen=True)
class GradCache:
    """What decides the towers' memory: how much of a batch they take at once, and what of it they need only once."""

    image_chunk: int | str = 256  # pictures that go through the image tower at once; auto: the fastest, by a search
    text_chunk: int | str = 1024  # captions of full length, or as many tokens of shorter ones; auto: as above
    forward_chunks: int | str = 1  # chunks that pass 1 takes at once where it keeps no graph; auto: 1, 2 or 4, as above
    keep_bytes: int | str = "auto"  # of a rank's memory for graphs of pass 1, which spare pass 2; auto: what is free

    def __post_init__(self) -> None:
        for name, least, what in (
            ("image_chunk", 1, "1 sample"),
            ("text_chunk", 1, "1 sample"),
            ("forward_chunks", 1, "1"),
            ("keep_bytes", 0, "0"),
        ):
            value = getattr(self, name)
            require(
                value == "auto" if isinstance(value, str) else value >= least,
                f"gradcache.{name}={value} must be at least {what}, or auto",
            )


@dataclass(frozen=True)
class Loss:
    """How the contrastive loss is computed; the result is the same to the precision asked for."""

    precision: Literal["auto", "fp16", "bf16", "tf32", "fp32", "fp64"] = "auto"  # auto: fp16 on CUDA, fp32 on CPU
    engine: Literal["auto", "triton", "torch"] = "auto"  # auto: the Triton kernels on a GPU that runs them, else torch
    tile: int | None = None  # rows and columns of the similarity matrix that exist at once; null: the engine's own

    def __post_init__(self) -> None:
        require(self.tile is None or self.tile >= 1, f"loss.tile={self.tile} must be at least 1, or null")


@dataclass(frozen=True)
class Checkpoint:
    """When the state of a run is written, and how much of it stays."""

    every_steps: int = 500  # also written at the end
    every_minutes: float = 30.0  # and after so long without one; a run's first comes earlier; 0: never by time
    keep: int = 2  # newest ones that stay on disk
    best: str | None = None  # a score (zeroshot/top1): the checkpoint with the best one stays too, as <run.dir>/best
    background: bool = True  # written while steps go on, from a copy in host memory; false: steps wait for the disk
    mirror: str | None = None  # a URL (s3://bucket/runs/a) they are copied to, and fetched from if run.dir has none
    on_error: Literal["stop", "report"] = "stop"  # of one that cannot be written: end, or train on to the next

    def __post_init__(self) -> None:
        require(self.every_steps >= 1, f"checkpoint.every_steps={self.every_steps} must be at least 1")
        require(self.every_minutes >= 0, f"checkpoint.every_minutes={self.every_minutes} must not be negative")
        require(self.keep >= 1, f"checkpoint.keep={self.keep} must be at least 1")
        require(
            self.mirror is None or "://" in self.mirror,
            f"checkpoint.mirror={self.mirror!r} must be a URL, such as s3://bucket/runs/a or file:///disk/runs/a",
        )


@dataclass(frozen=True)
class Wandb:
    """Curves at Weights & Biases too, beside TensorBoard; needs `pip install 'clipscale[wandb]'`."""

    project: str | None = None  # null: none of it
    entity: str | None = None  # user or team; null: the one that is logged in
    name: str | None = None  # of the run there; null: the last part of run.dir
    mode: Literal["online", "offline"] = "online"  # offline: into <run.dir>/wandb, for `wandb sync` later


@dataclass(frozen=True)
class Config:
    run: Run = field(default_factory=Run)
    seed: int = 0  # of the weights, the order of samples and everything drawn
    resume: LocalPath = "auto"  # auto: run.dir's newest good one; fresh: refuse one; a path: back to it, or from it
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is a GPU
    model: Model = field(default_factory=Model)
    towers: TowerSettings = field(default_factory=TowerSettings)
    data: Data = field(default_factory=Data)
    train: Train = field(default_factory=Train)
    optim: Optim = field(default_factory=Optim)
    ema: Ema = field(default_factory=Ema)
    gradcache: GradCache = field(default_factory=GradCache)
    replay: Replay = field(default_factory=Replay)
    loss: Loss = field(default_factory=Loss)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    eval: Eval = field(default_factory=Eval)
    wandb: Wandb = field(default_factory=Wandb)

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**63, f"seed={self.seed} must lie in [0, 2^63)")
        require(
            self.towers.residual != "bf16" or self.train.precision in ("bf16", "auto"),
            f"towers.residual=bf16 is not for train.precision={self.train.precision}; set towers.residual=open_clip",
        )
        batch, streams = self.train.global_batch, self.data.streams
        require(
            streams is None or batch % streams == 0,
            f"data.streams={streams} does not divide train.global_batch={batch}; choose a divisor, or null",
        )
        warmup, cooldown, samples = self.warmup_samples, self.cooldown_samples, self.train.samples
        require(
            cooldown == 0 or warmup + cooldown <= samples,
            f"the warm-up and the cool-down (optim.warmup_*: {warmup:,} samples, optim.cooldown_*: {cooldown:,}) are "
            f"longer than the run (train.samples={samples:,}); shorten them, or raise train.samples",
        )
        for key, value in flat(dataclasses.asdict(self)).items():
            require(not isinstance(value, float) or math.isfinite(value), f"{key}={value} must be a finite number")

    def held_out(self, its: Validation | Retrieval) -> SourceSettings:
        """The shards of an evaluation. A validation has its own caption or the rule of the sources that are trained on,
        extra shards aside; a retrieval takes all captions of a picture."""
        if isinstance(its, Retrieval):
            return SourceSettings(its.urls, caption=its.caption, captions="whole")
        trained = [source for source in self.data.sources.values() if source.weight > 0]
        agree = len({(*(source.own_captions or [source.caption]), source.captions) for source in trained}) == 1
        rule = trained[0] if agree else SourceSettings("")
        caption, weights = (rule.caption, rule.own_captions) if its.caption is None else (its.caption, None)
        return SourceSettings(its.urls, caption=caption, captions=rule.captions, caption_weights=weights)

    def judged_by(self) -> list[str]:
        """The scores of a run that tell a better checkpoint: of its weights, of their average, or of both."""
        of_weights = [""] * (not self.ema.enabled or self.ema.evaluate == "both") + [AVERAGE_PREFIX] * self.ema.enabled
        return [
            f"{prefix}{name}/{score}"
            for prefix in of_weights
            for name, its in self.eval.evaluations().items()
            for kind, scores in JUDGED_BY.items()
            if isinstance(its, EVALUATIONS[kind])
            for score in scores
        ]

    @property
    def warmup_samples(self) -> int:
        return self._in_samples("warmup")

    @property
    def cooldown_samples(self) -> int:
        return self._in_samples("cooldown")

    @property
    def timescale_samples(self) -> int:
        """Of optim.schedule=rsqrt; 0: not set."""
        return self._in_samples("timescale")

    def _in_samples(self, span: str) -> int:
        steps = getattr(self.optim, f"{span}_steps")
        return getattr(self.optim, f"{span}_samples") or 0 if steps is None else steps * self.train.global_batch

    @property
    def peak_lr(self) -> float:
        """The highest learning rate: optim.lr by optim.lr_rule."""
        return self.optim.lr * self._lr_factor

    @property
    def final_lr(self) -> float:
        """optim.final_lr by the same rule."""
        return self.optim.final_lr * self._lr_factor

    @property
    def _lr_factor(self) -> float:
        if self.optim.lr_rule == "none":
            return 1.0
        ratio = self.train.global_batch / self.optim.lr_batch
        return math.sqrt(ratio) if self.optim.lr_rule == "sqrt" else ratio


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """A config as nested dicts -> {'train.samples': 100, ...}"""
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in flat(item, f"{prefix}.{key}").items()}
    return {prefix[1:]: value}
