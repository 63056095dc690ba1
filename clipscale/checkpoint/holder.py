"""Who holds a run's folder: a lock that names its holder, or a heartbeat where the file system has no locks.

    hold = take_folder(Path("runs/a"))        # HeldError: 'process 4711 on n1 (job 88), since 2026-11-27 11:20:18'
    hold.close()

The system lets go of a lock when its process ends, however it does. A heartbeat is a number that a thread raises every
second in `.heartbeat`; whoever finds one waits until it moves, and takes the folder once it has stood still for so long
that its writer must be gone. No clock of another host is asked.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from clipscale.errors import reason
from clipscale.files import is_locked, lock_file, write_file
from clipscale.launch import launched_by
from clipscale.telemetry.faults import report_fault
from clipscale.tell import tell

LOCK, HEARTBEAT = ".lock", ".heartbeat"
BEAT_SECONDS, STILL_SECONDS = 1.0, 15.0
"""A heart beats so often; one that has not for so long belongs to a process that is gone."""


class HeldError(Exception):
    """Another process holds the folder; the text says which."""


def take_folder(folder: Path) -> Lock | Heartbeat:
    """Hold a folder until `close`, or the end of this process. Tells where the file system has no locks.

    Raises:
        HeldError: another process holds it.
        OSError: the file cannot be made.
    """
    file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        held = lock_file(file, folder / LOCK)
    except OSError as error:
        os.close(file)
        tell(
            f"warning: run.dir={str(folder)!r}: its file system has no locks ({reason(error)}); a file that is written "
            f"every second keeps others out ({HEARTBEAT})"
        )
        return Heartbeat(folder / HEARTBEAT)
    if held:
        return Lock(file)
    try:
        raise HeldError(_words(os.pread(file, 4096, 0)))
    finally:
        os.close(file)


def look_at_holder(folder: Path) -> None:
    """HeldError where another process holds the folder; nothing is made or written. For a first look: it may be taken
    in the next moment, and a heartbeat that stands still is not waited for."""
    seen = _read(folder / HEARTBEAT)
    if seen is not None:
        _wait_until_gone(folder / HEARTBEAT, seen, 3 * BEAT_SECONDS)
    if is_locked(folder / LOCK):
        raise HeldError(_words(_read(folder / LOCK) or b""))


class Lock:
    """The open file whose lock is held; it names this process."""

    def __init__(self, file: int) -> None:
        self._file = file
        with suppress(OSError):  # a full disk: the lock holds without the name
            os.ftruncate(file, 0)
            os.pwrite(file, json.dumps(_this_process()).encode() + b"\n", 0)
            os.fsync(file)

    def close(self) -> None:
        os.close(self._file)


class Heartbeat:
    """A file that a thread of this process writes again and again."""

    def __init__(self, path: Path) -> None:
        self._path, self._mine = path, _this_process() | {"token": uuid.uuid4().hex}
        self._beats, self._end = 0, threading.Event()
        if (seen := _read(path)) is not None:
            _wait_until_gone(path, seen, STILL_SECONDS)
        self._beat()
        if seen is not None:
            time.sleep(BEAT_SECONDS)  # two may have found the same one gone: the last to write has it
            self._require_mine()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._end.set()
        self._thread.join()
        if self._is_mine():
            self._path.unlink(missing_ok=True)

    def _run(self) -> None:
        while not self._end.wait(BEAT_SECONDS):
            if not self._is_mine():
                what = f"another process has taken {self._path.parent}: {_words(_read(self._path) or b'')}"
                report_fault("lock", what, action="end one of the two: both write there")
                return
            with suppress(OSError):  # a full disk, a server that is away: the next may come through
                self._beat()

    def _beat(self) -> None:
        self._beats += 1
        write_file(self._path, json.dumps(self._mine | {"beat": self._beats}) + "\n", sync=False)

    def _is_mine(self) -> bool:
        """Whether the file is not another's."""
        found = _parsed(_read(self._path) or b"")
        return found.get("token", self._mine["token"]) == self._mine["token"]

    def _require_mine(self) -> None:
        if not self._is_mine():
            raise HeldError(_words(_read(self._path) or b""))


def _wait_until_gone(path: Path, seen: bytes, seconds: float) -> None:
    """Return once the file has not moved for so long, or is gone. HeldError: it moves."""
    begin = time.monotonic()
    while time.monotonic() - begin < seconds:
        time.sleep(BEAT_SECONDS / 4)
        now = _read(path)
        if now is None:
            return
        if now != seen:
            raise HeldError(_words(now))


def _this_process() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "job": launched_by()[0],
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _read(path: Path) -> bytes | None:
    with suppress(OSError):
        return path.read_bytes()
    return None


def _parsed(content: bytes) -> dict[str, Any]:
    with suppress(ValueError):
        found = json.loads(content)
        return found if isinstance(found, dict) else {}
    return {}


def _words(content: bytes) -> str:
    """'process 4711 on n1 (job 88), since 2026-11-27 11:20:18'; of one that has not said so yet, less."""
    holder = _parsed(content)
    if "pid" not in holder:
        return "an unnamed process"
    job = f" (job {holder['job']})" if holder.get("job") else ""
    return f"process {holder['pid']} on {holder.get('host')}{job}, since {holder.get('since')}"
