"""Reading a checkpoint: its content, or its config alone.

snapshot = load_checkpoint(find_checkpoint("runs/a"))

Nothing is unpickled: tensors come from safetensors files (tree.py), those of version 1 through torch.load with
`weights_only=True`.
"""

from __future__ import annotations

import json
import pickle
from dataclasses import fields
from pathlib import Path
from typing import Any

from clipscale.checkpoint.snapshot import VERSION, RunState, Snapshot
from clipscale.config import Config
from clipscale.config.load import config_from_yaml
from clipscale.errors import UserError
from clipscale.tell import tell


def load_config_of(path: Path) -> Config:
    """The resolved configuration that the checkpoint was written under."""
    return config_from_yaml((path / "config.yaml").read_text())


def load_checkpoint(path: Path) -> Snapshot:
    """A verified checkpoint's content, tensors on the CPU. Tells of what state.json holds and this version cannot keep.

    Raises:
        UserError: written by another layout version, a state.json that lacks something, or tensors that are not plain
            tensors.
    """
    state = json.loads((path / "state.json").read_text())
    version = state.pop("version")
    if version not in (1, VERSION):
        raise UserError(f"checkpoint {path} has another layout version; this clipscale reads versions 1 to {VERSION}")
    model, optimizer = _tensors(path) if version == VERSION else _tensors_of_version_1(path)
    return Snapshot(
        step=state.pop("step"),
        position=state.pop("position"),
        model=model,
        optimizer=optimizer,
        state=_run_state(path, state),
        config=load_config_of(path),
    )


def _run_state(path: Path, found: dict[str, Any]) -> RunState:
    names = {each.name for each in fields(RunState)}
    if missing := sorted(names - {"kernels", "plan", "health"} - found.keys()):
        raise UserError(f"checkpoint {path}: state.json has no {', '.join(missing)}; use another checkpoint")
    if unknown := sorted(found.keys() - names):
        tell(
            f"warning: checkpoint {path}: state.json holds {', '.join(unknown)}, which this clipscale does not know; "
            "its own checkpoints will be without"
        )
    return RunState(**{name: value for name, value in found.items() if name in names})


def _tensors(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The model's, which lie in their file, and the optimizer's, whose memory the optimizer takes over."""
    from clipscale.checkpoint.tree import read_tree

    return read_tree(path / "model.safetensors", mapped=True), read_tree(path / "optimizer.safetensors")


def _tensors_of_version_1(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    import torch

    def load(path: Path) -> dict[str, Any]:
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError) as error:
            raise UserError(f"{path} holds more than tensors, or is no torch file; use another checkpoint") from error

    return load(folder / "model.pt"), load(folder / "optimizer.pt")
