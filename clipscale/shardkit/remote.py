"""Copies of remote shards, for commands that look into shards as a run would.

with opened(url, cache_for([url], cache_dir=None)) as tar: ...        # `opened`: index_many.py
"""

from __future__ import annotations

from clipscale.config.data import Fetch
from clipscale.data.fetch.cache import ShardCache
from clipscale.data.fetch.urls import is_local


def cache_for(urls: list[str], cache_dir: str | None) -> ShardCache | None:
    """None where all shards are local files. `cache_dir`: a setting, None: the user's cache folder."""
    return None if all(map(is_local, urls)) else ShardCache(cache_dir, None, Fetch(), allow_pipe=False)
