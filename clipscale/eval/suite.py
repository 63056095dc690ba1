"""The evaluations that a config asks for, ready to run at any step; shared by training and by `clipscale eval`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TypeVar

import torch

from clipscale.config import Config
from clipscale.config.data import SourceSettings
from clipscale.data.source import open_source
from clipscale.data.tokenize import Tokenize
from clipscale.dist import World
from clipscale.errors import SharedError, reason
from clipscale.eval.mode import evaluating
from clipscale.eval.pictures import ShardPictures, batches
from clipscale.eval.validation import evaluate_validation
from clipscale.eval.view import View
from clipscale.eval.zeroshot import check_task, evaluate_zeroshot, load_task
from clipscale.schedule import is_due
from clipscale.telemetry.faults import report_fault
from clipscale.telemetry.parts import UNTIMED, Parts
from clipscale.tell import tell
from clipscale.towers import Towers

T = TypeVar("T")


class CutShort(Exception):
    """An evaluation was left where it was, for the run is told to leave."""


class EvalSuite:
    """Opens the evaluation sets at once, so that a wrong path or label ends a run before it begins. Collective.

    Args:
        chunks: pictures, and captions, that go through their tower at once.
        parts: each batch begins the part "evaluation" anew, as a sign of life.
        told: whether this rank is to leave; asked before each batch.

    Raises:
        UserError: shards, class names or templates that cannot be used.
    """

    def __init__(
        self,
        config: Config,
        towers: Towers,
        chunks: tuple[int, int],
        tokenize: Tokenize,
        world: World,
        parts: Parts = UNTIMED,
        told: Callable[[], bool] = lambda: False,
    ) -> None:
        self._image_chunk, self._text_chunk = chunks
        self._parts, self._told = parts, told
        self.config, self.towers, self.tokenize, self.world = config, towers, tokenize, world
        validation, zeroshot = config.eval.validation, config.eval.zeroshot
        self._pairs = None
        if validation.urls:
            self._pairs = open_source("validation", SourceSettings(validation.urls), config.data, need="pairs")
        self._task = load_task(zeroshot, config.data) if zeroshot.enabled else None
        if self._task is not None and (odd := world.lead(partial(check_task, self._task))):
            tell(odd)
        self._reading = {"threads": config.data.threads, "view": View.of(config, towers)}
        world.each(self._try_out)

    def due(self, step: int, last_step: int) -> list[str]:
        """Names of the evaluations that come after this step."""
        settings = self.config.eval
        sets = (("validation", self._pairs, settings.validation), ("zeroshot", self._task, settings.zeroshot))
        return [name for name, there, its in sets if there is not None and is_due(its.every_steps, step, last_step)]

    def run(self, name: str) -> dict[str, float]:
        """Metrics of the evaluation of this name. Collective."""
        return {"validation": self.validation, "zeroshot": self.zeroshot}[name]()

    def scores(self, name: str, *, step: int) -> dict[str, float]:
        """As `run`, of a model that trains: what fails costs its own scores, by `eval.on_error`. Collective.

        Raises:
            SharedError: what failed, where the run is to end then.
            CutShort: on every rank, where any is told to leave meanwhile.
        """
        begin = time.perf_counter()
        try:
            return self.run(name)
        except Exception as error:  # whatever it is: a score is worth no run
            if self.world.size > 1 and not isinstance(error, SharedError):
                raise  # this rank's alone, and the others wait for it
            if any(self.world.gather(self._told())):
                raise CutShort from error
            what = f"step {step}: the evaluation {name!r} failed: {reason(error)}"
            if self.config.eval.on_error == "stop":
                raise SharedError(f"{what}; mend it and start again, or set eval.on_error=report") from error
            lost = time.perf_counter() - begin
            report_fault("evaluation", what, action="its scores are missing", step=step, lost_seconds=lost)
            return {f"{name}/failed": 1.0}

    def _walk(self, batches: Iterable[T]) -> Iterator[T]:
        """The same batches, while nobody tells this rank to leave."""
        for batch in self._parts.walk("evaluation", batches):
            if self._told():
                raise CutShort
            yield batch

    @torch.no_grad()
    def _try_out(self) -> None:
        """A picture of each set and a class's caption go through the towers now: what can be seen at once must not end
        an evaluation a day later."""
        sets = (self._pairs and ShardPictures(self._pairs), self._task and self._task.pictures)
        with evaluating(self.towers):
            for pictures in filter(None, sets):
                for images, _, _ in batches(pictures, [0], batch=1, **self._reading):
                    self.towers.image(images.to(self.towers.image.device))
            if self._task is not None:
                caption = self._task.templates[0].replace("{}", self._task.classnames[0])
                self.towers.text(self.tokenize([caption]).to(self.towers.text.device))

    def validation(self) -> dict[str, float]:
        """Metrics of the held-out pairs; none without `eval.validation.urls`. Collective."""
        if self._pairs is None:
            return {}
        result = evaluate_validation(
            self.towers,
            self._pairs,
            self.tokenize,
            self.world,
            self.config.eval.validation,
            self.config.loss,
            chunk=self._image_chunk,
            walk=self._walk,
            **self._reading,
        )
        return {
            "validation/loss": result.loss,
            "validation/image_accuracy": result.image_accuracy,
            "validation/text_accuracy": result.text_accuracy,
            "validation/pairs": result.pairs,
            "validation/repeated_captions": result.repeated_captions,
            "validation/bad_pictures": result.bad,
        }

    def zeroshot(self) -> dict[str, float]:
        """Metrics of the labelled pictures; none without `eval.zeroshot.urls` or `.folder`. Collective."""
        if self._task is None:
            return {}
        result = evaluate_zeroshot(
            self.towers,
            self._task,
            self.tokenize,
            self.world,
            batch=self.config.eval.zeroshot.batch,
            text_chunk=self._text_chunk,
            walk=self._walk,
            **self._reading,
        )
        return {
            "zeroshot/top1": result.top1,
            "zeroshot/top5": result.top5,
            "zeroshot/mean_per_class_recall": result.mean_per_class_recall,
            "zeroshot/pictures": result.pictures,
            "zeroshot/classes": len(result.per_class_top1),
            "zeroshot/classes_seen": result.classes_seen,
            "zeroshot/passed_over": result.passed,
            "zeroshot/bad_pictures": result.bad,
        }
