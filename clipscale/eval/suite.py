"""The evaluations that a config asks for, ready to run at any step; shared by training and by `clipscale eval`.

suite = EvalSuite(config, towers, chunks, tokenize, world)
for name in suite.due(step, last_step):         # ["validation", "zeroshot"]
    row |= suite.scores(name, step=step)        # {"zeroshot/top1": 0.31, ...}
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, TypeVar

from clipscale.config import Config
from clipscale.data.tokenize import Tokenize
from clipscale.dist import World
from clipscale.errors import SharedError, reason
from clipscale.eval.classifier import Classifiers
from clipscale.eval.evaluations import Evaluation, Setup, open_evaluation, read_texts
from clipscale.schedule import evaluations_due
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
        names: these evaluations alone, and one that cannot be opened is noted in `failed`; None: all, and it is raised.

    Raises:
        SharedError: shards, class names or templates that cannot be used.
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
        names: Iterable[str] | None = None,
    ) -> None:
        self._parts, self._told = parts, told
        self.config, self.world, self.failed = config, world, {}
        classifiers = Classifiers(towers, tokenize, chunks[1], world, self._walk)
        self._setup = Setup(config, towers, chunks, tokenize, world, self._walk, classifiers)
        self._evaluations: dict[str, Evaluation] = {}
        for name in config.eval.evaluations() if names is None else names:
            try:
                self._evaluations[name] = self._open(name)
            except SharedError as error:
                if names is None:
                    raise
                self.failed[name] = error

    def due(self, step: int, last_step: int) -> list[str]:
        """Names of the evaluations that come after this step."""
        return evaluations_due(self.config, step, last_step)

    def run(self, name: str) -> dict[str, float]:
        """Metrics of the evaluation of this name, as columns of a row. Collective."""
        return {f"{name}/{column}": value for column, value in self._evaluations[name].run().items()}

    def run_all(self) -> dict[str, float]:
        """Metrics of all of them; one that cannot be made is noted in `failed` and costs its own. Collective.

        Raises:
            SharedError: none of them can be made.
        """
        found = {}
        for name in self._evaluations:
            try:
                found |= self.run(name)
            except SharedError as error:
                self.failed[name] = error
        if not found:
            raise next(iter(self.failed.values()))
        return found

    def details(self) -> dict[str, dict[str, Any]]:
        """What the last run of each found beyond its scores."""
        return {name: found for name, evaluation in self._evaluations.items() if (found := evaluation.details())}

    def _open(self, name: str) -> Evaluation:
        texts = self.world.lead(partial(read_texts, name, self._setup), patient=True)
        evaluation = self.world.each(partial(open_evaluation, name, self._setup, texts), patient=True)
        if note := self.world.lead(evaluation.check):
            tell(note)
        self.world.each(evaluation.try_out)
        return evaluation

    def scores(
        self, name: str, *, step: int, of: Sequence[tuple[str, AbstractContextManager]] = (("", nullcontext()),)
    ) -> dict[str, float]:
        """As `run`, of a model that trains: what fails costs its own scores, by `eval.on_error`. Collective.

        Args:
            of: what its columns begin with, and within which the model has the weights that are evaluated.

        Raises:
            SharedError: what failed, where the run is to end then.
            CutShort: on every rank, where any is told to leave meanwhile.
        """
        found = {}
        for prefix, weights in of:
            with weights:
                scores = self._scores(name, f"{prefix}{name}", step)
            found |= {f"{prefix}{column}": value for column, value in scores.items()}
        return found

    def _scores(self, name: str, called: str, step: int) -> dict[str, float]:
        begin = time.perf_counter()
        try:
            return self.run(name)
        except Exception as error:  # whatever it is: a score is worth no run
            if self.world.size > 1 and not isinstance(error, SharedError):
                raise  # this rank's alone, and the others wait for it
            if any(self.world.gather(self._told())):
                raise CutShort from error
            what = f"step {step}: the evaluation {called!r} failed: {reason(error)}"
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
