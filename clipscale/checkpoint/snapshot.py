"""What a checkpoint holds: tensors, where the run stands, and its config.

Snapshot(step=500, position=2_048_000, model=state_dict, optimizer=state_dict, state=RunState(), config=config)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from clipscale.config import Config

if TYPE_CHECKING:
    import torch

VERSION = 2
FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "config.yaml")  # beside a checkpoint's manifest
AVERAGE = "ema.safetensors"  # one more, of a run that averages its weights
FILES_OF_VERSION_1 = ("model.pt", "optimizer.pt", "state.json", "config.yaml")


@dataclass
class RunState:
    """What a run keeps beside its tensors, as JSON can hold it. The names are those of state.json.

    A new one is that of a run which has not begun.
    """

    order: dict[str, Any] | None = None  # what a position means (Pipeline.identity); None: not laid out yet
    skips: dict[str, int] = field(default_factory=dict)  # masked samples by source and cause
    scaler: dict[str, Any] = field(default_factory=dict)  # of the loss scale; empty unless in fp16
    last_row: dict[str, Any] = field(default_factory=dict)  # of metrics
    kernels: dict[str, list] = field(default_factory=dict)  # the loss kernels' tuned shapes; oldest checkpoints: none
    plan: dict[str, Any] | None = None  # the plan of its steps (step/planning.py); older checkpoints: none
    health: dict[str, Any] = field(default_factory=dict)  # bad steps in a row (guard/); older checkpoints: none


@dataclass
class Snapshot:
    """A run after `step` steps, on the CPU or not."""

    step: int
    position: int  # samples consumed: where the next batch begins
    model: dict[str, torch.Tensor]  # once loaded: lies in its file, so to be copied at once (load_state_dict)
    optimizer: dict[str, Any]
    state: RunState
    config: Config
    ema: dict[str, torch.Tensor] = field(default_factory=dict)  # averaged weights (training/ema.py); empty: none

    @property
    def trees(self) -> dict[str, dict[str, Any]]:
        """What it holds in tensors, by the names of their files."""
        return {"model": self.model, "optimizer": self.optimizer} | ({"ema": self.ema} if self.ema else {})
