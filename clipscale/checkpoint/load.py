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

from clipscale.checkpoint.snapshot import AVERAGE, VERSION, RunState, Snapshot
from clipscale.config import Config
from clipscale.config.load import config_from_yaml
from clipscale.errors import UserError, require
from clipscale.tell import tell

_OF_THE_SNAPSHOT = ("version", "step", "position")  # in state.json, beside RunState's


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
    average = _read(path, "ema", version) if (path / AVERAGE).is_file() else {}
    return Snapshot(
        step=state.pop("step"),
        position=state.pop("position"),
        model=_read(path, "model", version, mapped=True),
        optimizer=_read(path, "optimizer", version),
        state=_run_state(path, state),
        config=load_config_of(path),
        ema=average,
    )


def load_model(path: Path, *, ema: bool = False) -> dict[str, Any]:
    """A verified checkpoint's weights alone, which lie in their file: to be copied at once.

    Args:
        ema: averaged, as far as they were (those that were trained); `require_average` tells whether there are any.

    Raises:
        UserError: as `load_checkpoint`.
    """
    version = json.loads((path / "state.json").read_text())["version"]
    weights = _read(path, "model", version, mapped=True)
    return weights | _read(path, "ema", version, mapped=True) if ema else weights


def require_average(path: Path) -> None:
    """UserError for a checkpoint without averaged weights."""
    require(
        (path / AVERAGE).is_file(),
        f"checkpoint {path} has no averaged weights: its run had ema.half_life_samples=0; take its weights as they are",
    )


def load_state(path: Path) -> tuple[int, RunState]:
    """A verified checkpoint's step and state, without its tensors."""
    state = json.loads((path / "state.json").read_text())
    step = state["step"]
    return step, _run_state(path, {name: value for name, value in state.items() if name not in _OF_THE_SNAPSHOT})


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


def _read(folder: Path, name: str, version: int, *, mapped: bool = False) -> dict[str, Any]:
    """The tensors of this name. `mapped`: they may lie in their file; the optimizer takes over memory of its own."""
    if version not in (1, VERSION):
        raise UserError(f"checkpoint {folder} has another layout version; this clipscale reads versions 1 to {VERSION}")
    if version == VERSION:
        from clipscale.checkpoint.tree import read_tree

        return read_tree(folder / f"{name}.safetensors", mapped=mapped)
    import torch

    path = folder / f"{name}.pt"
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise UserError(f"{path} holds more than tensors, or is no torch file; use another checkpoint") from error
