"""Samples per second and core that an index is built with: over shards of tiny members and of photographs.

rows = measure_index({"tiny members": tiny_urls, "photos": photo_urls})
rows[0]                  # {'shards': 'tiny members', 'hash': 'crc32', 'samples_per_second': 91000.0, ...}
"""

from __future__ import annotations

import os
import tempfile
import time
from typing import Any

from clipscale.data.shard.index import Hash, Index

_HASHES: tuple[Hash, ...] = ("crc32", "sha256")


def measure_index(sets: dict[str, list[str]], *, repeats: int) -> list[dict[str, Any]]:
    """The fastest of the repeats, by CPU time of this thread: headers, captions, hash and sidecar. Shards are in memory
    from the first time on."""
    rows = []
    for name, shards in sets.items():
        size = sum(os.path.getsize(shard) for shard in shards)
        for kind in _HASHES:
            samples, seconds = zip(*(_build(shards, kind) for _ in range(repeats + 1)), strict=True)
            rows.append(
                {
                    "shards": name,
                    "hash": kind,
                    "samples": samples[0],
                    "bytes_per_sample": size / samples[0],
                    "samples_per_second": samples[0] / min(seconds[1:]),
                }
            )
    return rows


def _build(shards: list[str], kind: Hash) -> tuple[int, float]:
    """Usable samples, seconds."""
    with tempfile.TemporaryDirectory() as folder:
        index = Index(index_dir=folder, hash=kind)
        start = time.thread_time()
        samples = sum(index.build(shard).samples for shard in shards)
        return samples, time.thread_time() - start
