"""A shard's bytes as a stream, opened by whatever opens its scheme (`urls.OPENERS`).

    body = open_body("https://host/x-00.tar", start=0, version=None, stall_seconds=30.0)
    for block in body.blocks: ...
    look("https://host/x-00.tar", body.etag, stall_seconds=30.0)           # Seen(etag=..., total_bytes=...): no bytes

What goes wrong is sorted here, into what may pass (`TryAgain`) and what will not (`Refused`); an opener raises these
two where it knows more than the kind of an error says.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType

from clipscale.data.fetch.urls import OPENERS, scheme_of

BLOCK_BYTES = 2**18  # at most, of a stream that is seen as it comes
_MISSING = (FileNotFoundError, PermissionError, NotADirectoryError)
_NEVER = (*_MISSING, IsADirectoryError, ValueError, ImportError)


class TryAgain(Exception):
    """It failed in a way that may pass."""

    def __init__(self, cause: str, after_seconds: float = 0.0) -> None:
        super().__init__(cause)
        self.after_seconds = after_seconds  # the server wants to be left alone for so long


class Refused(Exception):
    """It failed in a way that will not pass."""

    def __init__(self, cause: str, missing: bool = False) -> None:
        super().__init__(cause)
        self.missing = missing  # there is no such file, or none that may be seen


@dataclass(frozen=True)
class Body:
    start: int  # where in the shard the first byte lies
    total_bytes: int | None  # of the whole shard
    version: str | None  # names this content; None: once cut, it cannot be resumed
    blocks: Iterator[bytes]
    cancel: Callable[[], None] = lambda: None  # from any thread; unblocks a waiting reader where that is possible
    etag: str | None = None  # changes with the content: the server's word, such as 'ETag: "1f"'; None: it has none
    said: str = ""  # what else came with it, for messages: 'HTTP 200 OK, text/html'


@dataclass(frozen=True)
class Seen:
    """What is said of a shard without sending it; None: it is not said."""

    etag: str | None = None
    total_bytes: int | None = None

    def differs(self, etag: str | None, total_bytes: int | None) -> bool:
        """From what was seen or fetched before. What either of both does not know is no difference."""
        now, before = (self.etag, self.total_bytes), (etag, total_bytes)
        return any(None not in pair and pair[0] != pair[1] for pair in zip(now, before, strict=True))


def open_body(url: str, start: int, version: str | None, stall_seconds: float) -> Body:
    """The shard's bytes from `start` on if it still is of this version, else from 0 or from `start` (see Body.start).

    Raises:
        TryAgain, Refused: here and while the blocks are read.
    """
    try:
        body = _opener(url).open_body(url, start, version, stall_seconds)
    except Exception as error:
        raise _sorted_out(error) from error
    return dataclasses.replace(body, blocks=_judged(body.blocks))


def look(url: str, etag: str | None, stall_seconds: float) -> Seen:
    """What is said of the shard now, by one small request. `etag`: of the content that is known.

    Raises:
        TryAgain, Refused: no answer, or none with the shard.
    """
    try:
        return _opener(url).look(url, etag, stall_seconds)
    except Exception as error:
        raise _sorted_out(error) from error


def _opener(url: str) -> ModuleType:
    return importlib.import_module(f"clipscale.data.fetch.open_{OPENERS[scheme_of(url)].kind}")


def _judged(blocks: Iterator[bytes]) -> Iterator[bytes]:
    try:
        yield from blocks
    except Exception as error:
        raise _sorted_out(error) from error


def _sorted_out(error: Exception) -> TryAgain | Refused:
    """TryAgain or Refused, for any kind that the clients raise."""
    if isinstance(error, TryAgain | Refused):
        return error
    cause = f"{type(error).__name__}: {error}"
    return Refused(cause, isinstance(error, _MISSING)) if isinstance(error, _NEVER) else TryAgain(cause)
