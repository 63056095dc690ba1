"""Whole copies of remote shards in a folder of bounded size, shared by the processes of a node.

    cache = ShardCache(None, None, Fetch(), allow_pipe=False)
    cache.prefetch(["s3://bucket/00001.tar", "s3://bucket/00002.tar"])     # returns at once
    file = cache.open("s3://bucket/00001.tar")                              # waits; then a descriptor for pread

One thread of all processes fetches a shard while the others wait for it. Copies used longest ago make room for new
ones; the descriptors that readers hold stay good. The folder should lie on a local disk.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from typing import NamedTuple

from clipscale.config.data import Fetch
from clipscale.data.fetch.copies import Copies, Lock, PartFile
from clipscale.data.fetch.download import (
    MAX_RETRY_AFTER_SECONDS,
    Check,
    Expected,
    Facts,
    FetchError,
    Stopped,
    download,
)
from clipscale.data.fetch.streams import Refused, TryAgain, look
from clipscale.data.fetch.urls import check_scheme, is_local, masked
from clipscale.errors import UserError
from clipscale.escape import escaped
from clipscale.files import cache_folder

__all__ = ["Check", "Expected", "Facts", "FetchError", "ShardCache"]  # the whole of what others need

_MAX_AGAIN_SECONDS = 300.0  # the longest pause before a shard that could not be fetched is asked for again
_POLL_SECONDS = 0.02
_MISSING = "\nmissing"  # ends the note of a failure


class _Failure(NamedTuple):
    """A shard that could not be fetched fails at once, without a request, while the pause lasts."""

    until: float  # of the monotonic clock
    pause_seconds: float
    note: str  # of why
    at: float  # when the note was written


class ShardCache:
    """Copies of remote shards. Any thread may use it; pickled, it is its settings.

    Args:
        folder: `data.cache_dir`; None: the user's cache folder. The copies lie in its folder `shards`.
        bound_bytes: of all copies together; None: 80 % of what they and the free space of the disk have now.
    """

    def __init__(self, folder: str | None, bound_bytes: int | None, fetch: Fetch, allow_pipe: bool) -> None:
        self.folder, self.fetch, self.allow_pipe = folder, fetch, allow_pipe
        self._copies = Copies(cache_folder(folder) / "shards", bound_bytes)
        self.bound_bytes = self._copies.bound_bytes
        self._lock = threading.Lock()  # of what follows
        self._stop = threading.Event()
        self._failed: dict[str, _Failure] = {}  # by URL
        self._wanted: deque[tuple[str, Check | None]] = deque()
        self._pending: set[str] = set()  # wanted, or being fetched for it
        self._workers: list[threading.Thread] = []

    def __reduce__(self) -> tuple:
        return ShardCache, (self.folder, self.bound_bytes, self.fetch, self.allow_pipe)

    def open(self, url: str, *, expect: Expected | None = None, check: Check | None = None, anew: bool = False) -> int:
        """A file descriptor of the whole copy, the caller's to close. Waits while it is fetched, by whomever.

        Args:
            expect: what it must be; what does not have the expected hash is fetched again.
            check: says what is wrong with a file that is no such shard; not asked where the hash is as expected.
            anew: fetch it although there is a copy, which stays until the new one is whole.

        Raises:
            FetchError: it cannot be had, or is not as expected; the same again at once until `fetch.again_seconds`
                have passed, then after one more attempt, and twice as long from time to time.
            UserError: the URL's scheme is not read here, or the folder cannot be used.
        """
        return self._open(url, expect or Expected(), check, self._stop, anew)

    def facts(self, url: str) -> Facts:
        """What is known of the copy: `bytes`, `crc32`, `etag`; empty while it is not there."""
        return self._copies.facts(_key(url)) if self.path(url) else {}

    def changed(self, url: str, etag: str | None, size: int | None) -> bool:
        """Whether the server says that the shard no longer is the one of this etag and size (bytes); one request.

        Raises:
            FetchError: it does not answer.
            UserError: the URL's scheme is not read here.
        """
        check_scheme(url, self.allow_pipe)
        try:
            return look(url, etag, self.fetch.stall_seconds).differs(etag, size)
        except (TryAgain, Refused) as error:
            raise FetchError(f"{masked(url)}: {masked(str(error))}") from error

    def path(self, url: str) -> str | None:
        """Where the copy lies; None while it is not there."""
        path = self._copies.copy(_key(url))
        return str(path) if path.exists() else None

    def shown(self, url: str) -> str:
        """For the end of a message: where the copy lies, if it is there."""
        path = self.path(url)
        return f" (its copy: {path})" if path else ""

    def forget(self, url: str) -> None:
        """Remove the copy, such as one that turned out to be something else; descriptors of it stay good."""
        self._copies.remove(_key(url))

    def prefetch(self, urls: Iterable[str], check: Check | None = None) -> None:
        """Begin to fetch these shards in the background, after those wanted before. A failure is told by `open`."""
        with self._lock:
            for url in urls:
                if url not in self._pending:
                    self._pending.add(url)
                    self._wanted.append((url, check))
            while self._wanted and len(self._workers) < min(self.fetch.parallel, len(self._pending)):
                worker = threading.Thread(target=self._work, args=(self._stop,), name="clipscale-prefetch", daemon=True)
                self._workers.append(worker)
                worker.start()

    def close(self) -> None:
        """End all fetching, also that of a waiting `open`. The cache can be used again."""
        with self._lock:
            workers, self._workers = self._workers, []
            self._wanted.clear()
            self._pending.clear()
            self._stop.set()
            self._stop = threading.Event()
        for worker in workers:
            worker.join(timeout=1.0)

    def _work(self, stop: threading.Event) -> None:
        while True:
            with self._lock:
                if stop.is_set():
                    return
                if not self._wanted:
                    self._workers.remove(threading.current_thread())
                    return
                url, check = self._wanted.popleft()
            with suppress(FetchError, UserError):  # told by `open`
                os.close(self._open(url, Expected(), check, stop))
            with self._lock:
                self._pending.discard(url)

    def _open(self, url: str, expect: Expected, check: Check | None, stop: threading.Event, anew: bool = False) -> int:
        assert not is_local(url), url
        key, began = _key(url), time.time()
        watch = None
        while True:
            file = None if anew else self._copies.open(key, expect, check)
            if file is not None:
                self._forget_failure(url)
                return file
            self._raise_if_failed(url)
            check_scheme(url, self.allow_pipe)
            self._copies.make()
            lock = Lock.take(self._copies.locks / key)
            if lock:
                return self._fetch(_Wanted(url, key, expect, check, anew, began), stop, lock)
            watch = watch or _Watch(self._copies, key, url, self.fetch)
            watch.look()
            if stop.wait(_POLL_SECONDS):
                raise FetchError(f"{masked(url)}: the cache was closed")

    def _fetch(self, wanted: _Wanted, stop: threading.Event, lock: Lock) -> int:
        url, key, expect, check, anew, began = wanted
        before, keep_note = self._failed.get(url), False
        try:
            file = None if anew else self._copies.open(key, expect, check, holder=True)
            if file is not None:
                return file
            keep_note = True
            self._raise_if_failed(url)  # a thread of this process did, while this one waited for the lock
            told = lock.note(since=before.at if before else began)  # by a process that did meanwhile
            if told:
                raise self._failing(url, told, lock.written())
            keep_note = False
            fetch = replace(self.fetch, retries=0) if before else self.fetch
            part = PartFile(self._copies, key, url, stop, sha256=expect.sha256 is not None)
            try:
                file = part.finish(download(url, part, fetch, expect=expect, check=check, stop=stop))
            finally:
                part.discard()
            self._forget_failure(url)
            return file
        except Stopped:
            raise FetchError(f"{masked(url)}: the cache was closed") from None
        except FetchError as error:
            if not keep_note:
                keep_note = True
                lock.write_note(_note(error))
                self._failing(url, _note(error), lock.written())
            raise
        finally:
            lock.release(keep_note=keep_note)

    def _failing(self, url: str, note: str, at: float) -> FetchError:
        """The error of this note, which was written then; it is remembered."""
        with self._lock:
            before = self._failed.get(url)
            pause = min(2 * before.pause_seconds, _MAX_AGAIN_SECONDS) if before else self.fetch.again_seconds
            left = pause - min(max(time.time() - at, 0.0), pause)
            self._failed[url] = _Failure(time.monotonic() + left, pause, note, at)
        return _noted(note)

    def _forget_failure(self, url: str) -> None:
        with self._lock:
            self._failed.pop(url, None)

    def _raise_if_failed(self, url: str) -> None:
        failure = self._failed.get(url)
        if failure and time.monotonic() < failure.until:
            raise _noted(failure.note)


class _Wanted(NamedTuple):
    url: str
    key: str
    expect: Expected
    check: Check | None
    anew: bool
    began: float  # when it was asked for


class _Watch:
    """Over the holder of a lock who may have been halted: it fetches, pauses or waits for room, or is given up."""

    def __init__(self, copies: Copies, key: str, url: str, fetch: Fetch) -> None:
        self._copies, self._key, self._shown = copies, key, masked(url)
        self._patience_seconds = MAX_RETRY_AFTER_SECONDS + 60 + 2 * fetch.stall_seconds
        self._progress, self._since = copies.progress(key), time.monotonic()

    def look(self) -> None:
        progress, now = self._copies.progress(self._key), time.monotonic()
        if progress != self._progress:
            self._progress, self._since = progress, now
        elif now - self._since > self._patience_seconds:
            raise FetchError(
                f"{self._shown}: another process has its lock {self._copies.locks / self._key} and did nothing for "
                f"{self._patience_seconds:.0f} s; end that process"
            )


def _note(error: FetchError) -> str:
    """A failure as it is remembered and told to other processes: its message and, on a line of its own, whether the
    shard is missing."""
    return escaped(str(error)) + (_MISSING if error.missing else "")


def _noted(note: str) -> FetchError:
    return FetchError(note.removesuffix(_MISSING), missing=note.endswith(_MISSING))


def _key(url: str) -> str:
    return hashlib.sha256(url.encode(errors="surrogatepass")).hexdigest()[:32]
