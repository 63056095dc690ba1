"""AdamW with decay on matrices only, and a schedule that is a pure function of the samples seen.

optimizer = build_optimizer(towers.model, config.optim)
set_lr(optimizer, learning_rate(config, samples_seen))
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from clipscale.config import Config, Optim


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


def learning_rate(config: Config, samples_seen: int) -> float:
    """Linear warm-up, then a cosine to `final_lr`, for the step that begins after `samples_seen` samples.

    In samples, so that it survives a change of the global batch; ranks do not enter at all.
    """
    optim, total, warmup = config.optim, config.train.samples, config.warmup_samples
    if samples_seen < warmup:
        return optim.lr * min(1.0, (samples_seen + config.train.global_batch) / warmup)
    progress = min(1.0, (samples_seen - warmup) / max(1, total - warmup))
    return optim.final_lr + (optim.lr - optim.final_lr) * (1 + math.cos(math.pi * progress)) / 2


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load the moments and step counts of a checkpoint; the settings (decay, betas, eps) stay those of the config."""
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def total_steps(config: Config, samples_seen: int = 0) -> int:
    """Steps still to do after `samples_seen` samples: ceil(rest / global batch)."""
    return max(0, -(-(config.train.samples - samples_seen) // config.train.global_batch))
