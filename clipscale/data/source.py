"""A source: the usable samples of a list of shards, read by (shard, index) through their sidecars.

    source = open_source("shapes", config.data.sources["shapes"], config.data, need="pairs")
    sample = source.read(shard=3, index=17)        # Sample(key, image bytes, caption or label bytes)
    text = source.caption(sample.note, draw)       # by the source's caption rule, or its rule `sample.which`

Samples are read with `pread` on files that stay open: no seek, no lock held meanwhile, any thread. Nothing is kept for
each sample, only for each shard. A source can be pickled: its copy opens files of its own.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from clipscale.config.data import Data, SourceSettings
from clipscale.data.bad import MASK_CAUSES, BadSample, RefusedSample
from clipscale.data.fetch.cache import Expected, FetchError, ShardCache
from clipscale.data.fetch.urls import expand_urls, is_local, masked
from clipscale.data.shard import report
from clipscale.data.shard.captions import CaptionError, Captions
from clipscale.data.shard.counts import declared_counts, doubts, usable
from clipscale.data.shard.extra import extra_shards, extra_stamp
from clipscale.data.shard.handles import OpenFile, OpenFiles, OpenSidecar, read_exactly, read_pair
from clipscale.data.shard.index import Index, Shard
from clipscale.data.shard.index_many import Renew, Track, index_shards, write_refused
from clipscale.data.shard.outages import Outages
from clipscale.data.shard.select import Need, Rules, refused_samples
from clipscale.data.shard.sidecar import Records
from clipscale.data.shard.tar import list_members, mapped
from clipscale.data.shard.whole import check_copy
from clipscale.tell import tell
from clipscale.words import counted


class Sample(NamedTuple):
    key: str
    image: bytes
    note: bytes  # the member that holds the caption, or the label
    which: int = 0  # of the source's captions, where it has several


class Lost(NamedTuple):
    """A refused sample of a declared shard that has fewer usable ones than declared: a slot stands for it."""

    key: str
    cause: str  # as it is counted when the shard is indexed


class Source:
    """Samples of several shards. `counts` [S]: usable samples of each shard, or those declared."""

    def __init__(
        self, name: str, shards: list[Shard], index: Index, captions: Captions, cache: ShardCache | None
    ) -> None:
        self.name, self.shards, self.need = name, shards, index.rules.need
        self.counts = np.array([shard.samples for shard in shards], np.int64)
        self.samples = int(self.counts.sum())
        self._index, self._captions, self._cache = index, captions, cache
        self._found: dict[int, Shard] = {}  # declared shards that were indexed since
        self._prepare()

    def _prepare(self) -> None:
        self._tars = OpenFiles(self._open_tar)
        self._sidecars = OpenFiles(self._open_sidecar)
        self._extras = OpenFiles(self._open_extra)
        self._lost = OpenFiles(self._list_lost)  # of declared shards with fewer usable samples than declared
        self._indexing = threading.Lock()
        self._outages = Outages(self.name)

    def __getstate__(self) -> dict[str, Any]:
        made_anew = ("_tars", "_sidecars", "_extras", "_lost", "_indexing", "_outages")
        return {name: value for name, value in vars(self).items() if name not in made_anew}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._prepare()

    def fingerprint(self) -> str:
        """Changes with the content of any shard, with which samples of it are used and with what of them is the
        caption; not with where shards lie. Of declared shards, names and numbers of samples are all that counts."""
        facts = [(shard.identity, shard.samples) for shard in self.shards]
        caption = self._captions.identity if self.need == "pairs" else None
        return hashlib.sha256(repr((facts, caption)).encode()).hexdigest()[:16]

    def read(self, shard: int, index: int, draw: float = 0.0) -> Sample:
        """One sample's bytes; of several captions that which `draw`, in [0, 1), chooses among those that the sample
        has, for 0 the first. A shard that cannot be read is tried again with each sample (a remote one after a pause,
        see `data.fetch.again_seconds`); that it fails, and that it is back, is told once.

        Raises:
            OSError: the file is gone, shorter than its index says or another one, or the index is damaged. The
                message names the shard and the key.
            BadSample: fewer samples are usable than were declared; why.
        """
        key = f"number {index}"
        try:
            sidecar = self._sidecars.get(shard)  # held while it is read, as the tar is
            if index >= sidecar.records.samples:
                raise self._shortage(shard, index)
            rows = sidecar.records.read_notes(index)
            which = self._captions.choose([row is not None for row in rows], draw) if len(rows) > 1 else 0
            key = rows[which].key
            tar = self._tars.get(shard)  # held while it is read, so that another thread cannot make it close
            extra = self._extras.get(shard) if self.need == "pairs" and self._captions.extra[which] else None
            sample = Sample(key, *read_pair(tar.number, rows[which], extra and extra.number), which)
        except OSError as error:
            shown = masked(self.shards[shard].url)
            if error.errno is not None:  # the system's: a handle that went stale stays so
                for files in (self._tars, self._sidecars, self._extras):
                    files.drop(shard)
            if error.errno is not None or isinstance(error, FetchError):  # not of this sample alone
                self._outages.failed(shard, shown, error)
            raise OSError(f"shard {shown}, {key}: {error}{self.copy_of(self.shards[shard].url)}") from error
        self._outages.worked(shard)
        return sample

    def note(self, shard: int, index: int) -> bytes:
        """The note alone, of a shard that is here.

        Raises:
            OSError: as `read`.
        """
        sidecar = self._sidecars.get(shard)
        *_, start, size = sidecar.records.read(index)
        tar = self._tars.get(shard)  # held, as in `read`
        return read_exactly(tar.number, start, size)

    def where(self, shard: int, index: int) -> tuple[str, str]:
        """(shard path or URL, key), for messages. A number stands for the key where the index cannot be read or is not
        there yet, and where it holds fewer samples and `read` was not asked just before: nothing is fetched for it."""
        key, known = f"number {index}", self._shard(shard)
        if known.sidecar and index < known.samples:
            with suppress(OSError):
                sidecar = self._sidecars.get(shard)
                key = sidecar.records.read(index).key
        elif known.sidecar and index - known.samples < len(lost := self._lost.peek(shard) or ()):
            key = lost[index - known.samples].key
        return masked(self.shards[shard].url), key

    def caption(self, note: bytes, draw: int = 0, which: int = 0) -> str:
        """The caption in a sample's note; `draw` (64 bits) chooses where the source's `captions` is random, `which` is
        the sample's.

        Raises:
            BadSample: there is none.
        """
        try:
            return self._captions.rules[which].pick(note, draw)
        except CaptionError as error:
            cause = str(error)
            raise BadSample(cause if cause in MASK_CAUSES else "caption cannot be used", cause) from error

    def refused(self) -> Counter[str]:
        """Samples left out when the shards were indexed, by cause."""
        return report.refused(self.shards)

    def not_read(self) -> Counter[str]:
        """Members that nothing looks at: by suffix, or why they belong to no sample."""
        return report.not_read(self.shards)

    def damage(self, shard: Shard) -> str:
        """Why the archive ends early, how much is lost, and where its copy lies if it is remote."""
        return report.damage(shard) + self.copy_of(shard.url)

    def changes(self) -> list[str]:
        """One line for each shard that holds other bytes than its index said until now."""
        return report.changes(self.name, self.shards)

    def write_refused(self, path: str, jobs: int | None) -> int:
        """Name every refused sample in a file, a line of JSON each; how many they are."""
        urls = [shard.url for shard in self.shards if shard.refused]
        return write_refused(path, urls, self._index, self._cache, jobs=jobs)

    @property
    def remote(self) -> bool:
        """Whether any of its shards comes through the cache."""
        return self._cache is not None

    def cache_shortage(self, block_samples: int) -> str:
        """What to tell of an order whose streams lie in blocks of so many samples in all, if the cache is too small for
        it; empty: it is not, or what the shards weigh is not known yet."""
        weights = [shard.bytes for shard in self.shards if shard.bytes and not is_local(shard.url)]
        if not weights:
            return ""
        at_a_time = min(len(weights), 3 * block_samples * len(self.shards) // (2 * self.samples) + 1)
        wanted, bound = at_a_time * sum(weights) // len(weights), self._cache.bound_bytes
        if wanted <= bound:
            return ""
        return (
            f"source {self.name!r}: its order reads about {counted(at_a_time, 'shard')} by turns, {wanted / 1e9:,.1f} "
            f"GB, and data.cache_bytes allows {bound / 1e9:,.1f} GB: shards will be fetched over and over; set "
            "data.streams and data.block_shards so that 1.5 x streams x block_shards shards fit, or raise the bound"
        )

    def prefetch(self, shards: Iterable[int]) -> None:
        """Start to fetch those of the shards that are remote; returns at once."""
        urls = [url for shard in shards if not is_local(url := self.shards[shard].url)]
        if urls:
            self._cache.prefetch(urls, check_copy)

    def close(self) -> None:
        """Let go of the open files; a later read opens them again."""
        self._tars.clear()
        self._sidecars.clear()
        self._extras.clear()
        self._lost.clear()
        if self._cache is not None:
            self._cache.close()

    def copy_of(self, url: str) -> str:
        """For messages: where the copy of a remote shard lies, if there is one."""
        return "" if is_local(url) else self._cache.shown(url)

    def _shard(self, shard: int) -> Shard:
        return self._found.get(shard, self.shards[shard])

    def _open_tar(self, shard: int) -> OpenFile:
        known = self._shard(shard)
        if not is_local(known.url):
            return OpenFile(
                self._cache.open(known.url, expect=Expected(known.bytes, known.crc32, known.sha256), check=check_copy)
            )
        file = OpenFile(os.open(known.url, os.O_RDONLY | os.O_CLOEXEC))
        stat = os.fstat(file.number)
        if (stat.st_size, stat.st_mtime_ns) != (known.bytes, known.mtime_ns):
            raise OSError("the shard changed since this run began (its size or time)")
        return file

    def _open_extra(self, shard: int) -> OpenFile:
        known = self._shard(shard)
        path = self._index.extra[known.url]
        file = OpenFile(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        if not extra_stamp(file.number).items() <= known.extra.items():
            raise OSError(f"its extra shard {path} changed since this run began (its size or time)")
        return file

    def _open_sidecar(self, shard: int) -> OpenSidecar:
        known = self._shard(shard)
        if not known.sidecar:
            known = self._found[shard] = self._index_declared(known)
        file = OpenFile(os.open(known.sidecar, os.O_RDONLY | os.O_CLOEXEC))
        try:
            notes = len(self._captions.rules) if self.need == "pairs" else 1
            return OpenSidecar(file, Records.of(file.number, known.identity, notes))
        except OSError as error:
            raise OSError(f"{error} ({known.sidecar})") from error

    def _index_declared(self, declared: Shard) -> Shard:
        url, lazily = declared.url, dataclasses.replace(self._index, lazily=True)
        shard = self._index.known(url) or lazily.known(url)
        if shard is None:
            file = OpenFile(self._cache.open(url, check=check_copy))
            with self._indexing:
                shard = lazily.known(url) or lazily.build(url, file.number)
        if shard.samples > declared.samples:
            tell(_surplus(shard, declared), every_rank=True)
        return shard

    def _shortage(self, shard: int, index: int) -> BadSample:
        """Why a declared sample is not there: each one too many stands for a refused one, in the shard's order."""
        known, lost = self._shard(shard), []
        if known.refused:
            self._tars.get(shard)  # may wait for a download, without the lock
            with self._indexing:
                lost = self._lost.get(shard)
        detail = f"{self.shards[shard].samples:,} samples were declared, {usable(known)}"
        if index - known.samples < len(lost):
            return RefusedSample(lost[index - known.samples].cause, detail)
        return BadSample("fewer than declared", detail)

    def _list_lost(self, shard: int) -> list[Lost]:
        most = self.shards[shard].samples - self._shard(shard).samples
        with mapped(self._tars.get(shard).number) as tar:
            found = islice(refused_samples(tar, list_members(tar), self._index.rules), most)
            return [Lost(key, fault.cause) for key, _, fault in found]


