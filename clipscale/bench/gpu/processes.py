"""A command within its time: in a session of its own, and ended with all that it started.

ended = run_within(["pytest", "-m", "gpu"], limit_seconds=90, log=Path("tests.log"))
ended.status                             # of the command; None: stopped, it took longer
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from clipscale.bench.common.processes import descendants

_LOOK_SECONDS = 0.05
_DYING_SECONDS = 10  # a process that waits in the driver may outlive even SIGKILL for a while

_PACKAGE_PARENT = Path(__file__).resolve().parents[3]


class Ended(NamedTuple):
    status: int | None
    """The exit status, below 0 the number of the signal that ended it; None: it ran over."""
    seconds: float


def run_within(command: list[str], *, limit_seconds: float, log: Path) -> Ended:
    """Run a command to its end or to the limit; what it prints is appended to `log`.

    Whatever happens, an interruption of this process included, nothing that it started is left when this returns.
    """
    start = time.monotonic()
    with open(log, "ab") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True, env=_environment()
        )
    try:
        while not (over := _is_over(process.pid)) and time.monotonic() < start + limit_seconds:
            time.sleep(_LOOK_SECONDS)
    finally:
        _end(process)
    return Ended(process.returncode if over else None, time.monotonic() - start)


def last_line(log: Path) -> str:
    """The last line with anything in it; empty where there is none."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""


def _environment() -> dict[str, str]:
    """This process's, with this clipscale to be found first, and without what a test around it says of itself."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    path = os.pathsep.join(filter(None, [str(_PACKAGE_PARENT), kept.get("PYTHONPATH", "")]))
    return kept | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def _is_over(pid: int) -> bool:
    """Without collecting its status, so that its number stays its own until `_end` has signalled its group."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None


def _end(process: subprocess.Popen) -> None:
    """Kill its group, and what it started in groups of their own, as torchrun does with its ranks."""
    strayed = descendants(process.pid)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for pid in strayed:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        process.wait(_DYING_SECONDS)
