"""Shards and sidecars that are open: the ones used last stay so, and samples are read from them by any thread.

tars = OpenFiles(lambda shard: OpenFile(os.open(paths[shard], os.O_RDONLY)))
file = tars.get(3)                              # held while it is read, so that another thread cannot make it close
picture, note = read_pair(file.number, row)     # `pread`: no seek, no lock held meanwhile
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

from clipscale.data.shard.captions import MAX_JSON_BYTES
from clipscale.data.shard.judge import MAX_PICTURE_BYTES
from clipscale.data.shard.sidecar import Records, Row

_MAX_OPEN_FILES = 32  # shards, and as many sidecars, of each source; a process may have 1,024 in all on many systems
_NEIGHBOUR_BYTES = 4096  # a picture and its note no further apart than this are read at once


class OpenFile:
    """A descriptor that is closed with its last user."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.close(self.number)


class OpenSidecar(NamedTuple):
    file: OpenFile
    records: Records


class OpenFiles:
    """The files (or what was found in them) used last, by shard. One that is dropped while a thread reads it stays open
    until it has done so."""

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

    def peek(self, shard: int) -> Any:
        """None where it is not open."""
        return self._files.get(shard)

    def drop(self, shard: int) -> None:
        with self._lock:
            self._files.pop(shard, None)

    def clear(self) -> None:
        with self._lock:
            self._files.clear()


def read_pair(file: int, row: Row, notes: int | None = None) -> tuple[bytes, bytes]:
    """Picture and note, by one read where they are neighbours. `notes`: the file of the note, where it is another.

    Raises:
        OSError: the file is shorter, or the row cannot be one.
    """
    _, image, image_size, note, note_size = row
    start, end = min(image, note), max(image + image_size, note + note_size)
    if image_size > MAX_PICTURE_BYTES or note_size > MAX_JSON_BYTES or end >= 2**63:
        raise OSError(f"its index claims a picture of {image_size} bytes at {image}, a note of {note_size} at {note}")
    if notes is not None:
        return read_exactly(file, image, image_size), read_exactly(notes, note, note_size)
    if end - start - image_size - note_size > _NEIGHBOUR_BYTES:
        return read_exactly(file, image, image_size), read_exactly(file, note, note_size)
    both = read_exactly(file, start, end - start)
    return both[image - start :][:image_size], both[note - start :][:note_size]


def read_exactly(file: int, offset: int, size: int) -> bytes:
    """Raises OSError where the file is shorter."""
    data = os.pread(file, size, offset)
    if len(data) < size:
        raise OSError(f"{size} bytes at {offset} were expected, {len(data)} are there: the shard changed or shrank")
    return data
