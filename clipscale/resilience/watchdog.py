"""A rank that hangs ends, and says where; a rank that is lost is named by the others.

    with Watchdog(config.run, world, parts, step=lambda: 7):
        ...                                                    # opens parts (telemetry/parts.py) again and again
    raise rank_is_lost(error, config.run, world, step=7)       # with what the others have written (beats.py)

What counts as progress is any part that begins. A hang may be anywhere: in the file system that the run's folder lies
on, in a lock of the log, or in code that never lets another thread of Python run. So nothing here waits for a file, and
behind the thread that looks stands faulthandler's, which needs no Python (it ends the process with status 1).
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from clipscale.config import Run
from clipscale.dist import World, peer_words
from clipscale.errors import RESTART, RestartError
from clipscale.resilience.beats import beat_seconds, forget_beat, lost_ranks, write_beat
from clipscale.telemetry.faults import record_fault, report_fault
from clipscale.telemetry.parts import Parts

_LOOK_SECONDS = 0.5
_TELL_SECONDS = 10.0  # for what is written when a process ends
_GRACE_SECONDS = 60.0  # without a look, beyond which faulthandler ends the process
_MOST_SECONDS = 1e8  # that faulthandler can wait
_EARLY = 0.8  # of what the others wait for a rank: time enough to write what it does before they have it ended
_GONE_SECONDS = 2.0  # a process that was killed has closed its sockets before it is seen to have ended


class Watchdog:
    """Looks after the thread that works, from one of its own.

    Args:
        settings: after `watchdog_seconds` without progress this process ends, with the exit status RESTART.
        step: the number of the step that is being made.
    """

    def __init__(self, settings: Run, world: World, parts: Parts, step: Callable[[], int]) -> None:
        self._settings, self._rank, self._parts, self._step = settings, world.rank, parts, step
        self._stacks = Path(settings.dir, f"stacks-rank{world.rank}.txt")
        self._since, self._over = time.monotonic(), threading.Event()
        works = [self._look, self._beat] if world.size > 1 else [self._look]
        self._early = _EARLY * settings.timeout_seconds if world.size > 1 else float("inf")
        self._threads = [threading.Thread(target=work, name="watchdog", daemon=True) for work in works]

    def __enter__(self) -> Watchdog:
        self._wind()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(_TELL_SECONDS)
        faulthandler.cancel_dump_traceback_later()
        if not any(error):
            forget_beat(self._settings.dir, rank=self._rank)

    def _look(self) -> None:
        most, turns, early = self._settings.watchdog_seconds, -1, False
        while most > 0 and not self._over.wait(_LOOK_SECONDS):
            self._wind()
            if self._parts.turns != turns:
                turns, self._since, early = self._parts.turns, time.monotonic(), False
            still = self._still()
            if still >= most:
                self._end(still)
            if still >= self._early and not early:
                early = True
                _within(_TELL_SECONDS, partial(self._write_stacks, self._words(still)))

    def _wind(self) -> None:
        """Put off the end that needs no Python."""
        if (most := self._settings.watchdog_seconds) > 0:
            faulthandler.dump_traceback_later(min(most + _GRACE_SECONDS, _MOST_SECONDS), exit=True, file=2)

    def _beat(self) -> None:
        every = beat_seconds(self._settings.timeout_seconds)
        while True:
            with suppress(OSError):
                write_beat(self._settings.dir, rank=self._rank, place=self._place(), still=self._still())
            if self._over.wait(every):
                return

    def _still(self) -> float:
        return time.monotonic() - self._since

    def _place(self) -> str:
        return f"step {self._step()}, {self._parts.running}"

    def _words(self, seconds: float) -> str:
        return f"rank {self._rank} hangs: {self._place()}: no progress for {seconds:.0f} s"

    def _write_stacks(self, what: str) -> None:
        with suppress(OSError), self._stacks.open("w") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {what}\n")
            faulthandler.dump_traceback(file, all_threads=True)

    def _end(self, seconds: float) -> None:
        what = f"{self._words(seconds)} (run.watchdog_seconds)"
        action = f"the process ends, to be started again; what each thread did is in {self._stacks}"

        def tell() -> None:
            self._write_stacks(what)
            report_fault("hang", what, action=action, step=self._step(), lost_seconds=seconds, every_rank=True)

        _within(_TELL_SECONDS, lambda: faulthandler.dump_traceback(2, all_threads=True))
        if not _within(_TELL_SECONDS, tell):
            line = f"clipscale: warning: {what}, and {self._settings.dir} cannot be written; the process ends"
            _within(_TELL_SECONDS, lambda: print(line, file=sys.__stderr__, flush=True))
        os._exit(RESTART)


def _within(seconds: float, work: Callable[[], object]) -> bool:
    """Whether `work` is done in time; it may go on in a thread of its own."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()


def rank_is_lost(error: Exception, settings: Run, world: World, *, step: int) -> RestartError:
    """What to raise where `error` says that another rank is gone (dist.lost_peer)."""
    lost, give_up = [], time.monotonic() + _GONE_SECONDS
    while not lost and time.monotonic() < give_up:
        time.sleep(_GONE_SECONDS / 10)
        lost = lost_ranks(settings.dir, world.rank, ranks=world.size, timeout_seconds=settings.timeout_seconds)
    who = "; ".join(lost) or "which one is not known"
    what = f"step {step}: another rank is lost: {who} ({peer_words(error)})"
    record_fault("peer", what, action="the run ends, to be started again", step=step, every_rank=True)
    return RestartError(f"{what}; start the run again: it goes on from its newest checkpoint")
