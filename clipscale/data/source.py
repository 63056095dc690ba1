"""A source: the usable samples of a list of shards, read by (shard, index) through their sidecars.

    source = open_source("shapes", config.data.sources["shapes"], config.data, need="pairs")
    sample = source.read(shard=3, index=17)        # Sample(key, image bytes, caption or label bytes)
    text = source.caption(sample.note, draw)       # by the source's caption rule

Samples are read with `pread` on files that stay open: no seek, no lock held meanwhile, any thread. Nothing is kept for
each sample, only for each shard. A source can be pickled: its copy opens files of its own.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np

from clipscale.config_data import Data, SourceSettings
from clipscale.data.bad import MASK_CAUSES, BadSample
from clipscale.data.fetch.cache import Expected, ShardCache
from clipscale.data.fetch.urls import expand_urls, is_local, masked
from clipscale.data.shard.captions import MAX_JSON_BYTES, CaptionError, CaptionRule
from clipscale.data.shard.counts import declared_counts
from clipscale.data.shard.index import Index, Shard
from clipscale.data.shard.index_many import Track, index_shards
from clipscale.data.shard.judge import MAX_PICTURE_BYTES
from clipscale.data.shard.select import Need, Rules
from clipscale.data.shard.sidecar import Records, Row
from clipscale.errors import UserError
from clipscale.tell import tell

_MAX_OPEN_FILES = 32  # shards, and as many sidecars, of each source; a process may have 1,024 in all on many systems
_NEIGHBOUR_BYTES = 4096  # a picture and its note no further apart than this are read at once


class Sample(NamedTuple):
    key: str
    image: bytes
    note: bytes  # the member that holds the caption, or the label


class Source:
    """Samples of several shards. `counts` [S]: usable samples of each shard, or those declared."""

    def __init__(
        self, name: str, shards: list[Shard], index: Index, caption: CaptionRule, cache: ShardCache | None
    ) -> None:
        self.name, self.shards, self.need = name, shards, index.rules.need
        self.counts = np.array([shard.samples for shard in shards], np.int64)
        self.samples = int(self.counts.sum())
        self._index, self._caption, self._cache = index, caption, cache
        self._found: dict[int, Shard] = {}  # declared shards that were indexed since
        self._prepare()

    def _prepare(self) -> None:
        self._tars = _OpenFiles(self._open_tar)
        self._sidecars = _OpenFiles(self._open_sidecar)
        self._indexing = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_tars", "_sidecars", "_indexing")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._prepare()

    def fingerprint(self) -> str:
        """Changes with the content of any shard, with which samples of it are used and with what of them is the
        caption; not with where shards lie. Of declared shards, names and numbers of samples are all that counts."""
        facts = [(shard.identity, shard.samples) for shard in self.shards]
        caption = self._caption if self.need == "pairs" else None
        return hashlib.sha256(repr((facts, caption)).encode()).hexdigest()[:16]

    def read(self, shard: int, index: int) -> Sample:
        """One sample's bytes.

        Raises:
            OSError: the file is gone, shorter than its index says or another one, the index is damaged, or fewer
                samples are usable than were declared. The message names the shard and the key.
        """
        key = f"number {index}"
        try:
            row = self._sidecars.get(shard).row(index, self.shards[shard].samples)
            key = row.key
            tar = self._tars.get(shard)  # held while it is read, so that another thread cannot make it close
            return Sample(key, *_read_pair(tar.number, row))
        except OSError as error:
            raise OSError(f"shard {masked(self.shards[shard].url)}, {key}: {error}") from error

    def note(self, shard: int, index: int) -> bytes:
        """The note alone, of a shard that is here.

        Raises:
            OSError: as `read`.
        """
        *_, start, size = self._sidecars.get(shard).row(index, self.shards[shard].samples)
        tar = self._tars.get(shard)  # held, as in `read`
        return _read_exactly(tar.number, start, size)

    def where(self, shard: int, index: int) -> tuple[str, str]:
        """(shard path or URL, key), for messages. A number stands for the key where the index cannot be read or is not
        there yet: nothing is fetched for it."""
        key = f"number {index}"
        if self._shard(shard).sidecar:
            with suppress(OSError):
                key = self._sidecars.get(shard).row(index, self.shards[shard].samples).key
        return masked(self.shards[shard].url), key

    def caption(self, note: bytes, draw: int = 0) -> str:
        """The caption in a sample's note; `draw` (64 bits) chooses where the source's `captions` is random.

        Raises:
            BadSample: there is none.
        """
        try:
            return self._caption.pick(note, draw)
        except CaptionError as error:
            cause = str(error)
            raise BadSample(cause if cause in MASK_CAUSES else "caption cannot be used", cause) from error

    def refused(self) -> Counter[str]:
        """Samples left out when the shards were indexed, by cause."""
        return sum((Counter(shard.refused) for shard in self.shards), Counter())

    def not_read(self) -> Counter[str]:
        """Members whose suffix is not on the allow-list, by suffix."""
        return sum((Counter(shard.not_read) for shard in self.shards), Counter())

    def changes(self) -> list[str]:
        """One line for each shard that holds other bytes than its index said until now."""
        return [
            f"source {self.name!r}: {masked(shard.url)} changed since it was indexed last: {shard.changed}"
            for shard in self.shards
            if shard.changed
        ]

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
            f"source {self.name!r}: its order reads about {at_a_time:,} shards by turns, {wanted / 1e9:,.1f} GB, and "
            f"data.cache_bytes allows {bound / 1e9:,.1f} GB: shards will be fetched over and over; set data.streams "
            "and data.block_shards so that 1.5 x streams x block_shards shards fit, or raise the bound"
        )

    def prefetch(self, shards: Iterable[int]) -> None:
        """Start to fetch those of the shards that are remote; returns at once."""
        urls = [url for shard in shards if not is_local(url := self.shards[shard].url)]
        if urls:
            self._cache.prefetch(urls)

    def close(self) -> None:
        """Let go of the open files; a later read opens them again."""
        self._tars.clear()
        self._sidecars.clear()
        if self._cache is not None:
            self._cache.close()

    def _shard(self, shard: int) -> Shard:
        return self._found.get(shard, self.shards[shard])

    def _open_tar(self, shard: int) -> _File:
        known = self._shard(shard)
        if not is_local(known.url):
            return _File(self._cache.open(known.url, expect=Expected(known.bytes, known.crc32, known.sha256)))
        file = _File(os.open(known.url, os.O_RDONLY | os.O_CLOEXEC))
        stat = os.fstat(file.number)
        if (stat.st_size, stat.st_mtime_ns) != (known.bytes, known.mtime_ns):
            raise OSError("the shard changed since this run began (its size or time)")
        return file

    def _open_sidecar(self, shard: int) -> _OpenSidecar:
        known = self._shard(shard)
        if not known.sidecar:
            known = self._found[shard] = self._index_declared(known)
        file = _File(os.open(known.sidecar, os.O_RDONLY | os.O_CLOEXEC))
        try:
            return _OpenSidecar(file, Records.of(file.number, known.identity))
        except OSError as error:
            raise OSError(f"{error} ({known.sidecar})") from error

    def _index_declared(self, declared: Shard) -> Shard:
        url, lazily = declared.url, dataclasses.replace(self._index, lazily=True)
        shard = self._index.known(url) or lazily.known(url)
        if shard is None:
            file = _File(self._cache.open(url))
            with self._indexing:
                shard = lazily.known(url) or lazily.build(url, file.number)
        if shard.samples > declared.samples:
            tell(_surplus(shard, declared), every_rank=True)
        return shard


class _File:
    """A descriptor that is closed with its last user."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.close(self.number)


