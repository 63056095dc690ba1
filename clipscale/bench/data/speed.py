"""Pictures per second and CPU time per picture, end to end: the open_clip recipe and clipscale over the same shards.

    speed = measure_speed(urls, pipeline, settings=Baseline(workers=2, batch=64), rounds=5, seconds=6, say=print)
    speed["rows"][0]["images_per_second"]["median"]

The training process takes batches as fast as they come and does nothing with them.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from clipscale.bench.common.spread import Spread
from clipscale.bench.common.turns import Supplier, Turn, take_turns
from clipscale.bench.data.baseline import Baseline, baseline_loader
from clipscale.bench.data.ours import MODES, STEP, Mode, open_loader, receive
from clipscale.data.pipeline import Pipeline
from clipscale.pool import cores
from clipscale.words import counted

BASELINE, BASELINE_UINT8 = "open_clip recipe", "open_clip recipe, uint8"
OURS = {"process": "clipscale", "inline": "clipscale, inline"}
_READY_BATCHES = 2  # that a DataLoader keeps ready for each worker
_PER_TURN: dict[str, Callable[[Turn], float]] = {
    "images_per_second": lambda turn: turn.items / turn.wall_seconds,
    "cpu_us": lambda turn: turn.cpu_seconds / turn.items * 1e6,
}


def measure_speed(
    urls: list[str],
    pipeline: Pipeline,
    *,
    settings: Baseline,
    rounds: int,
    seconds: float,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Medians and quartiles over the rounds; ratios are taken round by round."""
    entrants = _suppliers(urls, pipeline, settings)
    field, turns = take_turns(entrants, rounds=rounds, seconds=seconds, say=say)
    return {"cores": cores(), "rounds": rounds, "rows": [_row(one, turns) for one in field]}


def _suppliers(urls: list[str], pipeline: Pipeline, settings: Baseline) -> Iterator[Supplier]:
    """The recipe's workers are forked before ours starts: they inherit nothing of it."""
    for name, pixels in ((BASELINE, "float32"), (BASELINE_UINT8, "uint8")):
        yield _baseline(name, urls, replace(settings, pixels=pixels))
    for mode in MODES:
        yield _ours(pipeline, mode, settings.workers)


def _baseline(name: str, urls: list[str], settings: Baseline) -> Supplier:
    batches = iter(baseline_loader(urls, settings))
    return Supplier(
        name,
        take=lambda: len(next(batches)[0]),
        how=f"webdataset + PIL + {settings.pixels}, {counted(settings.workers, 'DataLoader worker')}, "
        f"batches of {settings.batch}",
        close=batches.close,  # its workers end with the last reference to their loader
        ahead=_READY_BATCHES * settings.workers,
        stride=settings.workers,
        filling=settings.filling_batches,
    )


def _ours(pipeline: Pipeline, mode: Mode, threads: int) -> Supplier:
    loader = open_loader(pipeline, mode=mode, threads=threads)
    where = "a loader process" if mode == "process" else "the training process"
    return Supplier(
        OURS[mode],
        take=lambda: receive(next(loader)),
        how=f"index + simplejpeg + uint8, {counted(threads, 'thread')} in {where}, steps of {STEP}",
        close=loader.close,
        ahead=2,
    )


def _row(one: Supplier, turns: dict[str, list[Turn]]) -> dict[str, Any]:
    row: dict[str, Any] = {"contestant": one.name, "how": one.how}
    for quantity, value in _PER_TURN.items():
        values = [value(turn) for turn in turns[one.name]]
        row[quantity] = Spread.of(values)._asdict() | {"all": values}
        for suffix, other in (("to_recipe", BASELINE), ("to_uint8", BASELINE_UINT8)):
            pairs = zip(values, turns[other], strict=True)
            row[f"{quantity}_{suffix}"] = statistics.median(own / value(turn) for own, turn in pairs)
    return row
