"""Many shards at once: what has no current sidecar is indexed, in processes of their own where that is worth it.

    shards = index_shards(urls, Index(), cache, jobs=8, track=track, label="indexing train")

A process fetches a remote shard itself, and indexes it. One that is killed is an error at once; a shard that cannot be
read is told when all others are indexed. Whether what is known of remote shards still holds is asked where that is
wanted (`renew`): a run does not ask, for it compares what it reads with the index.

    write_refused("refused.jsonl", urls, Index(), cache)        # which samples were left out, and why
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from typing import Any, Literal

from clipscale.data.fetch.cache import FetchError, ShardCache
from clipscale.data.fetch.urls import is_local, masked
from clipscale.data.shard.index import Index, Shard, remember
from clipscale.data.shard.judge import looks_into_pictures
from clipscale.data.shard.select import refused_samples
from clipscale.data.shard.tar import list_members, mapped
from clipscale.data.shard.whole import check_copy
from clipscale.errors import UserError
from clipscale.files import whole_file
from clipscale.pool import WorkerDied, cores, map_in_processes
from clipscale.tell import tell
from clipscale.words import counted

Track = Callable[[Iterable[str], str], Iterable[str]]
Renew = Literal["no", "changed", "all"]  # what is known already: kept; remote shards compared with their servers; none

_LOOK_UPS = 8  # sidecars read at once: on a network's file system each takes milliseconds
_MAX_UNANSWERED = 8  # then no further shard is compared: each could cost a stall's seconds
_INLINE_BYTES = {"fast": 1 << 29, "decode": 1 << 24}  # less than this is indexed sooner than a worker has started


def index_shards(
    urls: list[str],
    index: Index,
    cache: ShardCache | None,
    *,
    jobs: int | None = None,
    track: Track | None = None,
    label: str = "indexing",
    renew: Renew = "no",
) -> list[Shard]:
    """The index of every shard, in the order of `urls`. Remote ones come through `cache`.

    Raises:
        UserError: shards that cannot be read, named once all others are indexed; a worker that died.
    """
    renewal = _Renewal(cache, renew)
    with ThreadPoolExecutor(_LOOK_UPS) as pool:
        found = dict(zip(urls, pool.map(partial(_known, index=index, renewal=renewal), urls), strict=True))
    renewal.report()
    missing = [url for url in urls if found[url] is None]
    if missing:
        jobs = 1 if _is_little(missing, index) else min(jobs or cores(), len(missing))
        with closing(map_in_processes(_build, missing, jobs, index, cache, renewal.stale)) as built:
            try:
                found |= zip(track(missing, label) if track else missing, built, strict=True)
            except WorkerDied as died:
                what = (
                    f"shard {masked(died.item)!r}: the process that indexed it" if died.item else "an indexing process"
                )
                raise UserError(f"{what} {died.how}; if memory is short, set fewer data.index_jobs (--jobs)") from died
        for url in missing:
            if isinstance(found[url], Shard):
                remember(found[url])
    unreadable = [url for url in urls if isinstance(found[url], str)]
    if unreadable:
        more = f" (and {len(unreadable) - 1} more of {counted(len(urls), 'shard')})" if len(unreadable) > 1 else ""
        shown = masked(unreadable[0])
        why = found[unreadable[0]].removeprefix(f"{shown}: ")  # a failed download names its URL itself
        raise UserError(f"shard {shown!r}: {why}{more}; mend that, or take the shard out of the config")
    return [found[url] for url in urls]


class _Renewal:
    """Which shards are indexed, and those of them that are remote fetched, although they are known."""

    def __init__(self, cache: ShardCache | None, renew: Renew) -> None:
        self._cache, self._renew = cache, renew
        self.stale: set[str] = set()
        self._unanswered: dict[str, str] = {}

    def wanted(self, url: str, known: Shard | None) -> bool:
        if self._renew == "all" or (self._renew == "changed" and not is_local(url) and self._changed(url, known)):
            self.stale.add(url)
        return url in self.stale

    def _changed(self, url: str, known: Shard | None) -> bool:
        facts = self._cache.facts(url) if known is None else {"etag": known.etag, "bytes": known.bytes}
        if not facts:
            return False  # nothing to compare
        if len(self._unanswered) >= _MAX_UNANSWERED:
            self._unanswered[url] = ""
            return False
        try:
            return self._cache.changed(url, facts.get("etag"), facts.get("bytes"))
        except FetchError as error:
            self._unanswered[url] = str(error)
            return False

    def report(self) -> None:
        if self._unanswered:
            first = next(filter(None, self._unanswered.values()))
            tell(
                f"remote shards that could not be compared with their server, and are taken as they were: "
                f"{len(self._unanswered):,} ({first})"
            )


def _known(url: str, index: Index, renewal: _Renewal) -> Shard | str | None:
    """A string: why it cannot be read."""
    try:
        known = index.known(url)
    except OSError as error:
        return str(error)
    return None if renewal.wanted(url, known) else known


def _build(url: str, index: Index, cache: ShardCache | None, stale: set[str]) -> Shard | str:
    """A string: why it cannot be read."""
    try:
        if is_local(url):
            return index.build(url)
        file = cache.open(url, check=check_copy, anew=url in stale)
        try:
            return index.build(url, file, cache.facts(url))
        finally:
            os.close(file)
    except OSError as error:
        return str(error)


def write_refused(
    path: str, urls: list[str], index: Index, cache: ShardCache | None, *, jobs: int | None = None
) -> int:
    """Name every sample of the shards that the index left out: a line of JSON each, with its shard, key, member (the
    faulty one, or the sample's first where one is missing), offset, cause and detail. Gives back how many there are.

    Raises:
        UserError: the file cannot be written, a shard not read, or a worker died.
    """
    count = 0
    try:
        jobs = 1 if _is_little(urls, index) else min(jobs or cores(), len(urls))
        with whole_file(path) as file, closing(map_in_processes(_refused, urls, jobs, index, cache)) as found:
            for rows in found:
                file.writelines(json.dumps(row) + "\n" for row in rows)
                count += len(rows)
    except OSError as error:
        raise UserError(f"{path} was not written: {error}") from error
    return count


def _refused(url: str, index: Index, cache: ShardCache | None) -> list[dict[str, Any]]:
    rows = []
    with opened(url, cache) as tar:
        listing = list_members(tar)
        for key, first, fault in refused_samples(tar, listing, index.rules):
            member = first if fault.member is None else fault.member
            place = {"member": listing.names[member], "offset": listing.offsets[member]}
            rows.append({"shard": masked(url), "key": key, **place, "cause": fault.cause, "detail": fault.detail})
    return rows


@contextmanager
def opened(url: str, cache: ShardCache | None) -> Iterator[bytes]:
    """The bytes of a local shard, or of the cache's copy of a remote one."""
    if is_local(url):
        with mapped(url) as tar:
            yield tar
        return
    file = cache.open(url, check=check_copy)
    try:
        with mapped(file) as tar:
            yield tar
    finally:
        os.close(file)


def _is_little(urls: list[str], index: Index) -> bool:
    """Whether the shards are read in less time than a worker takes to start."""
    limit = _INLINE_BYTES["decode" if looks_into_pictures(index.rules.select) else "fast"]
    return all(map(is_local, urls)) and sum(os.path.getsize(url) for url in urls) < limit
