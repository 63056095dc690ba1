"""Whether the loader's memory stays flat: many samples through its process, measured at ten points on the way.

    soak = measure_soak(folder, samples=2_000_000, threads=2, say=print)
    soak["flat"], soak["points"][9]["loader"]["resident_bytes"]

The samples are tiny pictures in shards of 10,000, each read once. What may still grow after the first tenth is bounded
by BOUND_BYTES, in the loader's process and in this one: 2 million samples of which 16 bytes each are kept exceed it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clipscale.bench.common.processes import Memory, descendants, memory
from clipscale.bench.data.ours import open_loader, open_pipeline, receive
from clipscale.bench.data.photos import tiny_shards
from clipscale.words import counted

BOUND_BYTES = 24 * 2**20
POINTS = 10
_SIDE = 16


def measure_soak(folder: Path, *, samples: int, threads: int, say: Callable[[str], None]) -> dict[str, Any]:
    """`growth`: the most that a later point of a process lies above its first, in resident and in private bytes."""
    pipeline = open_pipeline(tiny_shards(folder, samples), image_size=_SIDE)
    others = set(descendants())
    loader = open_loader(pipeline, mode="process", threads=threads)
    points: list[dict[str, Any]] = []
    try:
        seen = 0
        while len(points) < POINTS:
            batch = next(loader)
            receive(batch)
            seen += int(batch.valid.sum())
            if seen >= samples * (len(points) + 1) // POINTS:
                (process,) = set(descendants()) - others
                both = {"loader": memory(process)._asdict(), "training process": memory(os.getpid())._asdict()}
                points.append({"samples": seen, **both})
                say(
                    f"{counted(seen, 'sample')}: "
                    + ", ".join(f"{k} {v['resident_bytes'] >> 20} MiB" for k, v in both.items())
                )
    finally:
        loader.close()
    growth = {
        process: {
            kind: max(point[process][kind] for point in points) - points[0][process][kind] for kind in Memory._fields
        }
        for process in ("loader", "training process")
    }
    flat = all(sizes[kind] <= BOUND_BYTES for sizes in growth.values() for kind in ("resident_bytes", "private_bytes"))
    return {
        "samples": samples,
        "shards": len(pipeline.sources[0].shards),
        "points": points,
        "growth": growth,
        "bound_bytes": BOUND_BYTES,
        "flat": flat,
    }