class _OpenSidecar(NamedTuple):
    file: _File
    records: Records

    def row(self, index: int, declared: int) -> Row:
        if index >= self.records.samples:
            raise OSError(f"{declared} samples were declared, {self.records.samples} are usable")
        return self.records.read(index)


class _OpenFiles:
    """The files used last, by shard. One that is dropped while a thread reads it stays open until it has done so."""

    def __init__(self, open_one: Callable[[int], Any]) -> None:
        self._open_one = open_one
        self._files: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, shard: int) -> Any:
        with self._lock:
            if shard in self._files:
                self._files.move_to_end(shard)
                return self._files[shard]
        file = self._open_one(shard)  # may wait for a download
        with self._lock:
            self._files[shard] = file
            while len(self._files) > _MAX_OPEN_FILES:
                self._files.popitem(last=False)
        return file

    def clear(self) -> None:
        with self._lock:
            self._files.clear()


def _read_pair(file: int, row: Row) -> tuple[bytes, bytes]:
    """Picture and note, by one read where they are neighbours."""
    _, image, image_size, note, note_size = row
    start, end = min(image, note), max(image + image_size, note + note_size)
    if image_size > MAX_PICTURE_BYTES or note_size > MAX_JSON_BYTES or end >= 2**63:
        raise OSError(f"its index claims a picture of {image_size} bytes at {image}, a note of {note_size} at {note}")
    if end - start - image_size - note_size > _NEIGHBOUR_BYTES:
        return _read_exactly(file, image, image_size), _read_exactly(file, note, note_size)
    both = _read_exactly(file, start, end - start)
    return both[image - start :][:image_size], both[note - start :][:note_size]


