"""A file that grows by whole pieces, and outlives a full disk.

    log = GrowingFile("runs/a/run.log")
    log.add(b"step 1/400 ...\\n")              # never raises OSError: what does not fit is kept and written later

A piece is there as a whole or not at all, and the fault is told once: kind "disk", or "telemetry" for another cause.
"""

from __future__ import annotations

import errno
import os
import threading
from collections import deque
from pathlib import Path

from clipscale.errors import reason
from clipscale.telemetry.faults import report_fault
from clipscale.tell import tell
from clipscale.words import counted

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system calls a disk, a quota or a file size that is at its limit."""
_MOST_WAITING = 10_000


class GrowingFile:
    """Opened anew for each piece: several processes may write to one file. Of one process, any thread may add.

    Args:
        lines: pieces are lines; where a file begins with one that a crash cut short, the first piece does not join it.
    """

    def __init__(self, path: str | os.PathLike, *, lines: bool = False) -> None:
        self._path, self._lock = Path(path), threading.RLock()  # what is told of a fault may come back as a piece
        self._waiting: deque[bytes] = deque()
        self._new_line = lines
        self._failing, self._lost = False, 0

    def add(self, piece: bytes) -> None:
        """Write the piece behind those that still wait."""
        with self._lock:
            if len(self._waiting) >= _MOST_WAITING:
                self._write()
            if len(self._waiting) < _MOST_WAITING:
                self._waiting.append(piece)
                self._write()
            else:
                self._lost += 1

    def close(self) -> None:
        """A last try for what still waits; tells how much of it is lost."""
        with self._lock:
            if self._waiting:
                self._write()
            if missing := len(self._waiting) + self._lost:
                self._waiting.clear()
                tell(f"warning: {self._path} lacks its last {counted(missing, 'entry', 'entries')}")

    def _write(self) -> None:
        try:
            while self._waiting:
                torn = self._new_line and _ends_torn(self._path)
                append_whole(self._path, b"\n" * torn + self._waiting[0])
                self._waiting.popleft()
                self._new_line = False
        except OSError as error:
            if not self._failing:
                self._failing = True
                kind = "disk" if error.errno in FULL else "telemetry"
                what = f"{self._path} cannot be written: {error.strerror or reason(error)}"
                report_fault(kind, what, action="the run goes on, what belongs there waits for room", every_rank=True)
            return
        if self._failing:
            self._failing, lost, self._lost = False, self._lost, 0
            tell(f"{self._path} is written again" + (f", {counted(lost, 'entry', 'entries')} lost" if lost else ""))


def append_whole(path: Path, piece: bytes) -> None:
    """Write `piece` at the file's end; where that fails, the part of it that came through is cut off again.

    Raises:
        OSError: it could not be written.
    """
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        before, done = os.fstat(file).st_size, 0
        try:
            while done < len(piece):
                done += os.write(file, piece[done:])
        except OSError:
            if done and os.fstat(file).st_size == before + done:  # nobody else has written meanwhile
                os.ftruncate(file, before)
            raise
    finally:
        os.close(file)


def _ends_torn(path: Path) -> bool:
    """Whether the file's last line has no end."""
    try:
        with open(path, "rb") as file:
            return file.seek(0, os.SEEK_END) > 0 and file.seek(-1, os.SEEK_END) >= 0 and file.read() != b"\n"
    except FileNotFoundError:
        return False
