"""What went wrong in a run and what was done about it: told, and kept as a row by whoever records.

    with recording(rows.append):
        report_fault("evaluation", "zeroshot failed: a.tar: No such file", step=500, action="the row is left out")

`RunLog` records into the run's faults.jsonl. Where nobody records, the line alone is told: in the loader's process,
whose faults reach the training process as masked samples (training/feed.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from clipscale.tell import tell

Recorder = Callable[[dict[str, Any]], None]
_RECORDERS: list[tuple[Recorder, bool]] = []  # with whether it leaves to rank 0 what every rank finds out alike


def report_fault(
    kind: str,
    what: str,
    *,
    action: str,
    step: int | None = None,
    lost_steps: int = 0,
    lost_seconds: float = 0.0,
    every_rank: bool = False,
) -> None:
    """Tell of a fault in one line, and give its row to the innermost recorder.

    Args:
        kind: one word for faults of this kind, as docs/reliability.md lists them.
        what: what happened, with the names (rank, path, parameter) that a person needs.
        action: what was done, or is done next.
        lost_steps: optimizer steps that do not count, or must be done again.
        lost_seconds: time of the run that went into it.
        every_rank: other ranks than the first tell it too (tell.py), and have a row of their own.
    """
    tell(f"warning: {what}; {action}", every_rank=every_rank)
    record_fault(
        kind,
        what,
        action=action,
        step=step,
        lost_steps=lost_steps,
        lost_seconds=lost_seconds,
        every_rank=every_rank,
    )


def record_fault(
    kind: str,
    what: str,
    *,
    action: str,
    step: int | None = None,
    lost_steps: int = 0,
    lost_seconds: float = 0.0,
    every_rank: bool = False,
) -> None:
    """The row alone, of a fault that has been told already. Arguments as above."""
    if not _RECORDERS:
        return
    recorder, is_other_rank = _RECORDERS[-1]
    if every_rank or not is_other_rank:
        recorder(
            {
                "kind": kind,
                "step": step,
                "what": what,
                "action": action,
                "lost_steps": lost_steps,
                "lost_seconds": round(lost_seconds, 3),
            }
        )


@contextmanager
def recording(recorder: Recorder, *, is_other_rank: bool = False) -> Iterator[None]:
    """Rows of faults reported meanwhile go to `recorder` alone; on another rank than 0 only those that are for every
    rank to tell, since rank 0 records the others."""
    entry = recorder, is_other_rank
    _RECORDERS.append(entry)
    try:
        yield
    finally:
        _RECORDERS.remove(entry)
