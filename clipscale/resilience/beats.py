"""Where each rank of a run of several is: a small file a rank in `ranks/` of the run's folder, written every few
seconds for the others to read when one of them is missed. No torch import.

    write_beat("runs/a", rank=3, place="step 7, loss", still=0.4)
    read_beats("runs/a")                                      # [Beat(rank=0, ...), Beat(rank=3, ..., age=2.1)]
    lost_ranks("runs/a", 0, ranks=4, timeout_seconds=1800)    # ["rank 3 (node7, process 4711) is gone, last at ..."]
    forget_beat("runs/a", rank=3)                             # it leaves in order
"""

from __future__ import annotations

import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from clipscale.files import write_file

_FOLDER = "ranks"
_SILENT_BEATS = 3  # a rank that has not written for so long is missed


class Beat(NamedTuple):
    """What a rank has written last."""

    rank: int
    host: str
    pid: int
    namespace: str  # in which the pid counts
    place: str  # "step 7, loss"
    still: float  # seconds without progress
    age: float  # seconds since it was written

    @property
    def name(self) -> str:
        return f"rank {self.rank} ({self.host}, process {self.pid})"


def beat_seconds(timeout_seconds: float) -> float:
    """How often a rank writes, where another that waits for it gives up after `timeout_seconds`."""
    return min(5.0, timeout_seconds / 4)


def write_beat(run_dir: str | Path, *, rank: int, place: str, still: float) -> None:
    """OSError: it could not be written."""
    path = _path(run_dir, rank)
    path.parent.mkdir(exist_ok=True)
    host, namespace = _here()
    row = {"host": host, "pid": os.getpid(), "namespace": namespace, "place": place, "still": round(still, 1)}
    write_file(path, json.dumps(row) + "\n", sync=False)


def forget_beat(run_dir: str | Path, *, rank: int) -> None:
    with suppress(OSError):
        _path(run_dir, rank).unlink(missing_ok=True)


def read_beats(run_dir: str | Path, now: float | None = None) -> list[Beat]:
    """Of all ranks that have written, in their order.

    Args:
        now: seconds since the epoch, by the clock of the file system; None: by this machine's.
    """
    beats, now = [], time.time() if now is None else now
    for path in sorted(Path(run_dir, _FOLDER).glob("[0-9]*[0-9]")):
        with suppress(OSError, ValueError, TypeError):  # it leaves, or another version wrote it
            age = max(0.0, now - path.stat().st_mtime)
            beats.append(Beat(rank=int(path.name), **json.loads(path.read_text()), age=age))
    return beats


def lost_ranks(run_dir: str | Path, rank: int, *, ranks: int, timeout_seconds: float) -> list[str]:
    """Which ranks keep this one waiting, as far as can be told, each with how and where it was last.

    A rank that stands still is known by its place, where the others wait: one that waits with this one is at the same.
    """
    every, now = beat_seconds(timeout_seconds), time.time()
    with suppress(OSError):
        own = _path(run_dir, rank).stat().st_mtime
        now = max(own, min(now, own + 2 * every))
    beats = {beat.rank: beat for beat in read_beats(run_dir, now) if beat.rank < ranks}
    waiting, lost, gone = beats.pop(rank, None), [], []
    for beat in beats.values():
        if _is_gone(beat):
            gone.append(f"{beat.name} is gone, last at {beat.place}")
        elif beat.age >= _SILENT_BEATS * every:
            lost.append(f"{beat.name} is silent for {beat.age:.0f} s, last at {beat.place}")
        elif waiting and min(waiting.still, beat.still) >= timeout_seconds / 2 and beat.place != waiting.place:
            lost.append(f"{beat.name} stands still at {beat.place} (its threads: stacks-rank{beat.rank}.txt)")
    return lost or gone  # those that have given up waiting are gone too


def _is_gone(beat: Beat) -> bool:
    """Whether its process has ended; False where that cannot be seen from here."""
    if (beat.host, beat.namespace) != _here() or not beat.namespace:
        return False
    try:
        return Path(f"/proc/{beat.pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def _here() -> tuple[str, str]:
    namespace = ""
    with suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")
    return socket.gethostname(), namespace


def _path(run_dir: str | Path, rank: int) -> Path:
    return Path(run_dir, _FOLDER, f"{rank:05}")
