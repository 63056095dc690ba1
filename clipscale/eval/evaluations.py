"""The kinds of evaluation behind one door: opened once, then made at any step. suite.py has the list of them.

    setup = Setup(config, towers, ...)
    texts = read_texts("zeroshot", setup)                   # by one rank: small texts that lie beside its shards
    evaluation = open_evaluation("zeroshot", setup, texts)  # its files; wrong ones end here
    if note := evaluation.check():                          # by one rank: labels against names
        tell(note)
    evaluation.try_out()                                    # one picture, one caption
    scores = evaluation.run()                               # {"top1": 0.31, ...}; collective

Which towers are evaluated is the setup's to say: towers of other weights beside these are another setup.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

from clipscale.config import Config, Retrieval, Validation, ZeroShot
from clipscale.data.source import open_source
from clipscale.data.tokenize import Tokenize
from clipscale.dist import World
from clipscale.eval.classifier import Classifiers
from clipscale.eval.mode import evaluating
from clipscale.eval.per_class import class_table
from clipscale.eval.pictures import EvalPictures, ShardPictures, batches
from clipscale.eval.retrieval import RECALLS, evaluate_retrieval
from clipscale.eval.validation import evaluate_validation
from clipscale.eval.view import View
from clipscale.eval.wds import LabelledShards, labelled_shards
from clipscale.eval.zeroshot import check_task, evaluate_zeroshot, load_task
from clipscale.towers import Towers
from clipscale.words import counted

_FEW_PAIRS = 1000  # of a validation: below it its scores say little without their number


@dataclass(frozen=True)
class Setup:
    """What the evaluations have in common."""

    config: Config
    towers: Towers
    chunks: tuple[int, int]  # pictures, and captions, that go through their tower at once
    tokenize: Tokenize
    world: World
    walk: Callable[[Iterable], Iterator]  # passes on each batch of pictures, and each chunk of captions
    classifiers: Classifiers  # of these towers

    @property
    def view(self) -> View:
        return View.of(self.config, self.towers)

    @property
    def reading(self) -> dict[str, Any]:
        """How each kind takes its pictures."""
        return {"view": self.view, "threads": self.config.data.threads, "walk": self.walk}

    def try_picture(self, pictures: EvalPictures) -> None:
        """The first picture goes through its tower."""
        with evaluating(self.towers), torch.no_grad():
            for images, _, _ in batches(pictures, [0], batch=1, view=self.view, threads=1):
                self.towers.image(images.to(self.towers.image.device))

    def try_caption(self, caption: str) -> None:
        with evaluating(self.towers), torch.no_grad():
            self.towers.text(self.tokenize([caption]).to(self.towers.text.device))


class Evaluation(Protocol):
    def check(self) -> str:
        """What to tell before anything is evaluated, or "". Raises UserError for labels that cannot be."""

    def try_out(self) -> None:
        """What can be seen at once must not end an evaluation a day later."""

    def run(self) -> dict[str, float]:
        """Scores, and what they are of. Collective; the same on every rank."""

    def details(self) -> dict[str, Any]:
        """What the last run found beyond its scores, fit for JSON; {}: nothing."""


def read_texts(name: str, setup: Setup) -> LabelledShards | None:
    """What a zero-shot evaluation reads beside its shards, perhaps from a server: one rank is enough to ask.

    Raises:
        UserError: as `wds.open_wds`.
    """
    settings, config = setup.config.eval.evaluations()[name], setup.config
    return labelled_shards(settings, config.data, config.eval.key(name)) if isinstance(settings, ZeroShot) else None


def open_evaluation(name: str, setup: Setup, texts: LabelledShards | None) -> Evaluation:
    """Raises UserError for shards, class names or templates that cannot be used."""
    settings = setup.config.eval.evaluations()[name]
    if isinstance(settings, ZeroShot):
        return _ZeroShot(name, settings, setup, texts)
    return (_Validation if isinstance(settings, Validation) else _Retrieval)(name, settings, setup)


class _ZeroShot:
    def __init__(self, name: str, settings: ZeroShot, setup: Setup, shards: LabelledShards) -> None:
        self._settings, self._setup = settings, setup
        config = setup.config
        self._task = load_task(settings, config.data, shards, name=name, key=config.eval.key(name))
        self._details: Callable[[], dict[str, Any]] = dict

    def check(self) -> str:
        return check_task(self._task)

    def try_out(self) -> None:
        self._setup.try_picture(self._task.pictures)
        self._setup.try_caption(self._task.templates[0].replace("{}", self._task.classnames[0]))

    def run(self) -> dict[str, float]:
        setup, task = self._setup, self._task
        classifier = setup.classifiers.of(task.classnames, task.templates)
        result = evaluate_zeroshot(
            setup.towers, task, classifier, setup.world, batch=self._settings.batch, **setup.reading
        )
        self._details = partial(class_table, task, result)
        return {
            "top1": result.top1,
            "top5": result.top5,
            "mean_per_class_recall": result.mean_per_class_recall,
            "pictures": result.pictures,
            "classes": task.subset.labels,
            "classes_seen": result.classes_seen,
            "passed_over": result.passed,
            "bad_pictures": result.bad,
        }

    def details(self) -> dict[str, Any]:
        return self._details()


class _Validation:
    def __init__(self, name: str, settings: Validation, setup: Setup) -> None:
        self._settings, self._setup = settings, setup
        config = setup.config
        self._source = open_source(name, config.held_out(settings), config.data, need="pairs")

    def check(self) -> str:
        pairs = min(self._settings.samples, self._source.samples)
        if pairs >= _FEW_PAIRS:
            return ""
        size = min(self._settings.batch, pairs)
        return (
            f"{self._source.name}: {counted(pairs, 'pair')} in batches of {size:,}: loss and accuracy depend on both "
            f"(by chance the loss is {math.log(size):.2f})"
        )

    def try_out(self) -> None:
        self._setup.try_picture(ShardPictures(self._source))

    def run(self) -> dict[str, float]:
        setup = self._setup
        result = evaluate_validation(
            setup.towers,
            self._source,
            setup.tokenize,
            setup.world,
            self._settings,
            setup.config.loss,
            chunk=setup.chunks[0],
            **setup.reading,
        )
        return {
            "loss": result.loss,
            "image_accuracy": result.image_accuracy,
            "text_accuracy": result.text_accuracy,
            "pairs": result.pairs,
            "batch": result.batch,
            "repeated_captions": result.repeated_captions,
            "bad_pictures": result.bad,
        }

    def details(self) -> dict[str, Any]:
        return {}


class _Retrieval:
    def __init__(self, name: str, settings: Retrieval, setup: Setup) -> None:
        self._settings, self._setup = settings, setup
        config = setup.config
        self._source = open_source(name, config.held_out(settings), config.data, need="pairs", findings=True)

    def check(self) -> str:
        return ""

    def try_out(self) -> None:
        self._setup.try_picture(ShardPictures(self._source))

    def run(self) -> dict[str, float]:
        setup = self._setup
        result = evaluate_retrieval(
            setup.towers,
            self._source,
            setup.tokenize,
            setup.world,
            batch=self._settings.batch,
            text_chunk=setup.chunks[1],
            **setup.reading,
        )
        directions = {"image_to_text": result.image_to_text, "text_to_image": result.text_to_image}
        return {
            **{f"{way}_r{k}": found.recall[k] for way, found in directions.items() for k in RECALLS},
            **{f"{way}_median_rank": found.median_rank for way, found in directions.items()},
            "pictures": result.pictures,
            "captions": result.captions,
            "passed_over": self._source.refused().total(),
            "bad_pictures": result.bad,
        }

    def details(self) -> dict[str, Any]:
        return {}
