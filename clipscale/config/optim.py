"""The settings of `optim`: the optimizer, its rates and their course. No torch import."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from clipscale.errors import require

OWN_BETAS, OWN_EPS = (0.9, 0.98), 1e-6
"""AdamW's, where the settings leave them out."""


@dataclass(frozen=True)
class Optim:
    """The optimizer, AdamW by default, with warm-up and cosine decay."""

    kind: str = "adamw"  # adamw (fused), sgd (plain, for parity checks), or timm's by name: lamb, lion, muon, ...
    lr: float = 5e-4  # learning rate after the warm-up: the highest
    final_lr: float = 0.0  # learning rate at the end of the cosine
    # Decay of the running means, of the gradient and of its square (three for adan). null: 0.9, 0.98 for adamw, else
    # the kind's own.
    betas: tuple[float, ...] | None = None
    eps: float | None = None  # added to the root of the mean square; null: 1e-6 for adamw, else the kind's own
    momentum: float | None = None  # null: none for sgd, 0.9 for others that have it
    weight_decay: float = 0.2  # of matrices; gains, biases and the logit scale have none
    no_decay: tuple[str, ...] = ()  # patterns of parameters without decay beside those: ["*positional_embedding"]
    layer_decay: float | None = None  # each layer learns by so much less than the one above it, in both towers: 0.75
    # What lr is multiplied by for image, text, logit_scale, or a pattern of parameters; several that apply multiply.
    lr_scales: dict[str, float] = field(default_factory=dict)
    # A tensor's update whose RMS of gradient / root of its mean square is above this is scaled down to it; 1.0 is
    # StableAdamW's. null: never.
    update_clipping: float | None = None
    options: dict[str, Any] = field(default_factory=dict)  # further fields of the kind's constructor, under their names
    warmup_samples: int | None = None  # the learning rate rises over so many; either this or warmup_steps
    warmup_steps: int | None = None  # the same in steps

    def __post_init__(self) -> None:
        if self.kind == "adamw":
            object.__setattr__(self, "betas", OWN_BETAS if self.betas is None else self.betas)
            object.__setattr__(self, "eps", OWN_EPS if self.eps is None else self.eps)
        require(self.lr > 0, f"optim.lr={self.lr} must be above 0")
        require(
            0 <= self.final_lr <= self.lr, f"optim.final_lr={self.final_lr} must lie between 0 and optim.lr={self.lr}"
        )
        betas = self.betas or ()
        require(all(0 <= beta < 1 for beta in betas), f"optim.betas={list(betas)} must lie in [0, 1)")
        require(self.kind != "adamw" or len(betas) == 2, f"optim.betas={list(betas)} must be two, as adamw takes them")
        require(self.eps is None or self.eps > 0, f"optim.eps={self.eps} must be above 0")
        require(self.momentum is None or 0 <= self.momentum < 1, f"optim.momentum={self.momentum} must lie in [0, 1)")
        require(self.weight_decay >= 0, f"optim.weight_decay={self.weight_decay} must not be negative")
        require(
            self.layer_decay is None or 0 < self.layer_decay <= 1,
            f"optim.layer_decay={self.layer_decay} must lie in (0, 1], or be null",
        )
        require(
            self.update_clipping is None or self.update_clipping > 0,
            f"optim.update_clipping={self.update_clipping} must be above 0, or null",
        )
        for name, scale in self.lr_scales.items():
            require(
                scale > 0,
                f"optim.lr_scales has {name}: {scale}, which must be above 0; train.lock keeps parameters as they are",
            )
        require(
            self.warmup_samples is None or self.warmup_steps is None,
            f"optim.warmup_samples={self.warmup_samples} and optim.warmup_steps={self.warmup_steps} say the same "
            "thing twice; set one of them to null",
        )
        for name in ("warmup_samples", "warmup_steps"):
            value = getattr(self, name)
            require(value is None or value >= 0, f"optim.{name}={value} must not be negative")
