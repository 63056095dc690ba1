"""The order of the samples at the size of a large run: what it costs, and how well it mixes.

for row in order_rows():                  # 400 M samples in 41,455 shards, batches of 1,048,576, 64 ranks
    print(row["layout"], row["setup_ms"], row["slice_cold_ms"], row["neighbours_over_chance"])
"""

from __future__ import annotations

import statistics
import time
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from clipscale.config.data import Data
from clipscale.data.order.mixture import begin, quotas
from clipscale.data.order.order import Order, Resampled, default_streams
from clipscale.data.order.repeats import count_repeats
from clipscale.data.pipeline import Pipeline

_MIXTURE = {"one": 5.0, "two": 3.0, "three": 2.0}


def order_rows(
    *, shards: int = 41_455, per_shard: int = 9_649, global_batch: int = 1 << 20, world: int = 64, repeats: int = 5
) -> list[dict[str, Any]]:
    """One row for each layout. Times are medians in milliseconds, of one process.

    setup_ms                  build the order and the line of its first epoch
    slice_cold_ms             a rank's slice of a batch, from a fresh order: what the first step pays
    slice_warm_ms             the same of the following batch
    rank_positions_ms         which positions of a batch a rank reads
    memory_bytes              held by an order that has given a slice; slice_peak_bytes: beyond that, while it does
    batch_shards, rank_shards shards that a batch touches, and a rank's slice of it
    neighbours_share          of a batch's samples, those whose next one in the shard lies in the batch too
    neighbours_over_chance    the same, relative to batch / samples
    """
    counts = np.random.default_rng(0).integers(per_shard * 9 // 10, per_shard * 11 // 10 + 1, shards)
    return [
        {"layout": name, **_measure(build, counts, global_batch, world, repeats)}
        for name, build in _layouts(counts, global_batch)
    ]


def _layouts(counts: np.ndarray, global_batch: int) -> Iterator[tuple[str, Callable[[], Pipeline]]]:
    default = default_streams(len(counts), global_batch)
    yield "default", lambda: _pipeline([Order(counts, seed=0, streams=default)])
    for streams, block in ((512, 4), (2048, 4), (1024, 8)):
        if global_batch % streams == 0:
            yield (
                f"V={streams}, K={block}",
                lambda v=streams, k=block: _pipeline([Order(counts, seed=0, streams=v, block_shards=k)]),
            )
    yield "resampled", lambda: _pipeline([Resampled(counts, seed=0, streams=default)])
    ends = (np.cumsum([*_MIXTURE.values()]) / sum(_MIXTURE.values()) * len(counts)).astype(int)
    parts = np.split(counts, ends[:-1])
    streams = [default_streams(len(part), len(part) * global_batch // len(counts), divides=False) for part in parts]
    yield (
        "mixture of 3",
        lambda: _pipeline(
            [Order(part, seed=i, streams=v) for i, (part, v) in enumerate(zip(parts, streams, strict=True))]
        ),
    )


def _pipeline(orders: list[Order | Resampled]) -> Pipeline:
    """Of orders alone: none of the sources is opened."""
    mixture = begin(quotas(dict(list(_MIXTURE.items())[: len(orders)])), seed=0)
    return Pipeline([], orders, mixture, None, image_size=0, context_length=0, seed=0, data=Data(), dropped={})


def _measure(
    build: Callable[[], Pipeline], counts: np.ndarray, global_batch: int, world: int, repeats: int
) -> dict[str, Any]:
    start, rank = 100 * global_batch % int(counts.sum()), world // 2
    times: dict[str, list[float]] = {"setup": [], "rank_positions": [], "slice_cold": [], "slice_warm": []}

    def timed(name: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        result = call(*args, **kwargs)
        times[name].append((time.perf_counter() - began) * 1e3)
        return result

    for _ in range(repeats):
        timed("setup", lambda: build().locate(np.array([start])))
        pipe = build()
        mine = timed("rank_positions", pipe.rank_positions, start, global_batch, world=world, rank=rank)
        place = timed("slice_cold", pipe.locate, mine)
        timed("slice_warm", pipe.locate, mine + global_batch)
    batch = pipe.locate(np.arange(start, start + global_batch))
    together = _neighbours_share(batch, [order.counts for order in pipe.orders])
    return {
        "streams": [order.streams for order in pipe.orders],
        "block_shards": pipe.orders[0].block_shards,
        "slice": len(mine),
        **{f"{name}_ms": statistics.median(values) for name, values in times.items()},
        **_memory(build, mine),
        "batch_shards": _shards(batch),
        "rank_shards": _shards(place),
        "neighbours_share": together,
        "neighbours_over_chance": together / (global_batch / int(counts.sum())),
    }


def _memory(build: Callable[[], Pipeline], positions: np.ndarray) -> dict[str, int]:
    tracemalloc.start()
    try:
        pipe = build()
        pipe.locate(positions)
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return {"memory_bytes": held, "slice_peak_bytes": peak - held}


def _shards(place: tuple[np.ndarray, ...]) -> int:
    source, _, shard, _ = place
    return len(shard) - count_repeats(source << 32 | shard)


def _neighbours_share(place: tuple[np.ndarray, ...], counts: list[np.ndarray]) -> float:
    """Samples are numbered so that the last of a shard and the first of the next are no neighbours."""
    source, _, shard, index = place
    first_shard = np.cumsum([0, *map(len, counts)])
    first_sample = np.cumsum(np.concatenate([[0], *(part + 1 for part in counts)]))
    number = np.sort(first_sample[first_shard[source] + shard] + index)
    return float((np.diff(number) == 1).sum() / len(source))