def _read_exactly(file: int, offset: int, size: int) -> bytes:
    data = os.pread(file, size, offset)
    if len(data) < size:
        raise OSError(f"{size} bytes at {offset} were expected, {len(data)} are there: the shard changed or shrank")
    return data


def _surplus(shard: Shard, declared: Shard) -> str:
    more = shard.samples - declared.samples
    return (
        f"shard {masked(shard.url)}: {declared.samples} samples were declared, the last {more} usable ones stay unused"
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
) -> Source:
    """Expand, fetch and index the shards of one source.

    Args:
        need: a caption ("pairs") or a label beside each picture.
        track: wraps a list of shards for a progress bar: track(shards, label) -> the same shards.
        findings: tell of each shard that is cut short or changed, and of refused samples by cause.
        ahead: index remote shards now although their numbers of samples are declared.

    Raises:
        UserError: a shard that is not there or cannot be read, or no usable sample in any.
    """
    urls = expand_urls(source.urls, data.allow_pipe)
    index = Index(Rules.of(source, data, need), data.index_dir, data.cache_dir, data.hash)
    remote = not all(map(is_local, urls))
    cache = ShardCache(data.cache_dir, data.cache_bytes, data.fetch, data.allow_pipe) if remote else None
    declared = {} if ahead else declared_counts(urls, source.counts, index, cache)
    wanted = [url for url in urls if url not in declared]
    indexed = index_shards(wanted, index, cache, jobs=data.index_jobs, track=track, label=f"indexing {name}")
    shards = {shard.url: shard for shard in indexed}
    shards |= {url: Shard.declared(url, count) for url, count in declared.items()}
    opened = Source(name, [shards[url] for url in urls], index, CaptionRule.of(source.caption, source.captions), cache)
    _require_samples(opened, source)
    for line in _findings(opened) if findings else ():
        tell(line)
    return opened


def _require_samples(opened: Source, source: SourceSettings) -> None:
    if opened.samples:
        return
    place = source.caption if source.caption.startswith("json:") else f".{source.caption}"
    wanted = f"a caption ({place})" if opened.need == "pairs" else "a label (.cls)"
    table = ", ".join(f"{cause}: {count}" for cause, count in opened.refused().most_common())
    causes = "; ".join(filter(None, [table, *(f"{masked(s.url)} {s.cut}" for s in opened.shards if s.cut)][:4]))
    raise UserError(
        f"source {opened.name!r}: none of its {len(opened.shards)} shards ({masked(source.urls)}) holds a sample with "
        f"a picture and {wanted}; found: {causes or 'empty archives'}"
    )


def _findings(source: Source) -> Iterable[str]:
    yield from source.changes()
    for shard in source.shards:
        if shard.cut:
            about = f"source {source.name!r}: {masked(shard.url)}"
            yield f"{about} is damaged, {shard.samples} samples are usable: {shard.cut}"
    refused = source.refused()
    if refused:
        table = ", ".join(f"{cause}: {count}" for cause, count in refused.most_common())
        yield f"source {source.name!r}: {refused.total()} samples refused ({table}); {source.samples} are usable"
