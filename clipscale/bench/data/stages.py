"""Where the time of one picture goes, on one thread: the open_clip recipe and clipscale, part by part.

stages = measure_stages(urls, pipeline, settings, pictures=1024)
stages["clipscale"]["decode"]                    # CPU microseconds a picture
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch

from clipscale.bench.common.stopwatch import Stopwatch
from clipscale.bench.data import ours
from clipscale.bench.data.baseline import Baseline, Parts, pipeline
from clipscale.data.pipeline import Pipeline

STAGES = (
    "read",
    "decode",
    "crop and resize",
    "to float32",
    "tokenize",
    "batch",
    "checksum",
    "order and rest",
)
_OF_PARTS = dict(zip((field.name for field in fields(Parts)), STAGES[1:], strict=False))
_WARM_PICTURES = 256  # words of captions, code and files are met for the first time


def measure_stages(urls: list[str], own: Pipeline, settings: Baseline, *, pictures: int) -> dict[str, Any]:
    """CPU microseconds a picture of each stage; a stage that one side does not have is left out there."""
    sides: dict[str, Callable[[Stopwatch, int], None]] = {
        "open_clip recipe": lambda watch, count: _baseline_with(watch, urls, settings, count),
        "clipscale": lambda watch, count: ours.fill_with(watch, own, count),
    }
    measured: dict[str, Any] = {}
    for name, run in sides.items():
        run(Stopwatch(), _WARM_PICTURES)
        watch = Stopwatch()
        run(watch, pictures)
        measured[name] = {stage: watch.seconds[stage] / pictures * 1e6 for stage in STAGES if stage in watch.seconds}
    return measured


def _baseline_with(watch: Stopwatch, urls: list[str], settings: Baseline, pictures: int) -> None:
    """One worker's pipeline in a thread, without its shuffle buffer, which would read ahead."""
    parts = Parts.of(settings)
    timed = {name: watch.wrap(stage, vars(parts)[name]) for name, stage in _OF_PARTS.items()}
    batches = iter(pipeline(urls, replace(settings, sample_shuffle=1, sample_shuffle_initial=1), Parts(**timed)))
    take = watch.wrap("read", lambda: next(batches))

    def work() -> None:
        torch.set_num_threads(1)
        for _ in range(pictures // settings.batch):
            take()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
