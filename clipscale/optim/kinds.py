"""The optimizers there are, and what each takes: torch's AdamW (fused) and SGD, and timm's by name.

    warnings = check_optimizer(config.optim)      # or a UserError; before data are read
    optimizer = make_optimizer(groups, config.optim)

Not offered are what needs another package (apex, bitsandbytes), AdaHessian (second derivatives through two passes) and
Kron (it draws random numbers, which neither other ranks nor a resume would share).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from timm.optim import create_optimizer_v2, get_optimizer_class, get_optimizer_info, list_optimizers
from timm.optim.muon import Muon

from clipscale.config import Optim
from clipscale.errors import UserError, reason, require
from clipscale.words import did_you_mean

_TORCH: dict[str, type[torch.optim.Optimizer]] = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
_CLIPS = {"adamw": "adamwlegacy"}  # kind -> timm's, which clips updates and is otherwise the same
_CLIPPING = ("clipping_threshold", "clip_threshold")  # what constructors call it
_SETTINGS = ("lr", "betas", "eps", "momentum", "weight_decay")  # of `optim`, under the constructors' names
_MOMENTUM = 0.9  # timm's, for every kind that has one


def offered_kinds() -> list[str]:
    """Every value of optim.kind."""
    return sorted({*_TORCH, *(name for name in list_optimizers() if not _why_not(name))})


def _why_not(name: str) -> str:
    """Why one of timm's names is not offered; '' where it is."""
    info = get_optimizer_info(name)
    if isinstance(info.opt_class, str):
        return f"is {info.opt_class}, which no requirement of clipscale brings"
    if info.second_order:
        return "needs second derivatives, which gradient caching does not make"
    return "draws random numbers that neither ranks nor a resume share" if name.startswith("kron") else ""


def is_muon(kind: str) -> bool:
    """Whether it takes matrices alone, and leaves the parameters of a group with `use_fallback` to an AdamW of its
    own. UserError: there is no such kind."""
    _check_kind(kind)
    return kind not in _TORCH and issubclass(_class_of(kind), Muon)


def check_optimizer(config: Optim) -> list[str]:
    """What to tell of settings that the kind does not use.

    Raises:
        UserError: an unknown kind, or what its constructor does not take.
    """
    _check_kind(config.kind)
    known, unused = _fields(config), []
    for name in ("betas", "eps", "momentum"):
        if (value := getattr(config, name)) is not None and name not in known:
            value = list(value) if name == "betas" else value
            unused.append(f"warning: optim.{name}={value} is not used: optim.kind={config.kind} has none")
    if config.betas is not None and "betas" in known:
        count = 2 if config.kind in _TORCH else get_optimizer_info(config.kind).num_betas
        require(
            len(config.betas) == count,
            f"optim.betas={list(config.betas)}, but optim.kind={config.kind} takes {count}; null takes its own",
        )
    for name in config.options:
        require(
            name not in _SETTINGS and name not in _CLIPPING,
            f"optim.options has {name}, which is a setting: optim.{'update_clipping' if name in _CLIPPING else name}",
        )
        hint = did_you_mean(name, known) or f"there are {', '.join(sorted(known - {*_SETTINGS}))}"
        require(name in known, f"optim.options has {name!r}, which optim.kind={config.kind} does not take; {hint}")
    require(
        config.update_clipping is None or bool(known & {*_CLIPPING}),
        f"optim.update_clipping={config.update_clipping}, but optim.kind={config.kind} clips no updates in the timm "
        "that is installed; set it to null, or optim.kind to adamw, nadamw or adafactor",
    )
    make_optimizer([{"params": [torch.nn.Parameter(torch.zeros(2, 2))]}], config)
    return unused


def make_optimizer(groups: Sequence[dict[str, Any]], config: Optim) -> torch.optim.Optimizer:
    """Of these groups of parameters, each with its own weight decay.

    Raises:
        UserError: the constructor refuses a value.
    """
    known, fields = _fields(config), dict(config.options)
    for name, value in (*config.moments.items(), ("momentum", config.momentum)):
        if value is not None and name in known:
            fields[name] = tuple(value) if name == "betas" else value
    if config.update_clipping is not None:
        fields[next(name for name in _CLIPPING if name in known)] = config.update_clipping
    try:
        if _name(config) not in _TORCH:
            momentum = fields.pop("momentum", _MOMENTUM)
            return create_optimizer_v2(groups, _name(config), lr=config.lr, momentum=momentum, **fields)
        if config.kind == "adamw":
            fields = {"fused": "foreach" not in fields} | fields
        return _TORCH[config.kind](groups, lr=config.lr, **fields)
    except (ValueError, TypeError, RuntimeError, AssertionError) as error:
        raise UserError(f"optim.kind={config.kind} cannot be made of these settings: {reason(error)}") from error


def _check_kind(kind: str) -> None:
    if kind in _TORCH:
        return
    if kind in list_optimizers():
        why = _why_not(kind)
        require(not why, f"optim.kind={kind} {why}; choose another of timm's, or adamw")
        return
    near = did_you_mean(kind.lower(), offered_kinds()) or f"there are {', '.join(offered_kinds())}"
    raise UserError(f"optim.kind={kind!r} is neither adamw nor sgd nor an optimizer of timm's; {near}")


def _name(config: Optim) -> str:
    """timm's name, or one of torch's here."""
    return _CLIPS.get(config.kind, config.kind) if config.update_clipping is not None else config.kind


def _class_of(name: str) -> type[torch.optim.Optimizer]:
    return _TORCH.get(name) or get_optimizer_class(name, bind_defaults=False)


def _fields(config: Optim) -> set[str]:
    """What the constructor takes beside parameters."""
    return inspect.signature(_class_of(_name(config))).parameters.keys() - {"params"}
