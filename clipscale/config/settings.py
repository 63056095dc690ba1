"""Every setting of clipscale (those of `data` and `replay` in data.py). No torch import.

A value or combination that cannot be raises `UserError` with one line that holds the value, the rule and the fix.
Units live in names (`_steps`, `_samples`, `_bytes`, `_seconds`). `load.py` fills these in from YAML.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from clipscale.config.data import Data, Replay, SourceSettings, require_member
from clipscale.errors import require
from clipscale.paths import LocalFile, LocalPath, ShardUrls, WeightsPath


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
class Preprocess:
    """How a picture becomes what the image tower takes: open_clip's preprocess_cfg, by default that of most models."""

    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)  # taken off red, green, blue (0 to 1)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)  # by which they are then divided
    resize_mode: Literal["shortest", "longest", "squash"] = "shortest"  # evaluation: the side that becomes S, or both
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"  # of evaluation's resize
    fill_color: int = 0  # beside a picture whose longest side became S: this grey, 0 to 255

    def __post_init__(self) -> None:
        require(all(std > 0 for std in self.std), f"model.preprocess.std={list(self.std)} must be above 0")
        require(
            0 <= self.fill_color <= 255, f"model.preprocess.fill_color={self.fill_color} must lie between 0 and 255"
        )


@dataclass(frozen=True)
class Model:
    """An open_clip model by its name, or one of one's own by `vision` and `text`: either, not both."""

    name: str | None = None  # such as ViT-B-32
    embed_dim: int = 512  # D; used only with vision/text below, a named model brings its own
    vision: dict[str, Any] | None = None  # fields of open_clip's CLIPVisionCfg
    text: dict[str, Any] | None = None  # fields of open_clip's CLIPTextCfg
    quick_gelu: bool = False  # x * sigmoid(1.702 x) as the activation, as OpenAI's own models have it
    logit_scale_init: float = 1 / 0.07  # what similarities are multiplied by at the start; it is learned
    logit_scale_max: float = 100.0  # it is held at or below this
    image_size: int | None = None  # pixels of a side, of any model; null: the model's own
    context_length: int | None = None  # tokens of a caption, of any model; null: the model's own
    # Weights to begin with: a run, a checkpoint, an exported folder, a file of open_clip's or timm's, or one of
    # open_clip's tags for model.name. A run that resumes has its own.
    init: WeightsPath | None = None
    init_towers: Literal["both", "image", "text"] = "both"  # what is taken of them; both: the logit scale too
    init_strict: bool = True  # what has no counterpart of its shape is an error; false: it is told, and stays fresh
    init_context: Literal["stretch", "cut"] = "stretch"  # the text's positions where lengths differ; or the first ones
    preprocess: Preprocess = field(default_factory=Preprocess)

    def __post_init__(self) -> None:
        require(
            bool(self.vision) == bool(self.text),
            "model.vision and model.text must be given together (or neither, to use the open_clip model model.name)",
        )
        require(
            self.name is None or not self.vision,
            f"model.name={self.name!r} asks for an open_clip model, but model.vision and model.text describe another; "
            "set one of them to null (model.vision together with model.text)",
        )
        require(self.embed_dim >= 1, f"model.embed_dim={self.embed_dim} must be at least 1")
        for name in ("image_size", "context_length"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"model.{name}={value} must be at least 1, or null")
        require(
            0 < self.logit_scale_init <= self.logit_scale_max,
            f"model.logit_scale_init={self.logit_scale_init} must lie in (0, model.logit_scale_max="
            f"{self.logit_scale_max}]",
        )


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
class Optim:
    """AdamW with warm-up and cosine decay."""

    kind: Literal["adamw", "sgd"] = "adamw"  # sgd (no momentum) is for parity checks
    lr: float = 5e-4  # learning rate after the warm-up: the highest
    final_lr: float = 0.0  # learning rate at the end of the cosine
    betas: tuple[float, float] = (0.9, 0.98)  # decay of AdamW's running means, of the gradient and of its square
    eps: float = 1e-6  # AdamW's, added to the root of the mean square
    weight_decay: float = 0.2  # of matrices; gains, biases and the logit scale have none
    warmup_samples: int | None = None  # the learning rate rises over so many; either this or warmup_steps
    warmup_steps: int | None = None  # the same in steps

    def __post_init__(self) -> None:
        require(self.lr > 0, f"optim.lr={self.lr} must be above 0")
        require(
            0 <= self.final_lr <= self.lr, f"optim.final_lr={self.final_lr} must lie between 0 and optim.lr={self.lr}"
        )
        require(all(0 <= beta < 1 for beta in self.betas), f"optim.betas={list(self.betas)} must lie in [0, 1)")
        require(self.eps > 0, f"optim.eps={self.eps} must be above 0")
        require(self.weight_decay >= 0, f"optim.weight_decay={self.weight_decay} must not be negative")
        require(
            self.warmup_samples is None or self.warmup_steps is None,
            f"optim.warmup_samples={self.warmup_samples} and optim.warmup_steps={self.warmup_steps} say the same "
            "thing twice; set one of them to null",
        )
        for name in ("warmup_samples", "warmup_steps"):
            value = getattr(self, name)
            require(value is None or value >= 0, f"optim.{name}={value} must not be negative")


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
class ZeroShot:
    """Labelled pictures (shards with .cls, an ImageFolder tree or a wds set), class names and templates."""

    every_steps: int = 0  # 0: at the end only
    every_samples: int = 0  # instead of every_steps: after so many samples, counted as steps x train.global_batch
    urls: ShardUrls | None = None  # shards with .cls members: as in data.sources.<name>.urls
    folder: LocalPath | None = None  # an ImageFolder tree instead: a folder a class
    wds: ShardUrls | None = None  # or a set as CLIP_benchmark has it: a folder or URL with test/*.tar and its names
    classnames: LocalFile | None = None  # imagenet, or a text file, line i: label i; null: the set's or folders' names
    templates: LocalFile | None = None  # imagenet, or a text file, one a line: '{}' = class name; null: the set's own
    subset: LocalFile | None = None  # imagenet_a, imagenet_r, or a file: which classes are answers, right for which
    batch: int = 256  # pictures at once, on each rank

    def __post_init__(self) -> None:
        _check_evaluation("eval.zeroshot", self.every_steps, self.every_samples, batch=self.batch)
        given = [name for name in ("urls", "folder", "wds") if getattr(self, name) is not None]
        both = " and ".join(f"eval.zeroshot.{name}" for name in given)
        require(len(given) < 2, f"{both} are both set; set one of them to null")

    @property
    def enabled(self) -> bool:
        return (self.urls, self.folder, self.wds) != (None, None, None)


