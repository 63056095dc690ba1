"""Parameters in groups of one weight decay and one share of the learning rate, by name.

    groups = parameter_groups(model, config.optim)    # [{'params': [(name, parameter), ...], 'weight_decay': 0.2, ...}]

Names are those of the model (visual.*, text.*, logit_scale), and patterns are shell's: `*` is any text, dots too. A
locked parameter (`requires_grad=False`) is in no group.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from clipscale.config import Optim
from clipscale.errors import require
from clipscale.optim.kinds import is_muon
from clipscale.optim.layers import head_of, layers_of

TOWERS = {"image": "visual", "text": "text"}  # a tower's part of the model
_PARTS = {name: f"{part}.*" for name, part in TOWERS.items()}  # words that stand for a pattern


def parameter_groups(model: nn.Module, config: Optim) -> list[dict[str, Any]]:
    """Those that decay first, each in the model's order. Without scales: matrices, then gains, biases and the like.

    `lr_scale` is what a group's rate is multiplied by, `use_fallback` (of Muon) whether AdamW updates it.

    Raises:
        UserError: a pattern that matches no parameter.
    """
    learns = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    kept = matching(model, config.no_decay, "optim.no_decay")
    scales = _scales(model, config)
    fallback = _not_for_muon(model) if is_muon(config.kind) else set()
    groups: dict[tuple[bool, float, bool], list[tuple[str, nn.Parameter]]] = defaultdict(list)
    for decays in (True, False):
        for name, parameter in learns.items():
            if decays == (parameter.squeeze().ndim >= 2 and name not in kept):
                groups[decays, scales[name], name in fallback].append((name, parameter))
    return [
        {"params": params, "weight_decay": config.weight_decay if decays else 0.0, "lr_scale": scale}
        | ({"use_fallback": left_out} if fallback else {})
        for (decays, scale, left_out), params in groups.items()
    ]


def matching(model: nn.Module, patterns: Iterable[str], setting: str) -> set[str]:
    """Names of the parameters that any of the patterns matches.

    Raises:
        UserError: a pattern that matches none.
    """
    names = [name for name, _ in model.named_parameters()]
    found: set[str] = set()
    for pattern in patterns:
        its = {name for name in names if fnmatchcase(name, _PARTS.get(pattern, pattern))}
        require(
            bool(its),
            f"{setting} has {pattern!r}, which matches no parameter of the model; they are named as {names[-1]}, and * "
            "stands for any text (*.bias, visual.*)",
        )
        found |= its
    return found


def _scales(model: nn.Module, config: Optim) -> dict[str, float]:
    scales = {name: 1.0 for name, _ in model.named_parameters()}
    for pattern, scale in config.lr_scales.items():
        for name in matching(model, [pattern], "optim.lr_scales"):
            scales[name] *= scale
    if config.layer_decay is not None:
        for part in TOWERS.values():
            layers = layers_of(model.get_submodule(part))
            for name, layer in layers.items():
                scales[f"{part}.{name}"] *= config.layer_decay ** (max(layers.values()) - layer)
    return scales


def _not_for_muon(model: nn.Module) -> set[str]:
    """Embeddings, of tokens and of places, and projections into the embedding space: no hidden matrices. (What is no
    matrix the optimizer passes over by itself, and convolutions it takes as matrices.)"""
    found = {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, nn.Embedding)}
    for part in TOWERS.values():
        encoder = model.get_submodule(part)
        trunk = f"{part}.trunk" if hasattr(encoder, "trunk") else part
        places = getattr(model.get_submodule(trunk), "no_weight_decay", set)()
        found |= {f"{trunk}.{name}" for name in places} | {f"{part}.{name}" for name in head_of(encoder)}
    return found
