"""The settings of `optim`: the optimizer, its rates and their course. No torch import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from clipscale.errors import require


@dataclass(frozen=True)
class Optim:
    """AdamW with warm-up and cosine decay."""

    kind: Literal["adamw", "sgd"] = "adamw"  # sgd (no momentum) is for parity checks
    lr: float = 5e-4  # learning rate after the warm-up: the highest
    final_lr: float = 0.0  # learning rate at the end of the cosine
    betas: tuple[float, float] = (0.9, 0.98)  # decay of AdamW's running means, of the gradient and of its square
    eps: float = 1e-6  # AdamW's, added to the root of the mean square
    weight_decay: float = 0.2  # of matrices; gains, biases and the logit scale have none
    warmup_samples: int | None = None  # the learning rate rises over so many; either this or warmup_steps
    warmup_steps: int | None = None  # the same in steps

    def __post_init__(self) -> None:
        require(self.lr > 0, f"optim.lr={self.lr} must be above 0")
        require(
            0 <= self.final_lr <= self.lr, f"optim.final_lr={self.final_lr} must lie between 0 and optim.lr={self.lr}"
        )
        require(all(0 <= beta < 1 for beta in self.betas), f"optim.betas={list(self.betas)} must lie in [0, 1)")
        require(self.eps > 0, f"optim.eps={self.eps} must be above 0")
        require(self.weight_decay >= 0, f"optim.weight_decay={self.weight_decay} must not be negative")
        require(
            self.warmup_samples is None or self.warmup_steps is None,
            f"optim.warmup_samples={self.warmup_samples} and optim.warmup_steps={self.warmup_steps} say the same "
            "thing twice; set one of them to null",
        )
        for name in ("warmup_samples", "warmup_steps"):
            value = getattr(self, name)
            require(value is None or value >= 0, f"optim.{name}={value} must not be negative")
