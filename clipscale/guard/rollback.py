"""Back to the last good checkpoint, past the data that broke the run: `train.on_divergence=rollback`.

    go_back(error, config, world, saver, position=1040)   # on every rank, of a Diverged; then a new Trainer goes on
    passed_over("runs/a", step=100, position=800)         # 1040: where it does, from the checkpoint of step 100

A row of rollbacks.jsonl is `{"step": 100, "from": 800, "to": 1040, ...}`: after that step the run goes from one
position to the other. Whoever goes on from that checkpoint goes the same way, so that a run with a rollback in it is as
repeatable as any.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clipscale.checkpoint.find import candidates, is_whole
from clipscale.checkpoint.retention import set_aside
from clipscale.config import Config
from clipscale.dist import World
from clipscale.errors import UserError
from clipscale.files import append_rows, keep_rows, read_rows
from clipscale.guard.divergence import Diverged
from clipscale.telemetry.faults import record_fault, report_fault
from clipscale.words import counted

FILE = "rollbacks.jsonl"


def passed_over(run_dir: str, step: int, position: int) -> int:
    """The position at which a run goes on whose checkpoint of `step` stands at `position`."""
    for row in read_rows(Path(run_dir, FILE)):
        if (row["step"], row["from"]) == (step, position):
            position = row["to"]
    return position


def keep_rollbacks(run_dir: str, step: int) -> None:
    """The run goes on after `step` steps: drop the rows of later ones, which will be done again another way."""
    keep_rows(Path(run_dir, FILE), lambda row: row["step"] <= step)


def go_back(error: Diverged, config: Config, world: World, settle: Callable[[], None], *, position: int) -> None:
    """Make the run go on from its last good checkpoint and from `position`; collective.

    Args:
        settle: waits for a checkpoint that is being written.
        position: where the run has got to; what lies before it is not read again.

    Raises:
        Diverged: as it was, where `train.on_divergence` says so.
        SharedError: there is no checkpoint to go back to, or the run has gone back `train.max_rollbacks` times.
    """
    if config.train.on_divergence != "rollback":
        record_fault(error.kind, error.what, action="the run ends", step=error.step)
        raise error

    def lead() -> dict[str, Any]:
        settle()
        return _roll_back(config, error, position)

    row = world.lead(lead)
    report_fault(
        error.kind,
        error.what,
        action=f"back to the checkpoint of step {row['step']}; {counted(row['to'] - row['from'], 'sample')} from "
        f"position {row['from']} to {row['to']} are passed over (train.on_divergence=rollback)",
        step=error.step,
        lost_steps=error.step - row["step"],
    )


def _roll_back(config: Config, error: Diverged, position: int) -> dict[str, Any]:
    """Main rank: choose the newest checkpoint that no bad step came right before, write down which data are passed
    over, and put later checkpoints aside. Returns the row."""
    run_dir, most = config.run.dir, config.train.max_rollbacks
    done = sum(1 for _ in read_rows(Path(run_dir, FILE)))
    if done >= most:
        raise UserError(f"{error}; the run has gone back {done} times already (train.max_rollbacks={most})")
    whole = (path for _, path in candidates(Path(run_dir, "checkpoints")) if is_whole(path))
    states = [json.loads((path / "state.json").read_text()) for path in whole]
    if not states:
        raise UserError(f"{error}; there is no checkpoint yet to go back to (train.on_divergence=rollback)")
    state = next(filter(_is_calm, states), states[0])
    start = passed_over(run_dir, state["step"], state["position"])
    row = {"step": state["step"], "from": start, "to": position, "time": round(time.time(), 3), "why": error.what}
    append_rows(Path(run_dir, FILE), [row], sync=True)
    set_aside(run_dir, state["step"])
    return row


def _is_calm(state: dict[str, Any]) -> bool:
    """The step before it was neither skipped nor showed collapse."""
    health = state.get("health", {})
    return not health.get("nonfinite_in_a_row") and not health.get("collapsed_in_a_row")