@dataclass(frozen=True)
class Validation:
    """Contrastive loss and in-batch accuracy on held-out shards."""

    every_steps: int = 0  # 0: at the end only
    every_samples: int = 0  # instead of every_steps: after so many samples, counted as steps x train.global_batch
    urls: ShardUrls | None = None  # as in data.sources.<name>.urls; null: no validation
    caption: str | None = None  # as in data.sources.<name>.caption; null: the sources', if they agree, else txt
    samples: int = 4096  # at most so many pairs of the shards, in their order
    batch: int = 1024  # pairs per loss, over all ranks: loss and accuracy depend on it

    def __post_init__(self) -> None:
        _check_evaluation(
            "eval.validation", self.every_steps, self.every_samples, batch=self.batch, samples=self.samples
        )
        if self.caption is not None:
            require_member("eval.validation.caption", self.caption)

    @property
    def enabled(self) -> bool:
        return self.urls is not None


@dataclass(frozen=True)
class Retrieval:
    """Pictures with one or several captions each (Flickr30k, COCO), each found among all by the other."""

    every_steps: int = 0  # 0: at the end only
    every_samples: int = 0  # instead of every_steps: after so many samples, counted as steps x train.global_batch
    urls: ShardUrls | None = None  # as in data.sources.<name>.urls; null: no retrieval
    caption: str = "txt"  # as in data.sources.<name>.caption; each line, or item of a JSON list, is a caption
    batch: int = 256  # pictures at once, on each rank

    def __post_init__(self) -> None:
        _check_evaluation("eval.retrieval", self.every_steps, self.every_samples, batch=self.batch)
        require_member("eval.retrieval.caption", self.caption)

    @property
    def enabled(self) -> bool:
        return self.urls is not None


