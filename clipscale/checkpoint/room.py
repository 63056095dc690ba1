"""Room on the disk for checkpoints: asked for before the first step, and what is missing in words afterwards.

require_room("runs/a", 1_812_000_000, step=0, keep=2, saves=7)   # UserError where the next ones cannot fit
why_unwritten(error, 1_812_000_000)                          # 'No space left on device (...); 1.81GB needed'
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from clipscale.checkpoint.find import candidates
from clipscale.errors import reason, require
from clipscale.telemetry.growing import FULL
from clipscale.words import counted, short


def require_room(run_dir: str, nbytes: int, *, step: int, keep: int, saves: int, best: bool = False) -> None:
    """Raise UserError unless the disk has room for what the run's next saves add to it.

    A new checkpoint is written before the oldest one goes, so `keep` + 1 of them stand there for a moment.

    Args:
        nbytes: of one checkpoint.
        step: the run's last one; checkpoints of later steps do not count among those that go.
        saves: how many are still to come.
        best: the best one stays too.
    """
    there = sum(found <= step for found, _ in candidates(Path(run_dir, "checkpoints")))
    more = min(saves, max(1, keep + 1 + best - there))
    free = free_bytes(run_dir) + _left_over(run_dir)
    require(
        more * nbytes <= free,
        f"run.dir={run_dir!r}: {counted(more, 'checkpoint')} of {short(nbytes)}B will come to the {there} there "
        f"(checkpoint.keep={keep}{', the best one' if best else ''}, and one more while it is written): "
        f"{short(more * nbytes)}B needed "
        f"({more * nbytes:,} bytes), {short(free)}B free ({free:,} bytes); make room, lower checkpoint.keep, or set "
        "another run.dir",
    )


def why_unwritten(error: OSError, nbytes: int) -> str:
    """What kept a checkpoint of so many bytes from being written, in words; `error` is what the system said."""
    said = f"{error.strerror or reason(error)}" + (f" ({error.filename})" if error.filename else "")
    return f"{said}; {short(nbytes)}B ({nbytes:,} bytes) needed" if error.errno in FULL else said


def free_bytes(run_dir: str) -> int:
    """On the disk where `run_dir` is, or will be."""
    path = Path(run_dir).absolute()
    return shutil.disk_usage(next(place for place in (path, *path.parents) if os.path.exists(place))).free


def _left_over(run_dir: str) -> int:
    """Bytes of saves that were cut short: the next save clears them away."""
    files = Path(run_dir, "checkpoints").glob("step-*.tmp-*/*")
    return sum(file.stat().st_size for file in files if file.is_file())
