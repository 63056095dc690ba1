"""The run's optimizer: built, its rates set before every step (by schedule.py), saved and restored by names.

optimizer = build_optimizer(towers.model, config.optim, peak_lr=config.peak_lr)
set_lr(optimizer, learning_rate(config, samples_seen))
state = optimizer_state(optimizer)                  # into a checkpoint
lines = restore_optimizer(optimizer, towers.model, state)
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from clipscale.config import Optim
from clipscale.errors import require
from clipscale.optim.groups import parameter_groups
from clipscale.optim.kinds import make_optimizer
from clipscale.words import counted


def build_optimizer(model: nn.Module, config: Optim, *, peak_lr: float | None = None) -> torch.optim.Optimizer:
    """Of every parameter that is not locked (`requires_grad=False`), in the groups of groups.py.

    Args:
        peak_lr: the highest rate of the run; None: config.lr.

    Raises:
        UserError: patterns that match no parameter, or a kind or values that cannot be.
    """
    peak_lr = config.lr if peak_lr is None else peak_lr
    optimizer = make_optimizer(parameter_groups(model, config), replace(config, lr=peak_lr, final_lr=0.0))
    for group in optimizer.param_groups:
        if group.get("max_lr_snapshot") is not None:  # a decay that follows lr**2 / max_lr
            group["max_lr_snapshot"] *= group["lr_scale"]
    set_lr(optimizer, peak_lr)
    return optimizer


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Each group's rate: `lr` by the group's scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def loss_scale(scaler: torch.amp.GradScaler, device: torch.device) -> float:
    """What the scaler multiplies gradients by. Asked for in this way, it is ready for its `unscale_` and `step`."""
    return scaler.scale(torch.ones((), device=device)).item() if scaler.is_enabled() else 1.0


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state dict, as a checkpoint can hold it: groups without their types of numbers, which are the config's."""
    state = optimizer.state_dict()
    groups = [
        {key: value for key, value in group.items() if not isinstance(value, torch.dtype)}
        for group in state["param_groups"]
    ]
    return state | {"param_groups": groups}


def restore_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, state: dict[str, Any]) -> list[str]:
    """Load a checkpoint's moments and step counts, each parameter its own by its name, in whatever groups it is now;
    the settings (decay, betas, eps) stay those of the config. What was not learned until now begins without.

    Returns:
        What to tell of it.

    Raises:
        UserError: step counts that parameters shared, and cannot share now.
        ValueError: the state is of other parameters.
    """
    saved = _by_name(state, model)
    mine = optimizer.state_dict()
    restored: dict[str, Any] = {"state": {}, "param_groups": []}
    fresh: list[str] = []
    for group in mine["param_groups"]:
        before = [saved[name][1] for name in group["param_names"] if name in saved]
        new = [name for name in group["param_names"] if name not in saved]
        restored["param_groups"].append(group | _shared(group, before, new))
        for index, name in zip(group["params"], group["param_names"], strict=True):
            slots = saved[name][0] if name in saved else None
            if slots is not None:
                restored["state"][index] = slots
        fresh += new
    optimizer.load_state_dict(restored)
    if not fresh:
        return []
    return [f"optimizer: {counted(len(fresh), 'parameter')} that did not learn before ({fresh[0]}) begin anew"]


_Saved = dict[str, tuple[dict[str, Any] | None, dict[str, Any]]]


def _by_name(state: dict[str, Any], model: nn.Module) -> _Saved:
    """What the state has of each parameter, and the group it was in. Groups of older checkpoints have no names: they
    are the model's matrices, and the rest."""
    named = dict(model.named_parameters())
    older = [[name for name in named if (named[name].squeeze().ndim >= 2) == decays] for decays in (True, False)]
    found: _Saved = {}
    for place, group in enumerate(state["param_groups"]):
        names = group.get("param_names") or (older[place] if place < len(older) else [])
        for index, name in zip(group["params"], names, strict=True):
            found[name] = state["state"].get(index), group
    return found


def _shared(group: dict[str, Any], before: list[dict[str, Any]], new: list[str]) -> dict[str, Any]:
    """What the parameters of a group counted together, as LAMB its steps: numbers that no new group has."""
    counts = [{key: each[key] for key in each.keys() - group.keys() if _is_count(each[key])} for each in before]
    if not any(counts):
        return {}
    alike = all(each.keys() == counts[0].keys() and all(each[key] == counts[0][key] for key in each) for each in counts)
    require(
        alike and not new,
        f"the optimizer counts the {', '.join(counts[0])} of a group's parameters together, and "
        f"{(*new, *group['param_names'])[0]} would join others that have learned for another time; put train.lock "
        "back, or begin a run of its own with these weights (model.init)",
    )
    return counts[0]


def _is_count(value: object) -> bool:
    return isinstance(value, torch.Tensor | int) and not isinstance(value, bool)
