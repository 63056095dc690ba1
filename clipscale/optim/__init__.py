"""The optimizer: kinds.py (which there are, and what they take), groups.py (parameters with their decay and rates),
build.py (built, stepped at a rate, saved and restored); lock.py (what keeps its weights)."""

from clipscale.optim.build import build_optimizer, loss_scale, optimizer_state, restore_optimizer, set_lr
from clipscale.optim.kinds import check_optimizer
from clipscale.optim.lock import lock_towers

__all__ = [
    "build_optimizer",
    "check_optimizer",
    "lock_towers",
    "loss_scale",
    "optimizer_state",
    "restore_optimizer",
    "set_lr",
]
