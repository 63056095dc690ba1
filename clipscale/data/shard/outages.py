"""Shards that cannot be read for a while: told once when it begins, and once when it ends, with what it cost.

    outages = Outages("mine")
    outages.failed(3, "https://host/0003.tar", error)      # source 'mine': https://host/0003.tar fails: ...
    outages.worked(3)                                      # ... is read again after 42 s; 37 samples were masked ...

Of many shards that fail at once the first are named, and the end of the whole is told.
"""

from __future__ import annotations

import threading
import time

from clipscale.tell import tell

_NAMED = 8  # shards that fail at a time


class _Outage:
    def __init__(self, shown: str, named: bool) -> None:
        self.shown, self.named, self.since, self.samples = shown, named, time.monotonic(), 0

    def tell(self, what: str) -> None:
        seconds = time.monotonic() - self.since
        tell(f"{what} again after {seconds:.0f} s; samples masked meanwhile: {self.samples:,}", every_rank=True)


class Outages:
    """Of one source in one process. Any thread may use it."""

    def __init__(self, source: str) -> None:
        self._about = f"source {source!r}:"
        self._lock = threading.Lock()
        self._shards: dict[int, _Outage] = {}  # those that fail now
        self._others: _Outage | None = None  # from the first unnamed one until no shard fails

    def failed(self, shard: int, shown: str, error: OSError) -> None:
        """One sample of the shard could not be read."""
        with self._lock:
            first = shard not in self._shards
            if first:
                self._shards[shard] = _Outage(shown, named=len(self._shards) < _NAMED)
            outage = self._shards[shard]
            outage.samples += 1
            begins = not outage.named and self._others is None
            if begins:
                self._others = _Outage("", named=False)
            if not outage.named:
                self._others.samples += 1
        if first and outage.named:
            why = str(error).removeprefix(f"{shown}: ")  # a failed download names its URL itself
            tell(f"{self._about} {shown} fails, its samples are masked until it is back: {why}", every_rank=True)
        elif begins:
            tell(f"{self._about} more than {_NAMED} shards fail; further ones are not named", every_rank=True)

    def worked(self, shard: int) -> None:
        """A sample of the shard was read."""
        if shard not in self._shards:
            return
        others = None
        with self._lock:
            outage = self._shards.pop(shard, None)
            if not self._shards:
                others, self._others = self._others, None
        if outage and outage.named:
            outage.tell(f"{self._about} {outage.shown} is read")
        if others:
            others.tell(f"{self._about} the shards that were not named are read")