def _check_evaluation(key: str, every_steps: int, every_samples: int, **at_least_one: int) -> None:
    require(every_steps >= 0, f"{key}.every_steps={every_steps} must not be negative")
    require(every_samples >= 0, f"{key}.every_samples={every_samples} must not be negative")
    require(
        not every_steps or not every_samples,
        f"{key}.every_steps={every_steps} and {key}.every_samples={every_samples} are both set; set one of them to 0",
    )
    for name, value in at_least_one.items():
        require(value >= 1, f"{key}.{name}={value} must be at least 1")


EVALUATIONS = {"validation": Validation, "zeroshot": ZeroShot, "retrieval": Retrieval}
"""The kinds, as `clipscale eval` and `eval` call them; in the order in which they are made."""


@dataclass(frozen=True)
class Eval:
    """What is evaluated while training."""

    on_error: Literal["report", "stop"] = "report"  # of an evaluation that fails: train on without its scores, or end
    pixels: Literal["open_clip", "training"] = "open_clip"  # open_clip's to the digit, or as training decodes them
    zeroshot: ZeroShot = field(default_factory=ZeroShot)
    validation: Validation = field(default_factory=Validation)
    retrieval: Retrieval = field(default_factory=Retrieval)
    zeroshot_sets: dict[str, ZeroShot] = field(default_factory=dict)  # more, each with a name, that of its scores
    validation_sets: dict[str, Validation] = field(default_factory=dict)  # as above
    retrieval_sets: dict[str, Retrieval] = field(default_factory=dict)  # as above

    def __post_init__(self) -> None:
        names = [name for sets in self._sets().values() for name in sets]
        for name in names:
            require(
                re.fullmatch(r"[^/\s]+", name) is not None and name not in (*EVALUATIONS, "seconds"),
                f"eval: {name!r} cannot be the name of a set: a word without '/', other than "
                f"{', '.join(EVALUATIONS)} and seconds, which are columns already",
            )
            require(names.count(name) == 1, f"eval: {name!r} is the name of two sets; rename one of them")

    def evaluations(self) -> dict[str, ZeroShot | Validation | Retrieval]:
        """All that are asked for, by name, in the order in which they are made."""
        named = {"validation": self.validation, "zeroshot": self.zeroshot, "retrieval": self.retrieval}
        named |= {name: its for sets in self._sets().values() for name, its in sets.items()}
        return {name: its for name, its in named.items() if its.enabled}

    def key(self, name: str) -> str:
        """Where the settings of an evaluation stand: 'eval.zeroshot', 'eval.zeroshot_sets.imagenet_v2'."""
        if name in EVALUATIONS:
            return f"eval.{name}"
        return next(f"eval.{kind}_sets.{name}" for kind, sets in self._sets().items() if name in sets)

    def _sets(self) -> dict[str, dict[str, Any]]:
        return {
            "validation": self.validation_sets,
            "zeroshot": self.zeroshot_sets,
            "retrieval": self.retrieval_sets,
        }


@dataclass(frozen=True)
class Config:
    run: Run = field(default_factory=Run)
    seed: int = 0  # of the weights, the order of samples and everything drawn
    resume: LocalPath = "auto"  # auto: run.dir's newest good one; fresh: refuse one; a path: back to it, or from it
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is a GPU
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    train: Train = field(default_factory=Train)
    optim: Optim = field(default_factory=Optim)
    gradcache: GradCache = field(default_factory=GradCache)
    replay: Replay = field(default_factory=Replay)
    loss: Loss = field(default_factory=Loss)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    eval: Eval = field(default_factory=Eval)

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**63, f"seed={self.seed} must lie in [0, 2^63)")
        batch, streams = self.train.global_batch, self.data.streams
        require(
            streams is None or batch % streams == 0,
            f"data.streams={streams} does not divide train.global_batch={batch}; choose a divisor, or null",
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

    @property
    def warmup_samples(self) -> int:
        if self.optim.warmup_steps is not None:
            return self.optim.warmup_steps * self.train.global_batch
        return self.optim.warmup_samples or 0


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """A config as nested dicts -> {'train.samples': 100, ...}"""
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in flat(item, f"{prefix}.{key}").items()}
    return {prefix[1:]: value}
