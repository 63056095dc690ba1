"""A run's curves for Weights & Biases (`pip install 'clipscale[wandb]'`): a board beside TensorBoard's.

    board = open_wandb(config.wandb, "runs/a", anew=False)      # None: it cannot be reached, which is told
    board.describe(settings, text, scores)
    board.add({"train/loss": 5.5}, step=1)

A run of W&B's is a run of ours: who starts it again goes on with it, by the id in <run.dir>/wandb.json; a run that went
back to an earlier checkpoint is another one of the same group. Nothing that W&B does ends a training, or holds it up
for longer than a minute.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clipscale.config import Wandb
from clipscale.errors import reason
from clipscale.files import write_file
from clipscale.telemetry.faults import report_fault

RECORD = "wandb.json"
CONFIG_TEXT = "clipscale.yaml"  # config.yaml is W&B's own
_SECONDS = 60  # that it may take to begin, and to end


def open_wandb(settings: Wandb, run_dir: str, *, anew: bool) -> WandbBoard | None:
    """
    Args:
        anew: the run has gone back, and its later curves stay those of another.
    """
    import wandb

    record = _record(Path(run_dir, RECORD), anew)
    try:
        run = wandb.init(
            **record,
            project=settings.project,
            entity=settings.entity,
            name=settings.name or Path(run_dir).resolve().name,
            mode=settings.mode,
            dir=run_dir,
            resume="allow",
            settings=wandb.Settings(
                console="off", silent=True, save_code=False, init_timeout=_SECONDS, finish_timeout=_SECONDS
            ),
        )
        run.define_metric("*", step_metric="step")
    except Exception as error:  # whatever it is: a curve is worth no run
        _tell(error)
        return None
    return WandbBoard(run)


def _record(path: Path, anew: bool) -> dict[str, str]:
    """The run's id and group at W&B, kept beside its metrics."""
    before = json.loads(path.read_text()) if path.exists() else {}
    if before and not anew:
        return before
    made = uuid.uuid4().hex[:8]
    record = {"id": made, "group": before.get("group", made)}
    write_file(path, json.dumps(record) + "\n")
    return record


class WandbBoard:
    def __init__(self, run: Any) -> None:
        self._run = run

    def describe(self, settings: dict[str, Any], text: str, scores: list[str]) -> None:
        """Every setting, flat, and the config as text. W&B needs no list of scores."""
        del scores
        self._try(lambda: self._describe(settings, text))

    def add(self, scalars: dict[str, float], step: int) -> None:
        """One point of each curve."""
        self._try(lambda: self._run.log(scalars | {"step": step}))

    def close(self) -> None:
        self._try(lambda: self._run.finish())

    def _describe(self, settings: dict[str, Any], text: str) -> None:
        self._run.config.update(settings, allow_val_change=True)
        Path(self._run.dir, CONFIG_TEXT).write_text(text)

    def _try(self, act: Callable[[], object]) -> None:
        if self._run is None:
            return
        try:
            act()
        except Exception as error:  # as above
            self._run = None
            _tell(error)


def _tell(error: Exception) -> None:
    report_fault(
        "telemetry",
        f"Weights & Biases: {reason(error)}",
        action="the run goes on without it; metrics.jsonl and TensorBoard have everything",
    )
