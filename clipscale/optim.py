"""AdamW with decay on matrices only; its rate is set before every step, by schedule.py.

optimizer = build_optimizer(towers.model, config.optim)
set_lr(optimizer, learning_rate(config, samples_seen))
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from clipscale.config import Optim


def build_optimizer(model: nn.Module, config: Optim) -> torch.optim.Optimizer:
    """One group with weight decay (matrices), one without (gains, biases, class tokens, the logit scale).

    Locked parameters (`requires_grad=False`) are left out.
    """
    matrices, vectors = [], []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (vectors if parameter.squeeze().ndim < 2 else matrices).append(parameter)
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    if config.kind == "sgd":
        return torch.optim.SGD(groups, lr=config.lr)
    return torch.optim.AdamW(groups, lr=config.lr, betas=tuple(config.betas), eps=config.eps, fused=True)


def loss_scale(scaler: torch.amp.GradScaler, device: torch.device) -> float:
    """What the scaler multiplies gradients by. Asked for in this way, it is ready for its `unscale_` and `step`."""
    return scaler.scale(torch.ones((), device=device)).item() if scaler.is_enabled() else 1.0


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load the moments and step counts of a checkpoint; the settings (decay, betas, eps) stay those of the config."""
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
