"""Parts of the towers that keep their weights: locked as open_clip locks them, before the optimizer is built.

    lines = lock_towers(towers, config.train.lock)        # what to tell of it

A tower, or a backbone within it, in which nothing learns runs in eval mode whatever is asked of the model (LiT, Zhai et
al., arXiv 2111.07991): its dropout, patch dropout and drop path would only blur what it is there to say. A tower in
which nothing learns has no second pass (step/gradcache.py).
"""

from __future__ import annotations

import contextlib
import io
from functools import cache

from open_clip.hf_model import HFTextEncoder
from open_clip.timm_model import TimmModel
from torch import nn

from clipscale.config import Lock
from clipscale.errors import require
from clipscale.optim.groups import TOWERS, matching
from clipscale.optim.layers import layers_of
from clipscale.towers import Towers, learns
from clipscale.words import short


def lock_towers(towers: Towers, config: Lock) -> list[str]:
    """Set `requires_grad` of what `config` locks; a line a tower.

    Raises:
        UserError: a pattern that matches no parameter, more layers than there are, or nothing left to learn.
    """
    if config == Lock():
        return []
    model = towers.model
    for tower, part in TOWERS.items():
        if getattr(config, tower):
            _lock(model.get_submodule(part), tower, getattr(config, f"{tower}_groups"))
    opened = _learning_in_locked(model, config)
    closed = matching(model, config.patterns, "train.lock.patterns")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_((parameter.requires_grad or name in opened) and name not in closed)
    require(
        any(parameter.requires_grad for parameter in towers.encoder_parameters()),
        "train.lock leaves neither tower anything to learn; unlock one of them, or set train.lock.learn",
    )
    for part in TOWERS.values():
        _hold_in_eval(model.get_submodule(part))
    return [_line(tower, model.get_submodule(part)) for tower, part in TOWERS.items()]


def _lock(encoder: nn.Module, tower: str, groups: int) -> None:
    """By open_clip's own method of the tower."""
    with contextlib.redirect_stdout(io.StringIO()):  # it prints, for Hugging Face's
        encoder.lock(groups)
    require(
        not all(parameter.requires_grad for parameter in encoder.parameters()),
        f"train.lock.{tower}_groups={groups} unlocks the whole {tower} tower, of {len({*layers_of(encoder).values()})} "
        f"layers; lower it, or set train.lock.{tower}=false",
    )


def _learning_in_locked(model: nn.Module, config: Lock) -> set[str]:
    """Names of the parameters of locked towers that `config.learn` lets learn."""
    known = {
        "norms": {
            f"{path}.{name}"
            for path, module in model.named_modules()
            if "Norm" in type(module).__name__
            for name, _ in module.named_parameters(recurse=False)
        },
        "biases": {name for name, _ in model.named_parameters() if name.endswith("bias")},
    }
    found = set().union(*(known.get(word, ()) for word in config.learn))
    found |= matching(model, [word for word in config.learn if word not in known], "train.lock.learn")
    locked = tuple(f"{part}." for tower, part in TOWERS.items() if getattr(config, tower))
    return {name for name in found if name.startswith(locked)}


def _hold_in_eval(encoder: nn.Module) -> None:
    inner = {TimmModel: "trunk", HFTextEncoder: "transformer"}.get(type(encoder), "")
    for module in (encoder, getattr(encoder, inner, None)):
        if module is not None and not learns(module):
            module.__class__ = _held(type(module))  # the same module, so that whoever holds it need not be found
            module.eval()
            return


class _Held(nn.Module):
    def train(self, mode: bool = True) -> nn.Module:
        return super().train(False)


@cache
def _held(kind: type[nn.Module]) -> type[nn.Module]:
    return type(kind.__name__, (_Held, kind), {})


def _line(tower: str, encoder: nn.Module) -> str:
    """'image tower: locked, in eval mode and without a second pass'"""
    sizes = {flag: [p.numel() for p in encoder.parameters() if p.requires_grad == flag] for flag in (True, False)}
    if not sizes[True]:
        return f"{tower} tower: locked; it runs in eval mode, and once a step"
    if not sizes[False]:
        return f"{tower} tower: learns"
    count, numbers = len(sizes[True]), short(sum(sizes[True]), digits=4)
    return (
        f"{tower} tower: {count} of {count + len(sizes[False])} tensors learn, {numbers} of "
        f"{short(sum(sizes[True] + sizes[False]), digits=4)} numbers; the rest is locked"
    )
