"""How many samples remote shards hold, said by a file, so that a run can begin before it has fetched them.

    declared_counts(urls, None, index, cache)        # {'https://host/00000.tar': 10000, ...}; empty: nobody says

Looked at, in this order: the source's own `counts` file; sidecars of all the shards (then nothing is declared, for what
is usable is known); `sizes.json` beside the shards; img2dataset's `00000_stats.json` beside `00000.tar`.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from typing import Any
from urllib.parse import urlsplit

from clipscale.data.fetch.cache import FetchError, ShardCache
from clipscale.data.fetch.urls import is_local, masked, scheme_of
from clipscale.data.shard.index import Index, basename
from clipscale.errors import UserError, require
from clipscale.files import why_unreadable

_MAX_BYTES = 1 << 26


def declared_counts(urls: list[str], counts: str | None, index: Index, cache: ShardCache) -> dict[str, int]:
    """Samples of those remote shards for which a file says it.

    Raises:
        UserError: a counts file that cannot be used, or that lacks a shard.
    """
    remote = [url for url in urls if not is_local(url)]
    if not remote:
        return {}
    if counts is not None:
        return read_counts(remote, counts)
    if all(index.known(url) for url in remote):
        return {}
    found: dict[str, int] = {}
    places = [url for url in remote if scheme_of(url) != "pipe"]
    for sizes_json in dict.fromkeys(_beside(url, "sizes.json") for url in places):
        here = [url for url in places if _beside(url, "sizes.json") == sizes_json]
        sizes = _fetch_json(sizes_json, cache)
        if sizes is not None:
            found |= {url: sizes[name] for url in here if _is_count(sizes.get(name := basename(url)))}
        else:
            found |= _from_statistics(here, cache)
    return found


def read_counts(remote: list[str], counts: str) -> dict[str, int]:
    """Those that the file `counts` says of the remote shards.

    Raises:
        UserError: a file that cannot be used, or that lacks one of them.
    """
    try:
        with open(counts, "rb") as file:
            numbers = json.loads(file.read(_MAX_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"counts {counts!r} cannot be read: {why_unreadable(counts, error)}") from error
    require(isinstance(numbers, dict), f"counts {counts!r} must be a JSON object, shard name -> number of samples")
    times = Counter(map(basename, remote))
    found = {}
    for url in remote:
        name = url if url in numbers else basename(url)
        require(
            name in numbers and _is_count(numbers[name]),
            f"counts {counts!r} has no number of samples for shard {name!r} ({masked(url)}); add it",
        )
        require(
            name == url or times[name] == 1,
            f"counts {counts!r}: {name!r} is the name of {times[name]} shards; name them by their whole URLs",
        )
        found[url] = numbers[name]
    return found


def _from_statistics(urls: list[str], cache: ShardCache) -> dict[str, int]:
    """img2dataset writes {"successes": n, ...} beside each shard; where the first has none, none is looked for."""
    found: dict[str, int] = {}
    places = {url: _beside(url, basename(url).removesuffix(".tar") + "_stats.json") for url in urls}
    for number, (url, place) in enumerate(places.items()):
        facts = _fetch_json(place, cache)
        if facts is None and number == 0:
            return {}
        if number == 0:
            cache.prefetch(places.values())
        if facts is not None and _is_count(facts.get("successes")):
            found[url] = facts["successes"]
    return found


def _fetch_json(url: str, cache: ShardCache) -> dict[str, Any] | None:
    """None where there is no such file, or none with a JSON object."""
    try:
        file = cache.open(url)
    except FetchError as error:
        if error.missing:
            return None
        raise UserError(f"{error}; it may say how many samples the shards hold: try again later") from error
    try:
        facts = json.loads(os.pread(file, _MAX_BYTES, 0))
    except (ValueError, RecursionError):
        return None
    finally:
        os.close(file)
    return facts if isinstance(facts, dict) else None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**40


def _beside(url: str, name: str) -> str:
    """The URL of a file in the same folder, with the same query: it may hold a token that is good for the folder."""
    parts = urlsplit(url)
    return parts._replace(path=f"{parts.path.rpartition('/')[0]}/{name}").geturl()
