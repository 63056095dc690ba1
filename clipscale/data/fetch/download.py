"""A remote shard's bytes: one stream per attempt, watched for stalls, resumed or begun again until it is whole.

    download("https://host/x-00.tar", part, fetch, expect=None, stop=threading.Event())     # part: see `Part`

Each stream is opened and read in a thread of its own while the caller waits for its blocks: so one rule ends a stalled
connection, headers that never come, a slow drip, a silent command and a client library without time-outs, and `stop`
is obeyed at once. A thread that was given up ends by itself with its next block or time-out.
"""

from __future__ import annotations

import queue
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol

from clipscale.config.data import Fetch
from clipscale.data.fetch.streams import Body, Refused, TryAgain, open_body
from clipscale.data.fetch.urls import masked
from clipscale.words import counted

MAX_RETRY_AFTER_SECONDS = 300.0  # a server that asks for a longer pause is asked again after this one
_MAX_PAUSE_SECONDS = 60.0
_FLOOR_BYTES_PER_SECOND = 1000  # less than this, over `stall_seconds`, is a stall too
_PAGE_BYTES = 2**20  # a body of another size than is expected is read if it is no larger: it may say what is wrong
_WAITING_BLOCKS = 4  # read ahead of the disk
_POLL_SECONDS = 0.05


Facts = dict[str, int | str | None]
Check = Callable[[int, bool], str]  # (descriptor, whether the server named its length) -> what is wrong with it, or ''


class FetchError(OSError):
    """A shard could not be fetched; names the URL (masked), the cause and the number of attempts.

    `missing`: the server says that there is no such file, or forbids to look.
    """

    def __init__(self, message: str, *, missing: bool = False) -> None:
        super().__init__(message)
        self.missing = missing


class Stopped(Exception):
    """The cache was closed meanwhile."""


@dataclass(frozen=True)
class Expected:
    """What a shard is known to be, such as from its index; None: not known."""

    bytes: int | None = None
    crc32: int | None = None
    sha256: str | None = None  # hexadecimal

    def differs(self, found: Facts) -> str | None:
        """The first of these that was found to be something else, in words."""
        for name, wanted in vars(self).items():
            if wanted is not None and found.get(name) != wanted:
                return f"its {name} is {found.get(name)}, {wanted} was expected: the shard or its index changed"
        return None


class Part(Protocol):
    """Where a shard is put while it comes."""

    written_bytes: int

    def restart(self) -> None:
        """Forget what was written."""

    def reserve(self, total_bytes: int) -> None:
        """Make room for a shard of so many bytes."""

    def write(self, block: bytes) -> None: ...

    def facts(self) -> Facts:
        """`bytes`, `crc32` and, where one is expected, `sha256` of what was written."""

    def look_over(self, check: Check, vouched: bool) -> str:
        """What `check` says of what was written."""


class _Mismatch(TryAgain):
    """A whole shard, but not the one expected: tried a second time and no more."""


class _Unfit(TryAgain):
    """What came whole, as far as the connection tells, is no shard: an error page, or a part."""


def download(
    url: str,
    part: Part,
    fetch: Fetch,
    *,
    expect: Expected | None = None,
    check: Check | None = None,
    stop: threading.Event | None = None,
) -> Facts:
    """Write the whole shard to `part`; returns its `etag`, and `vouched`: whether the server named its length.

    What `check` finds wrong is tried again like any other failure; what has the expected hash is not checked.

    Raises:
        FetchError: refused by the server, or still failing after `fetch.retries` further attempts, or not as expected
            in two downloads.
        Stopped: `stop` was set.
    """
    stop = stop or threading.Event()
    run = _Download(url, part, fetch, expect or Expected(), check, stop)
    failures: Counter[bool] = Counter()  # by whether they were mismatches
    while True:
        try:
            return run.attempt()
        except TryAgain as error:
            mismatch = isinstance(error, _Mismatch)
            failures[mismatch] += 1
            if failures[mismatch] > (1 if mismatch else fetch.retries):
                raise run.failed(error, failures.total()) from error
            asked = min(error.after_seconds, MAX_RETRY_AFTER_SECONDS)
        except Refused as error:
            raise run.failed(error, failures.total() + 1) from error
        doubled = fetch.backoff_seconds * 2 ** min(failures.total() - 1, 30)
        pause = min(doubled, _MAX_PAUSE_SECONDS) * random.SystemRandom().uniform(0.75, 1)  # not all ranks at once
        if stop.wait(max(pause, asked)):
            raise Stopped


