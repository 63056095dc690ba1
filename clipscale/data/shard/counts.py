"""How many samples remote shards hold, said by a file, so that a run can begin before it has fetched them.

    declared_counts("mine", urls, None, index, cache)     # {'https://host/00000.tar': 10000, ...}; empty: index first

Looked at, in this order: the source's own `counts` file, which is the user's word; sidecars of all the shards (then
nothing is declared, for what is usable is known); `sizes.json` beside the shards; img2dataset's `00000_stats.json`
beside `00000.tar`. What lies beside the shards counts what is in them, not what is usable: it is believed only where
none of the source's rules can refuse a sample, and where the first shard of each folder, which is fetched and indexed
for that, holds as many usable samples as are declared of it.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from clipscale.config.data import EXTRA, Select
from clipscale.data.fetch.cache import FetchError, ShardCache
from clipscale.data.fetch.urls import is_local, masked, scheme_of
from clipscale.data.shard.captions import caption_rules
from clipscale.data.shard.index import Index, Shard, basename
from clipscale.data.shard.index_many import Track, index_shards
from clipscale.data.shard.select import Rules
from clipscale.errors import UserError, require
from clipscale.files import why_unreadable
from clipscale.tell import tell
from clipscale.words import counted

_MAX_BYTES = 1 << 26


def declared_counts(
    name: str,
    urls: list[str],
    counts: str | None,
    index: Index,
    cache: ShardCache,
    *,
    jobs: int | None = None,
    track: Track | None = None,
    began_with: Callable[[dict[str, int]], bool] | None = None,
) -> dict[str, int]:
    """Samples of those remote shards of the source `name` whose number is taken from a file; the others are to be
    indexed first. Why numbers beside the shards cannot hold is told.

    Args:
        jobs, track: as for `index_shards`, of the shards that are looked at to see whether the numbers hold.
        began_with: of a run that resumes: whether these counts are what it began with. Then it keeps to them.

    Raises:
        UserError: a counts file that cannot be used, or that lacks a shard; a server that fails.
    """
    remote = [url for url in urls if not is_local(url)]
    if not remote:
        return {}
    if counts is not None:
        return read_counts(remote, counts)
    all_known = all(index.known(url) for url in remote)
    if all_known and (began_with is None or began_with({})):
        return {}
    doubt = refusing_settings(index.rules)
    found = {} if doubt and began_with is None else _found_beside(remote, cache)
    if found and began_with is not None and began_with(found):
        return found
    if all_known:
        return {}
    if doubt:
        doubt += " decides how many samples are usable"
    elif found:
        lazily = dataclasses.replace(index, lazily=True)  # a later start finds these sidecars, and decides alike
        label = f"indexing {name}: first shards"
        doubt = _wrong_number(
            found, index_shards(_first_shards(found), lazily, cache, jobs=jobs, track=track, label=label)
        )
    if not doubt:
        return found
    to_index = sum(index.known(url) is None for url in remote)
    tell(f"source {name!r}: {counted(to_index, 'remote shard')} to be indexed first: {doubt}")
    return {}


def refusing_settings(rules: Rules) -> str:
    """The settings by which samples that are there, with a picture and a .txt, can be refused; empty: none."""
    if rules.need != "pairs":
        return "the label"
    own = [name for name in rules.captions if not name.startswith(EXTRA)]
    texts = [rule.suffix for rule in caption_rules(tuple(own)) if not rule.field]
    found = [] if "txt" in texts else [f"caption={' or '.join(own)}"]
    usual = dataclasses.asdict(Select(uid_field=rules.select.uid_field))  # the field alone refuses nothing
    select = dataclasses.asdict(rules.select)
    return ", ".join(found + [f"select.{key}={value}" for key, value in select.items() if value != usual[key]])


def doubts(name: str, counts: str | None, declared: dict[str, int], rules: Rules) -> list[str]:
    """What to tell of a source's own counts. They are taken at their word, for whoever gives them may have counted by
    the same rules."""
    settings = refusing_settings(rules)
    if counts is None or not declared or not settings:
        return []
    return [
        f"source {name!r}: counts {counts!r} declares {sum(declared.values()):,} samples of "
        f"{counted(len(declared), 'remote shard')}, and {settings} decides how many are usable: what it refuses of "
        "them is masked and counts against data.max_bad_fraction; declare usable samples only, or leave counts out, "
        "and the shards are indexed first"
    ]


def usable(shard: Shard) -> str:
    """How many samples of an indexed shard are usable, and why not more: '98 are usable (empty caption: 2)'."""
    why = [f"{cause}: {count:,}" for cause, count in shard.refused.items()] + ([shard.cut] if shard.cut else [])
    return f"{shard.samples:,} are usable" + (f" ({', '.join(why)})" if why else "")


def _first_shards(found: dict[str, int]) -> list[str]:
    """Of each folder the first that is not empty, and all that are said to be empty: they weigh little, and nothing
    would ever show that they are not."""
    first = {_beside(url, ""): url for url, count in reversed(found.items()) if count}
    return [url for url, count in found.items() if count == 0 or first[_beside(url, "")] == url]


def _wrong_number(found: dict[str, int], shards: list[Shard]) -> str:
    """The first of the shards that holds another number of usable samples than is declared; empty: none does."""
    for shard in shards:
        if shard.samples != found[shard.url]:
            told = f"{masked(shard.url)} is declared to hold {found[shard.url]:,} samples, {usable(shard)}"
            return f"{told}, so no declared number is believed"
    return ""


def _found_beside(remote: list[str], cache: ShardCache) -> dict[str, int]:
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
        cache.forget(url)  # it may be an error page: the next start asks again
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
