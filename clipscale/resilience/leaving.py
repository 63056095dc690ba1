"""When a run is told to leave: by a signal, or by a time limit that comes near.

    leaving = Leaving(before_seconds=120)
    with leaving.starting("runs/a"):           # a signal ends it at once: there is nothing to save
        ...
        with leaving.training():               # SIGTERM, SIGUSR1, SIGHUP and Ctrl-C only set a flag now
            leaving.why(step_seconds=30.0)     # "" | "SIGUSR1" | "the time limit"
    mark("runs/a", step=500, why="SIGUSR1")    # interrupted.json: what a batch script goes by

Slurm and torchrun send a signal twice: another one counts from two seconds after the first on, and then it ends the
process at once, as it would have without this.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from clipscale.errors import Interrupted
from clipscale.files import write_file
from clipscale.launch import launched, launched_by

SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP}
TIME_LIMIT = "the time limit"
MARKER = "interrupted.json"
PLACE = "CLIPSCALE_MARKER"  # where a batch script wants to be told too: it knows no run's folder
_AGAIN_SECONDS = 2.0
_SLACK = 2.0  # steps and saves may take so much longer than the last did


class Leaving:
    """One process's. Signals reach Python in its main thread only: elsewhere nothing is listened for.

    Args:
        before_seconds: how long before the end of the job's time at the latest; 0: its end is not looked for.
    """

    def __init__(self, before_seconds: float) -> None:
        self._before, self._end = before_seconds, float("inf")
        self._signal, self._since = "", 0.0
        if before_seconds > 0 and "SLURM_JOB_ID" in os.environ:
            threading.Thread(target=self._find_end, name="time limit", daemon=True).start()

    @contextmanager
    def starting(self, run_dir: str) -> Iterator[None]:
        """A signal raises `Interrupted` where it finds the program, and is marked; Ctrl-C stays what it is."""
        try:
            with _handled(self._end_at_once, SIGNALS - {signal.SIGINT}):
                yield
        except Interrupted as stop:
            if not stop.left and launched().rank == 0:
                mark(run_dir, step=None, why=stop.why)
            raise

    @contextmanager
    def training(self) -> Iterator[None]:
        """A signal is only taken down."""
        with _handled(self._take_down, SIGNALS):
            yield

    def why(self, *, step_seconds: float) -> str:
        """Why the run is to leave after the step that it is in; "" if it is not.

        Args:
            step_seconds: what a step with its checkpoint took.
        """
        if not self._signal and time.time() + max(self._before, _SLACK * step_seconds) >= self._end:
            return TIME_LIMIT
        return self._signal

    def _end_at_once(self, number: int, frame: FrameType | None) -> None:
        if self._is_first(number):
            raise Interrupted(self._signal)

    def _take_down(self, number: int, frame: FrameType | None) -> None:
        self._is_first(number)

    def _is_first(self, number: int) -> bool:
        """Takes down the first signal. One that comes late behind it ends the process."""
        now = time.monotonic()
        if not self._signal:
            self._signal, self._since = signal.Signals(number).name, now
            return True
        if now - self._since >= _AGAIN_SECONDS:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        return False

    def _find_end(self) -> None:
        self._end = job_end()


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], None], numbers: set[signal.Signals]) -> Iterator[None]:
    """What is ignored already (by nohup, or in a shell's background) stays so."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in numbers:
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, other in before.items():
            signal.signal(number, other)


def mark(run_dir: str, *, step: int | None, why: str) -> None:
    """Write interrupted.json: the run has left by itself, and goes on when it is started again.

    A batch script is told only of a step that is saved: before one, the signal may be a launcher's, because another
    rank has failed, and a job that cannot start must not come back for ever.
    """
    job, restart = launched_by()
    os.makedirs(run_dir, exist_ok=True)
    row = {"job": job, "restart": restart, "step": step, "why": why, "time": round(time.time(), 3)}
    write_file(os.path.join(run_dir, MARKER), json.dumps(row) + "\n")
    if step is not None and (place := os.environ.get(PLACE)):
        write_file(place, f"{why}: left after step {step}\n")


def unmark(run_dir: str) -> None:
    """The run goes on."""
    with suppress(FileNotFoundError):
        os.unlink(os.path.join(run_dir, MARKER))


def job_end() -> float:
    """When this Slurm job's time is over, in seconds since the epoch; infinity where nobody says."""
    if told := os.environ.get("SLURM_JOB_END_TIME"):
        return float(told) if told.isdigit() else float("inf")
    words = ["scontrol", "--oneliner", "show", "job", os.environ["SLURM_JOB_ID"]]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return float("inf")
    found = re.search(r"\bEndTime=(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)", done.stdout)
    return time.mktime(time.strptime(found[1], "%Y-%m-%dT%H:%M:%S")) if found else float("inf")