def repeated_shards(sources: Iterable[Source]) -> Iterator[str]:
    """One line for each source, and for each two, that have the same samples of the same bytes under two names, as far
    as shards are indexed, or declared under one URL. The same bytes with other captions are no repetition."""
    first: dict[Any, tuple[str, str]] = {}
    found: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for source in sources:
        for shard in filter(lambda shard: shard.samples, source.shards):
            here = (source.name, masked(shard.url))
            name, url = first.setdefault((shard.identity if shard.sidecar else shard.url, source._captions), here)
            if (name, url) != here:
                found.setdefault((name, source.name), []).append((url, here[1]))
    for (one, other), shards in found.items():
        whose = f"source {one!r}" if one == other else f"sources {one!r} and {other!r}"
        more = f" (and {len(shards) - 1} more such)" if len(shards) > 1 else ""
        yield (
            f"{whose}: the samples of shard {shards[0][1]} are those of {shards[0][0]} again{more}, and come twice as "
            "often as others; name each shard once, and let weights say what comes more often"
        )


def _surplus(shard: Shard, declared: Shard) -> str:
    more = shard.samples - declared.samples
    return (
        f"shard {masked(shard.url)}: {counted(declared.samples, 'sample was', 'samples were')} declared, the last "
        f"{counted(more, 'usable one stays', 'usable ones stay')} unused"
    )