class _Download:
    """One shard's attempts. `version` names the content that `part` has begun to hold; None: it cannot be resumed."""

    def __init__(
        self, url: str, part: Part, fetch: Fetch, expect: Expected, check: Check | None, stop: threading.Event
    ) -> None:
        self.url, self.part, self.fetch, self.expect, self.stop = url, part, fetch, expect, stop
        self.check = check
        self.version: str | None = None
        self.total_bytes: int | None = None  # as the server says in this attempt

    def attempt(self) -> Facts:
        part, self.total_bytes = self.part, None
        if self.version is None:
            part.restart()
        stream = _Stream(self.url, part.written_bytes, self.version, self.fetch.stall_seconds, self.stop)
        try:
            body = stream.body()
            self._line_up(body)
            while block := stream.block():
                part.write(block)
        finally:
            stream.give_up()
        if self.total_bytes not in (None, part.written_bytes):
            raise TryAgain("the body ended")
        vouched, wrong = self.total_bytes is not None, self.expect.differs(part.facts())
        unfit = part.look_over(self.check, vouched) if self.check and (wrong or self.expect.crc32 is None) else ""
        if unfit or wrong:
            self.version = None
            raise _Unfit(f"{unfit} ({body.said}); it may be another time: try again") if unfit else _Mismatch(wrong)
        return {"etag": body.etag, "vouched": vouched}

    def _line_up(self, body: Body) -> None:
        """Bring the part to where the body begins."""
        part, self.total_bytes = self.part, body.total_bytes
        changed = body.version is not None and body.version != self.version
        if body.start != part.written_bytes or (body.start and changed):
            part.restart()
            if body.start:
                self.version = None
                raise TryAgain("the shard changed while it was fetched")
        self.version = self.version if body.start else body.version
        if body.total_bytes is None:
            return
        wrong = Expected(self.expect.bytes).differs({"bytes": body.total_bytes})
        if wrong and not (self.check and body.total_bytes <= _PAGE_BYTES):
            self.version = None
            raise _Mismatch(wrong)
        part.reserve(body.total_bytes)

    def failed(self, error: TryAgain | Refused, attempts: int) -> FetchError:
        cause = " ".join(masked(str(error)).split())[:500]
        if not isinstance(error, _Mismatch | _Unfit) and (self.part.written_bytes or self.total_bytes):
            cause += f" at byte {self.part.written_bytes} of {self.total_bytes or 'an unknown number'}"
        message = f"{masked(self.url)}: {cause} ({counted(attempts, 'attempt')})"
        return FetchError(message, missing=isinstance(error, Refused) and error.missing)


class _Stream:
    """A body that is opened and read in a thread; `body` and `block` wait for it, but not longer than a stall."""

    def __init__(self, url: str, start: int, version: str | None, stall_seconds: float, stop: threading.Event) -> None:
        self._request = (url, start, version, stall_seconds)
        self._stall_seconds, self._stop = stall_seconds, stop
        self._items: queue.Queue[Body | bytes | Exception] = queue.Queue(_WAITING_BLOCKS)
        self._given_up = threading.Event()
        self._body: Body | None = None
        self._waited_seconds, self._came_bytes = 0.0, 0  # of the present window
        threading.Thread(target=self._read, name="clipscale-fetch", daemon=True).start()

    def body(self) -> Body:
        self._body = self._next("no answer")
        return self._body

    def block(self) -> bytes:
        """The next bytes; none at the end."""
        block = self._next("no byte")
        self._came_bytes += len(block)
        if self._waited_seconds >= self._stall_seconds:
            if block and self._came_bytes < _FLOOR_BYTES_PER_SECOND * self._waited_seconds:
                raise TryAgain(f"stalled: {self._came_bytes} bytes in {self._waited_seconds:.3g} s")
            self._waited_seconds, self._came_bytes = 0.0, 0
        return block

    def give_up(self) -> None:
        self._given_up.set()
        if self._body:
            self._body.cancel()

    def _next(self, nothing: str) -> Any:
        start = time.monotonic()
        item = None
        while item is None:
            try:
                item = self._items.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                if time.monotonic() - start >= self._stall_seconds:
                    raise TryAgain(f"stalled: {nothing} for {self._stall_seconds:g} s") from None
            if self._stop.is_set():
                raise Stopped
        if isinstance(item, Exception):
            raise item
        self._waited_seconds += time.monotonic() - start
        return item

    def _read(self) -> None:
        try:
            body = open_body(*self._request)
            if not self._put(body):
                body.cancel()
                return
            with closing(body.blocks):
                for block in body.blocks:
                    if not self._put(block):
                        return
            self._put(b"")
        except Exception as error:
            self._put(error)

    def _put(self, item: Body | bytes | Exception) -> bool:
        while not self._given_up.is_set():
            try:
                self._items.put(item, timeout=_POLL_SECONDS)
                return True
            except queue.Full:
                continue
        return False
