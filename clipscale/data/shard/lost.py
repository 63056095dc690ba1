"""How many samples of a damaged shard are lost, where something knows how many it should hold.

    lost_samples("00000.tar", 4711, before=[facts of its former sidecar])      # 5289

A sidecar from before the damage knows, and a file beside the shard: img2dataset's `00000_stats.json`, `sizes.json`.
"""

from __future__ import annotations

import json
import os
from typing import Any

_MAX_BYTES = 1 << 26


def lost_samples(path: str | None, found: int, before: list[dict[str, Any]]) -> int:
    """0 also where nobody knows.

    Args:
        path: of a local shard; None for one that has nothing beside it here.
        found: samples that are there, usable or not.
        before: facts of sidecars of the same rules.
    """
    known = [facts["samples"] + sum(facts["refused"].values()) + facts.get("lost", 0) for facts in before[:1]]
    if path is not None:
        folder, name = os.path.split(path)
        known.append(_count(os.path.join(folder, "sizes.json"), name))
        known.append(_count(os.path.join(folder, name.removesuffix(".tar") + "_stats.json"), "successes"))
    return max(0, *known, found) - found


def _count(path: str, name: str) -> int:
    try:
        with open(path, "rb") as file:
            facts = json.loads(file.read(_MAX_BYTES))
    except (OSError, ValueError, RecursionError):
        return 0
    count = facts.get(name) if isinstance(facts, dict) else None
    return count if isinstance(count, int) and not isinstance(count, bool) and count < 2**40 else 0
