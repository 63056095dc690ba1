"""A source: the usable samples of a list of shards, read by (shard, index) through their tables.

    source = open_source("shapes", "runs/shapes/train-*.tar", need="pairs")
    sample = source.read(shard=3, index=17)        # Sample(key, image bytes, caption or label bytes)

Samples are read with `pread` on files that stay open: no seek, no lock, any thread.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from clipscale.data.index import Need, Shard, Table, index_shard
from clipscale.data.shards import expand_urls, local_path
from clipscale.errors import UserError

_MAX_OPEN_FILES = 64  # of each source; a process may have 1,024 in all on many systems


class Sample(NamedTuple):
    key: str
    image: bytes
    note: bytes  # the caption (UTF-8), or the label


class Source:
    """Samples of several shards. `counts` [S]: usable samples of each shard."""

    def __init__(self, name: str, shards: list[Shard], need: Need) -> None:
        self.name, self.shards, self.need = name, shards, need
        self.counts = np.array([shard.count(need) for shard in shards], np.int64)
        self.samples = int(self.counts.sum())
        self._files: OrderedDict[str, int] = OrderedDict()
        self._lock = threading.Lock()

    def fingerprint(self) -> str:
        """Changes with the content of any shard or with which samples of it are used, not with where shards lie."""
        facts = [(shard.bytes, shard.crc32, shard.count(self.need)) for shard in self.shards]
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]

    def read(self, shard: int, index: int) -> Sample:
        """One sample's bytes.

        Raises:
            OSError: the file is gone or shorter than its index says, or the index is damaged.
        """
        table, row = self._row(shard, index)
        image, note = table.image[row], (table.text if self.need == "pairs" else table.label)[row]
        file = self._open(self.shards[shard].path)
        try:
            return Sample(table.keys[row], _read_exactly(file, *image), _read_exactly(file, *note))
        finally:
            os.close(file)

    def where(self, shard: int, index: int) -> tuple[str, str]:
        """(shard path, key), for messages; a number stands for the key where the index cannot be read."""
        try:
            table, row = self._row(shard, index)
        except OSError:
            return self.shards[shard].path, f"number {index}"
        return self.shards[shard].path, table.keys[row]

    def close(self) -> None:
        """Let go of the open files; a later read opens them again."""
        with self._lock:
            while self._files:
                os.close(self._files.popitem()[1])

    def _row(self, shard: int, index: int) -> tuple[Table, int]:
        table = self.shards[shard].table()
        all_usable = len(table.keys) == self.counts[shard]
        return table, index if all_usable else table.rows(self.need)[index]

    def _open(self, path: str) -> int:
        """A descriptor of one's own (a duplicate), so that evicting the shared one cannot pull it away."""
        with self._lock:
            if path not in self._files:
                self._files[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                if len(self._files) > _MAX_OPEN_FILES:
                    os.close(self._files.popitem(last=False)[1])
            self._files.move_to_end(path)
            return os.dup(self._files[path])


def _read_exactly(file: int, offset: int, size: int) -> bytes:
    data = os.pread(file, size, offset)
    if len(data) < size:
        raise OSError(f"{size} bytes at {offset} were expected, {len(data)} are there: the shard changed or shrank")
    return data


def open_source(
    name: str,
    urls: str,
    *,
    need: Need,
    index_dir: str | None = None,
    cache_dir: str | None = None,
    track: Callable[[Iterable[str], str], Iterable[str]] | None = None,
    warn: Callable[[str], None] | None = None,
) -> Source:
    """Expand, fetch and index the shards of one source.

    Args:
        track: wraps the list of shards for a progress bar: track(shards, label) -> the same shards.
        warn: told in one line of each shard that is cut short, and of refused samples by cause.

    Raises:
        UserError: a shard that is not there or cannot be read, or no usable sample in any.
    """
    paths = expand_urls(urls)
    shards = []
    for url in track(paths, f"indexing {name}") if track else paths:
        try:
            shards.append(index_shard(local_path(url, cache_dir), index_dir, cache_dir))
        except OSError as error:
            raise UserError(f"shard {url!r}: {error}") from error
    source = Source(name, shards, need)
    refused = refusals(shards, need)
    table = ", ".join(f"{cause}: {count}" for cause, count in refused.most_common())
    if source.samples == 0:
        wanted = "a picture and a caption (.txt)" if need == "pairs" else "a picture and a label (.cls)"
        causes = "; ".join(filter(None, [table, *(f"{s.path} {s.cut}" for s in shards[:3] if s.cut)]))
        raise UserError(
            f"source {name!r}: none of its {len(shards)} shards ({urls}) holds a sample with {wanted}; "
            f"found: {causes or 'empty archives'}"
        )
    if warn:
        for shard in shards:
            if shard.cut:
                warn(f"source {name!r}: {shard.path} is damaged, {shard.count(need)} samples are usable: {shard.cut}")
        if refused:
            warn(f"source {name!r}: {refused.total()} samples refused ({table}); {source.samples} are usable")
    return source


def refusals(shards: list[Shard], need: Need) -> Counter[str]:
    """Samples left out, by cause. Captions do not matter to labelled pictures."""
    counts: Counter[str] = Counter()
    for shard in shards:
        counts.update(shard.refused)
    if need == "labelled":
        counts = Counter({cause: n for cause, n in counts.items() if "caption" not in cause})
    return counts
