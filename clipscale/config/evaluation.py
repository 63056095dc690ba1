"""The settings of `eval`: what is evaluated, on which sets, and when. No torch import."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from clipscale.config.data import require_member
from clipscale.errors import require
from clipscale.paths import LocalFile, LocalPath, ShardUrls


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


AVERAGE_PREFIX = "ema/"
"""What the columns of an evaluation of averaged weights begin with."""
JUDGED_BY = {
    "validation": ("loss", "image_accuracy", "text_accuracy"),
    "zeroshot": ("top1", "top5", "mean_per_class_recall"),
    "retrieval": tuple(f"{way}_r{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)),
}
"""Scores that tell a better checkpoint from a worse one."""


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
                re.fullmatch(r"[^/\s]+", name) is not None and name not in (*EVALUATIONS, "ema", "seconds"),
                f"eval: {name!r} cannot be the name of a set: a word without '/', other than "
                f"{', '.join(EVALUATIONS)}, ema and seconds, which are columns already",
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
