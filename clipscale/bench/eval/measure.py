"""One zero-shot evaluation with a clock in it: `evaluate_zeroshot` itself, on a folder of JPEGs.

    tree = write_tree(Path("pictures"), 1024)              # 500 x 375, in class folders, with a template
    case = Case(towers, tokenize, tree, world, batch=256, threads=2)
    case.round()                       # Round(loop_seconds=41.2, forward_seconds=40.6, alone_seconds=39.9)

The loop is that over the pictures: the classifier, made once before it, is not timed. What is read and decoded while
the tower is busy takes no time of its own, but may slow the tower where both want the same cores; so the tower's rate
is measured in every round by itself too.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from clipscale.bench.common.clock import seconds_of
from clipscale.bench.data.photos import photo
from clipscale.config import Config, ZeroShot
from clipscale.config.data import Data
from clipscale.data.tokenize import Tokenize
from clipscale.dist import World
from clipscale.eval.classifier import Classifiers
from clipscale.eval.mode import evaluating
from clipscale.eval.pictures import batches
from clipscale.eval.view import View
from clipscale.eval.zeroshot import evaluate_zeroshot, load_task
from clipscale.towers import Towers

HEIGHT, WIDTH = 375, 500  # the commonest of ImageNet
_CLASSES, _DISTINCT = 10, 128  # the pictures come again: what is decoded and how often is the same


class Round(NamedTuple):
    loop_seconds: float
    forward_seconds: float  # of the loop, in the image tower
    alone_seconds: float  # for as many pictures, by a batch of pixels that lay ready

    @property
    def share(self) -> float:
        return self.forward_seconds / self.loop_seconds

    @property
    def of_tower(self) -> float:
        """The loop's rate by that of the tower alone."""
        return self.alone_seconds / self.loop_seconds


def write_tree(folder: Path, pictures: int) -> ZeroShot:
    """An ImageFolder tree of photos, 500 x 375, and what an evaluation of it is set to."""
    photos = [photo(number, HEIGHT, WIDTH) for number in range(min(pictures, _DISTINCT))]
    for number in range(pictures):
        place = folder / "val" / f"class {number % _CLASSES}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number:06d}.jpg").write_bytes(photos[number % len(photos)])
    (folder / "templates.txt").write_text("a photo of a {}.\n")
    return ZeroShot(folder=str(folder / "val"), templates=str(folder / "templates.txt"))


class Case:
    """A model on a tree. Raises UserError as `load_task`."""

    def __init__(
        self, towers: Towers, tokenize: Tokenize, tree: ZeroShot, world: World, *, batch: int, threads: int
    ) -> None:
        self._towers, self._world, self._batch, self._threads = towers, world, batch, threads
        self._task = task = load_task(tree, Data())
        self._view = View.of(Config(), towers)
        self._classifier = Classifiers(towers, tokenize, batch, world).of(task.classnames, task.templates)
        some = range(min(batch, len(task.pictures)))
        [(self._ready, _, _)] = batches(task.pictures, some, batch=len(some), view=self._view, threads=threads)

    def round(self) -> Round:
        watch = _Watch(self._towers)
        evaluate_zeroshot(
            replace(self._towers, image=watch.tower),
            self._task,
            self._classifier,
            self._world,
            batch=self._batch,
            view=self._view,
            threads=self._threads,
            walk=watch.walk,
        )
        return Round(watch.loop_seconds, watch.forward_seconds, self._alone())

    def decode_seconds(self) -> float:
        """To read and decode a picture, by one thread that has a core for itself."""
        count = min(len(self._task.pictures), _DISTINCT)
        start = time.thread_time()
        for i in range(count):
            self._view(self._task.pictures.read(i)[0])
        return (time.thread_time() - start) / count

    def _alone(self) -> float:
        tower, share = self._towers.image, len(self._ready) / len(self._task.pictures)
        with evaluating(self._towers), torch.no_grad():
            return seconds_of(lambda: tower(self._ready.to(tower.device)), tower.device) / share


class _Watch:
    """Passes on what goes through the loop and the tower, and adds up their time."""

    def __init__(self, towers: Towers) -> None:
        self.loop_seconds = self.forward_seconds = 0.0
        self._towers = towers
        self.tower = _Timed(self, towers)

    def walk(self, batches: Iterable) -> Iterator:
        start = time.perf_counter()
        yield from batches
        self.loop_seconds = time.perf_counter() - start


class _Timed:
    """The image tower, as the evaluation calls it."""

    def __init__(self, watch: _Watch, towers: Towers) -> None:
        self._watch, self._tower = watch, towers.image
        self.device = towers.image.device

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        found = []
        self._watch.forward_seconds += seconds_of(lambda: found.append(self._tower(images)), self.device)
        return found[0]
