"""Captions that lie in shards of their own, beside a source's: joined to its samples when those are indexed.

    extra = extra_shards("cc3m", urls, source)                  # {'train-0000.tar': 'recap-0000.tar', ...}
    chosen = join(chosen, rules, tar, "recap-0000.tar")         # with the spans of what the extra shard has for them

Shards go together one to one, in the order of both lists; samples by their key, or by a field that both have in their
JSON. A read then finds an extra caption by its offset, as it does a sample's own: nothing is looked up, and nothing is
kept for each sample but its record in the sidecar.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

from clipscale.config.data import EXTRA, Select, SourceSettings
from clipscale.data.fetch.urls import expand_urls, is_local, masked
from clipscale.data.shard.captions import caption_rules
from clipscale.data.shard.group import group
from clipscale.data.shard.judge import Fault, Judge
from clipscale.data.shard.select import Chosen, Rules
from clipscale.data.shard.tar import list_members
from clipscale.errors import require
from clipscale.words import counted


def extra_shards(name: str, urls: list[str], source: SourceSettings) -> dict[str, str]:
    """Shard -> the extra shard that goes with it; empty where the source `name` has none.

    Raises:
        UserError: a file that is not there or not local, or another number of shards.
    """
    if source.extra is None:
        return {}
    extra = expand_urls(source.extra.urls)
    remote = [url for url in extra if not is_local(url)]
    first = masked(remote[0]) if remote else ""
    require(not remote, f"source {name!r}: extra shard {first!r} is not local; fetch the extra shards first")
    require(
        len(extra) == len(urls),
        f"source {name!r}: extra.urls names {counted(len(extra), 'shard')} and urls {len(urls):,}: they go "
        "together one to one, in their order; name as many",
    )
    return dict(zip(urls, extra, strict=True))


def extra_stamp(file: str | int) -> dict[str, int]:
    """By what a change of an extra shard (its path or descriptor) is noticed without reading it. Raises OSError."""
    stat = os.stat(file)
    return {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def join(chosen: Chosen, rules: Rules, tar: bytes, path: str) -> Chosen:
    """The samples with the extra captions that the shard at `path`, whose bytes are `tar`, has for them.

    Raises:
        OSError: the extra shard is damaged, or what joins occurs twice, there or in `chosen`.
    """
    listing = list_members(tar)
    if listing.cut:
        raise OSError(f"its extra shard {path} is damaged: {listing.cut}")
    columns = {name: 2 + 2 * number for number, name in enumerate(rules.captions)}
    extra = [name for name in columns if name.startswith(EXTRA)]
    judge = Judge(tar, listing, need="pairs", captions=caption_rules(tuple(extra)), select=Select(), max_pixels=0)
    rows = {uid: row for row, uid in _each_once(chosen.uids, "it holds")}
    samples = [*group(listing.names)]
    uids = [judge.uid(key, sample, rules.extra_uid) for key, sample in samples]
    spans = chosen.spans.copy()
    for number, uid in _each_once(uids, f"its extra shard {path} holds"):
        for name, member in zip(extra, judge.captions(samples[number][1]) if uid in rows else (), strict=False):
            if not isinstance(member, Fault):
                at = columns[name]
                spans[rows[uid], at : at + 2] = listing.offsets[member], listing.sizes[member]
    having = {name: int((spans[:, at + 1] > 0).sum()) for name, at in columns.items()}
    return chosen._replace(spans=spans, captions=having)


def _each_once(uids: Iterable[str | None], who: str) -> Iterator[tuple[int, str]]:
    """(number, uid) of those samples that have one. Raises OSError for one that another has already."""
    seen: set[str] = set()
    for number, uid in enumerate(uids):
        if uid is None:
            continue
        if uid in seen:
            raise OSError(f"{who} {uid!r} twice, by which extra captions are joined")
        seen.add(uid)
        yield number, uid
