"""Zero-shot classification: class names x templates -> a classifier -> top-1 and top-5 (CLIP, arXiv 2103.00020).

    task = load_task(config.eval.zeroshot, config.data)
    classifier_CD = classifiers.of(task.classnames, task.templates)
    result = evaluate_zeroshot(towers, task, classifier_CD, world, ...)     # ZeroShotResult(top1=0.93, top5=0.99, ...)

Shapes: C classes, A of them that may be answered, L labels (C, or the folders of a mapping), R answers at most that are
right for one label, M pictures at once, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from clipscale.config import ZeroShot
from clipscale.config.data import Data, SourceSettings
from clipscale.data.source import open_source
from clipscale.dist import World
from clipscale.errors import SharedError, require
from clipscale.eval.classes import check_labels, checked_label, class_templates, find_classes
from clipscale.eval.mode import evaluating
from clipscale.eval.pictures import EvalPictures, FolderPictures, ShardPictures, batches
from clipscale.eval.subset import Subset
from clipscale.eval.view import View
from clipscale.eval.wds import LabelledShards, labelled_shards
from clipscale.towers import Towers
from clipscale.words import counted


@dataclass(frozen=True)
class ZeroShotTask:
    pictures: EvalPictures  # their notes are labels: the number of a class name
    classnames: list[str]
    templates: list[str]  # '{}' stands for the class name
    subset: Subset  # which may be answered
    key: str = "eval.zeroshot"  # where its settings stand
    note: str = ""  # what to tell of names and class folders


@dataclass(frozen=True)
class ZeroShotResult:
    """Counts of pictures, over all ranks; lists are by label, [L]: without a subset, by class."""

    seen: list[int]
    hits1: list[int]  # to which the nearest answer is right
    hits5: list[int]  # or one of the five nearest
    misses: list[tuple[int, int, int]]  # (label, the class that was answered, pictures), the most pictures first
    bad: int  # that could not be decoded: left out
    passed: int = 0  # what else was found and is no labelled picture: other formats, hidden files, no label

    @property
    def pictures(self) -> int:
        return sum(self.seen)

    @property
    def top1(self) -> float:
        return sum(self.hits1) / self.pictures

    @property
    def top5(self) -> float:
        return sum(self.hits5) / self.pictures

    @property
    def per_class_top1(self) -> list[float]:
        """[L]; nan for a label without pictures."""
        return [hits / seen if seen else math.nan for hits, seen in zip(self.hits1, self.seen, strict=True)]

    @property
    def classes_seen(self) -> int:
        """Labels with a picture."""
        return sum(seen > 0 for seen in self.seen)

    @property
    def mean_per_class_recall(self) -> float:
        """Mean of top-1 over the labels seen: the balanced accuracy."""
        return sum(top1 for top1 in self.per_class_top1 if not math.isnan(top1)) / self.classes_seen


def load_task(
    config: ZeroShot,
    data: Data,
    shards: LabelledShards | None = None,
    *,
    name: str = "zeroshot",
    key: str = "eval.zeroshot",
) -> ZeroShotTask:
    """Open the pictures, names and templates that a config names; `name` and `key` are for messages.

    Args:
        shards: what `labelled_shards` has read of the config; None: it is read here.

    Raises:
        UserError: a file that is missing or empty, or shards without labels.
    """
    shards = shards or labelled_shards(config, data, key)
    classes, templates = find_classes(config, key, shards.names), class_templates(config, key, shards.templates)
    subset = classes.subset or Subset.whole(classes.names)
    if config.folder is not None:
        pictures = FolderPictures(config.folder, classes.labels, key)
        return ZeroShotTask(pictures, classes.names, templates, subset, key, classes.note)
    require(shards.urls is not None, f"{key} needs pictures: set {key}.urls or {key}.folder, or {key}.wds")
    source = open_source(name, SourceSettings(shards.urls), data, need="labelled", findings=True)
    return ZeroShotTask(ShardPictures(source), classes.names, templates, subset, key, shards.replaced(config, key))


def check_task(task: ZeroShotTask) -> str:
    """Whether the names fit the labels, before anything is evaluated; what to tell of it, or "".

    Labels of shards that are not here yet are looked at when the shards are.

    Raises:
        UserError: a label without a name.
    """
    pictures = task.pictures
    if isinstance(pictures, FolderPictures):
        return "; ".join(filter(None, [task.note, _empty_classes(pictures.empty, task.subset.labels)]))
    odd = "" if pictures.source.remote else check_labels(pictures.notes(), task.subset, task.key)
    return "; ".join(filter(None, [task.note, odd]))


@torch.no_grad()
def evaluate_zeroshot(
    towers: Towers,
    task: ZeroShotTask,
    classifier_CD: Tensor,
    world: World,
    *,
    batch: int,
    view: View,
    threads: int,
    walk: Callable[[Iterable], Iterator] = iter,
) -> ZeroShotResult:
    """Classify every picture, each rank its share. Collective; the same result on every rank.

    Puts the model in eval mode for the time.

    Args:
        classifier_CD: of the task's names and templates, on the towers' device (classifier.py).
        walk: passes each batch on.

    Raises:
        SharedError: what went wrong on any rank, or no picture that can be decoded.
    """
    labels, classes, device = len(task.subset.right), len(task.classnames), towers.image.device
    answers_A = torch.tensor(task.subset.answers, device=device)
    classifier_AD = classifier_CD[answers_A]
    most = max(map(len, task.subset.right))
    right_LR = torch.tensor([its + [-1] * (most - len(its)) for its in task.subset.right], device=device)
    mine = range(world.rank, len(task.pictures), world.size)

    def count() -> tuple[list[float], Tensor]:
        """Of this rank's pictures: bad ones, and by label the hits and those seen; of those that are not hit, the label
        and the class answered, as label x C + class."""
        hits1, hits5, seen = (torch.zeros(labels, dtype=torch.int64, device=device) for _ in range(3))
        bad, misses = 0, [torch.zeros(0, dtype=torch.int64)]
        found = batches(task.pictures, mine, batch=batch, view=view, threads=threads)
        for images, notes, valid in walk(found):
            bad += int((~valid).sum())
            if not valid.any():
                continue
            label_M = torch.tensor(
                [checked_label(note, task.subset, task.key) for note, ok in zip(notes, valid, strict=True) if ok],
                device=device,
            )
            similarity_MA = towers.image(images[valid].to(device)) @ classifier_AD.T
            nearest = answers_A[similarity_MA.topk(min(5, len(answers_A)), dim=1).indices]
            ranked = (nearest[:, :, None] == right_LR[label_M][:, None, :]).any(2)
            seen += label_M.bincount(minlength=labels)
            hits1 += label_M[ranked[:, 0]].bincount(minlength=labels)
            hits5 += label_M[ranked.any(1)].bincount(minlength=labels)
            misses.append((label_M * classes + nearest[:, 0])[~ranked[:, 0]].cpu())
        return [bad, *hits1.tolist(), *hits5.tolist(), *seen.tolist()], torch.cat(misses)

    with evaluating(towers):
        mine_counts, mine_misses = world.each(count)
    bad, *counts = map(int, world.sum(mine_counts))
    hits1, hits5, seen = (counts[start : start + labels] for start in range(0, 3 * labels, labels))
    if not any(seen):
        raise SharedError(f"zero-shot evaluation: none of the {counted(bad, 'picture')} can be decoded")
    misses = world.lead(partial(_most_first, world.collect(mine_misses), classes))
    return ZeroShotResult(seen, hits1, hits5, misses, bad, task.pictures.passed.total())


def _most_first(misses: Tensor, classes: int) -> list[tuple[int, int, int]]:
    """label x C + class of each -> (label, class, how many), the most first, and equals by label and class."""
    pairs, times = misses.unique(return_counts=True)
    order = times.argsort(descending=True, stable=True)
    return [
        (*divmod(pair, classes), many) for pair, many in zip(pairs[order].tolist(), times[order].tolist(), strict=True)
    ]


def _empty_classes(folders: list[str], classes: int) -> str:
    if not folders:
        return ""
    more = ", ..." if len(folders) > 1 else ""
    return f"warning: no picture for {len(folders)} of {counted(classes, 'class', 'classes')} ({folders[0]!r}{more})"
