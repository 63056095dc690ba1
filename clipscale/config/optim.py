"""The settings of `optim`: the optimizer, its rates and their course. No torch import."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from clipscale.errors import require

OWN_BETAS, OWN_EPS = (0.9, 0.98), 1e-6
"""AdamW's, where the settings leave them out."""


@dataclass(frozen=True)
class Optim:
    """The optimizer, AdamW by default, and the course of its learning rate: warm-up, a schedule, a cool-down."""

    kind: str = "adamw"  # adamw (fused), sgd (plain, for parity checks), or timm's by name: lamb, lion, muon, ...
    lr: float = 5e-4  # learning rate after the warm-up: the highest
    final_lr: float = 0.0  # learning rate at the end of cosine, linear or a cool-down; rsqrt never falls below it
    lr_rule: Literal["none", "linear", "sqrt"] = "none"  # lr, final_lr times train.global_batch / lr_batch, or its root
    lr_batch: int | None = None  # the global batch for which lr and final_lr are meant, where lr_rule is not none
    schedule: Literal["cosine", "constant", "linear", "rsqrt"] = "cosine"  # after the warm-up; rsqrt: 1 / square root
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
    cooldown_samples: int | None = None  # over the last so many it falls to final_lr; this or cooldown_steps
    cooldown_steps: int | None = None  # the same in steps
    cooldown_power: float = 1.0  # of the cool-down's fall: 1 is a line, 2 a parabola that is flat at the end
    timescale_samples: int | None = None  # of rsqrt: lr / sqrt(1 + samples since the warm-up / this)
    timescale_steps: int | None = None  # the same in steps; big_vision's is 10,000

    def __post_init__(self) -> None:
        require(self.lr > 0, f"optim.lr={self.lr} must be above 0")
        require(
            0 <= self.final_lr <= self.lr, f"optim.final_lr={self.final_lr} must lie between 0 and optim.lr={self.lr}"
        )
        betas = self.moments.get("betas", ())
        require(all(0 <= beta < 1 for beta in betas), f"optim.betas={list(betas)} must lie in [0, 1)")
        require(self.kind != "adamw" or len(betas) == 2, f"optim.betas={list(betas)} must be two, as adamw takes them")
        require(self.eps is None or self.eps > 0, f"optim.eps={self.eps} must be above 0")
        require(self.momentum is None or 0 <= self.momentum < 1, f"optim.momentum={self.momentum} must lie in [0, 1)")
        require(self.weight_decay >= 0, f"optim.weight_decay={self.weight_decay} must not be negative")
        self._check_spans()
        require(self.cooldown_power > 0, f"optim.cooldown_power={self.cooldown_power} must be above 0")
        require(self.lr_batch is None or self.lr_batch >= 1, f"optim.lr_batch={self.lr_batch} must be at least 1")
        require(
            self.lr_rule == "none" or self.lr_batch is not None,
            f"optim.lr_rule={self.lr_rule} needs optim.lr_batch, the global batch that optim.lr={self.lr} is for",
        )
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
            self.schedule != "rsqrt" or self.timescale_samples is not None or self.timescale_steps is not None,
            "optim.schedule=rsqrt needs optim.timescale_samples or optim.timescale_steps: the rate falls to 1 / "
            "sqrt(2) of its peak over so many after the warm-up (big_vision: 10,000 steps)",
        )

    @property
    def moments(self) -> dict[str, Any]:
        """`betas` and `eps`, those of them that are not the kind's own to choose; AdamW's always."""
        usual = {"betas": OWN_BETAS, "eps": OWN_EPS} if self.kind == "adamw" else {}
        return usual | {name: value for name in ("betas", "eps") if (value := getattr(self, name)) is not None}

    @property
    def names_parameters(self) -> bool:
        """Whether some of it is by the names or layers of parameters."""
        return bool(self.no_decay or self.lr_scales) or self.layer_decay is not None

    def _check_spans(self) -> None:
        for span, least in (("warmup", 0), ("cooldown", 0), ("timescale", 1)):
            names = [f"{span}_samples", f"{span}_steps"]
            samples, steps = values = [getattr(self, name) for name in names]
            require(
                samples is None or steps is None,
                f"optim.{span}_samples={samples} and optim.{span}_steps={steps} say the same thing twice; set one of "
                "them to null",
            )
            for name, value in zip(names, values, strict=True):
                rule = "must be at least 1" if least else "must not be negative"
                require(value is None or value >= least, f"optim.{name}={value} {rule}")
