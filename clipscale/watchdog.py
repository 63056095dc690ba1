"""A rank that hangs ends, and says where; a rank that is lost is named by the others.

    with Watchdog(config.run, world, parts, step=lambda: 7):
        ...                                                    # opens parts (parts.py) again and again
    not_heard_of("runs/a", world)                              # "rank 3 (node7, process 4711): step 6, loss, 48 s ago"
    raise rank_is_lost(error, "runs/a", world, step=7)

What counts as progress is any part that begins. Each rank of several writes where it is into `ranks/` of the run's
folder every few seconds, for the others to read when one of them is missed.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from clipscale.config import Run
from clipscale.dist import World, peer_words
from clipscale.errors import RESTART, RestartError
from clipscale.faults import record_fault, report_fault
from clipscale.parts import Parts

_LOOK_SECONDS = 0.5
_BEAT_SECONDS = 5.0
_SILENT_SECONDS = 3 * _BEAT_SECONDS  # a rank that has not written for so long is missed


class Watchdog:
    """Looks after the thread that works, from one of its own.

    Args:
        settings: after `watchdog_seconds` without progress this process ends, with the exit status RESTART.
        step: the number of the step that is being made.
    """

    def __init__(self, settings: Run, world: World, parts: Parts, step: Callable[[], int]) -> None:
        self._run_dir, self._seconds = Path(settings.dir), settings.watchdog_seconds
        self._rank, self._ranks = world.rank, world.size
        self._parts, self._step, self._over = parts, step, threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()
        if not any(error):
            with suppress(OSError):
                _beat_of(self._run_dir, self._rank).unlink(missing_ok=True)

    def _watch(self) -> None:
        turns, since, beaten = -1, time.monotonic(), float("-inf")
        while not self._over.wait(_LOOK_SECONDS):
            now = time.monotonic()
            if self._parts.turns != turns:
                turns, since = self._parts.turns, now
            if self._ranks > 1 and now - beaten >= _BEAT_SECONDS:
                beaten = now
                with suppress(OSError):
                    self._beat()
            if 0 < self._seconds <= now - since:
                self._end(now - since)

    def _where(self) -> str:
        return f"step {self._step()}, {self._parts.running}"

    def _beat(self) -> None:
        path = _beat_of(self._run_dir, self._rank)
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"{socket.gethostname()}, process {os.getpid()}): {self._where()}")

    def _end(self, seconds: float) -> None:
        where, stacks = self._where(), self._run_dir / f"stacks-rank{self._rank}.txt"
        what = f"rank {self._rank} hangs: {where}: no progress for {seconds:.0f} s (run.watchdog_seconds)"
        with suppress(OSError), stacks.open("w") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {what}\n")
            faulthandler.dump_traceback(file, all_threads=True)
        faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
        action = f"the process ends, to be started again; what each thread did is in {stacks}"
        report_fault("hang", what, action=action, step=self._step(), lost_seconds=seconds, every_rank=True)
        os._exit(RESTART)


def rank_is_lost(error: Exception, run_dir: str, world: World, *, step: int) -> RestartError:
    """What to raise where `error` says that another rank is gone (dist.lost_peer)."""
    who = not_heard_of(run_dir, world) or "which one is not known"
    what = f"step {step}: another rank is lost: {who} ({peer_words(error)})"
    record_fault("peer", what, action="the run ends, to be started again", step=step, every_rank=True)
    return RestartError(f"{what}; start the run again: it goes on from its newest checkpoint")


def not_heard_of(run_dir: str, world: World) -> str:
    """The other ranks that have gone silent, each with its last word; "" where all are to be heard."""
    now, lost = time.time(), []
    with suppress(OSError):
        own = _beat_of(Path(run_dir), world.rank).stat().st_mtime  # the file system's clock
        now = max(own, min(now, own + 2 * _BEAT_SECONDS))
    for other in range(world.size):
        if other != world.rank:
            path = _beat_of(Path(run_dir), other)
            with suppress(OSError):
                age = now - path.stat().st_mtime
                if age >= _SILENT_SECONDS:
                    lost.append(f"rank {other} ({path.read_text()}, {age:.0f} s ago")
    return "; ".join(lost)


def _beat_of(run_dir: Path, rank: int) -> Path:
    return run_dir / "ranks" / f"{rank:05}"