def open_source(
    name: str,
    source: SourceSettings,
    data: Data,
    *,
    need: Need,
    track: Track | None = None,
    findings: bool = False,
    ahead: bool = False,
    recorded: str | None = None,
    renew: Renew = "no",
) -> Source:
    """Expand, fetch and index the shards of one source.

    Args:
        need: a caption ("pairs") or a label beside each picture.
        track: wraps a list of shards for a progress bar: track(shards, label) -> the same shards.
        findings: tell of each shard that is cut short or changed, and of refused samples by cause.
        ahead: index remote shards now although their numbers of samples are declared.
        recorded: the source's fingerprint in the run that is resumed: if it began with declared numbers, it keeps to
            them.
        renew: whether remote shards that are known are compared with their servers, or everything is indexed anew.

    Raises:
        UserError: a shard that is not there or cannot be read, or no usable sample in any.
    """
    urls = expand_urls(source.urls, data.allow_pipe)
    extra = extra_shards(name, urls, source) if need == "pairs" else {}
    index = Index(Rules.of(source, data, need), data.index_dir, data.cache_dir, data.hash, extra=extra)
    remote = not all(map(is_local, urls))
    cache = ShardCache(data.cache_dir, data.cache_bytes, data.fetch, data.allow_pipe) if remote else None

    indexed: dict[str, Shard] = {}  # kept, for a second look at a shard that changed finds it current
    indexing = {"jobs": data.index_jobs, "track": track}

    def with_declared(declared: dict[str, int]) -> Source:
        wanted = [url for url in urls if url not in declared and url not in indexed]
        found = index_shards(wanted, index, cache, label=f"indexing {name}", renew=renew, **indexing)
        indexed.update((shard.url, shard) for shard in found)
        shards = indexed | {url: Shard.declared(url, count) for url, count in declared.items()}
        return Source(name, [shards[url] for url in urls], index, Captions.of(source), cache)

    def began_with(declared: dict[str, int]) -> bool:
        return with_declared(declared).fingerprint() == recorded

    declared = {}
    if not ahead:
        resumed = None if recorded is None else began_with
        declared = declared_counts(name, urls, source.counts, index, cache, **indexing, began_with=resumed)
    opened = with_declared(declared)
    report.require_samples(name, opened.shards, need, source, opened.copy_of)
    doubted = doubts(name, source.counts, declared, index.rules)
    for line in (*report.findings(name, opened.shards, opened.copy_of), *doubted) if findings else ():
        tell(line)
    return opened
