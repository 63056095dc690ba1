"""Weights from elsewhere taken over by name, their positions fitted to another size, and what came of it.

    report = take_over(towers.model, state, which="both", strict=True, context="stretch")
    report.lines()      # ['image tower: 52 tensors, 0.03M numbers: 51 as they are, 1 resized (visual.posi...', ...]

Positions of pictures are interpolated as open_clip does (`resize_pos_embed`), of a timm backbone as timm does, those of
captions as open_clip does (`resize_text_pos_embed`) or cut.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import open_clip
from open_clip.convert import convert_state_dict
from open_clip.model import resize_pos_embed, resize_text_pos_embed
from open_clip.timm_model import TimmModel
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from clipscale.errors import UserError, require
from clipscale.words import counted, short

_PICTURES, _CAPTIONS, _TRUNK = "visual.positional_embedding", "text.positional_embedding", "visual.trunk.pos_embed"
_PARTS = {"visual": "image tower", "text": "text tower", "logit_scale": "logit scale"}
_NAMED = 6  # names that an error or a line tells; of the rest it tells how many


@dataclass
class Taken:
    """What came of each tensor of the model, by name.

    unused: names of the weights that the model has no place for.
    """

    numbers: dict[str, int]  # of the model's tensors that were to be filled
    resized: dict[str, str] = field(default_factory=dict)  # how
    fresh: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """A line a part of the model, and one of what was not used."""
        lines = []
        for part, what in _PARTS.items():
            its = [name for name in self.numbers if _part(name) == part]
            if not its:
                lines.append(f"{what}: fresh")
                continue
            resized = [f"{name} {how}" for name, how in self.resized.items() if _part(name) == part]
            fresh = [name for name in self.fresh if _part(name) == part]
            as_they_are = len(its) - len(resized) - len(fresh)
            words = [f"{as_they_are} as {'it is' if len(its) == 1 else 'they are'}"]
            words += [f"{len(resized)} resized ({', '.join(resized)})"] if resized else []
            words += [f"{len(fresh)} fresh ({_some(fresh)})"] if fresh else []
            numbers = short(sum(self.numbers[name] for name in its), digits=4)
            lines.append(f"{what}: {counted(len(its), 'tensor')}, {numbers} numbers: {', '.join(words)}")
        return lines + ([f"not used of the weights: {_some(self.unused)}"] if self.unused else [])


def take_over(
    model: open_clip.CustomTextCLIP,
    state: dict[str, Tensor],
    *,
    which: Literal["both", "image", "text"] = "both",
    strict: bool = True,
    context: Literal["stretch", "cut"] = "stretch",
) -> Taken:
    """Copy `state` into the model.

    Args:
        which: of the two towers; with both, the logit scale comes along.
        strict: every tensor must have its counterpart, of its shape.
        context: how positions of captions are fitted to another length.

    Raises:
        UserError: what does not fit, by name; with `strict`, any of it.
    """
    parts = {"both": tuple(_PARTS), "image": ("visual",), "text": ("text",)}[which]
    wanted = {name: tensor for name, tensor in model.state_dict().items() if _part(name) in parts}
    state = convert_state_dict(model, state)
    state, optional = _by_our_names(model, state, which, wanted)
    if which != "both":
        state = {name: tensor for name, tensor in state.items() if _part(name) in parts}
    if "logit_scale" in state:
        state["logit_scale"] = state["logit_scale"].reshape(model.logit_scale.shape)  # a number, or a list of one
    taken = Taken({name: tensor.numel() for name, tensor in wanted.items()})
    bias = state.pop("logit_bias", None)  # a softmax over a row is the same for any
    _resize(model, state, taken, context)
    fits = {name for name in wanted if name in state and state[name].shape == wanted[name].shape}
    taken.fresh = [name for name in wanted if name not in fits]
    taken.unused = [name for name in state if name not in fits] + ["logit_bias"] * (bias is not None)
    _check(state, wanted, fits, optional, strict)
    require(bool(fits), f"not one of the weights fits the model: they hold {_some(list(state))}")
    model.load_state_dict({name: state[name] for name in fits}, strict=False)
    return taken


def _by_our_names(
    model: open_clip.CustomTextCLIP, state: dict[str, Tensor], which: str, wanted: dict[str, Tensor]
) -> tuple[dict[str, Tensor], set[str]]:
    """Weights of one tower alone, or of a timm backbone, under the names they have in the model; and the names that
    may lack a counterpart on either side: a backbone's classifier, and the head that comes after it here."""
    prefixes = {"image": ("visual.trunk.", "visual."), "text": ("text.",), "both": ()}[which]
    if any(_part(name) in _PARTS for name in state):
        return state, set()
    hits = {prefix: sum(prefix + name in wanted for name in state) for prefix in prefixes}
    if not any(hits.values()):
        return state, set()
    prefix = max(hits, key=hits.get)
    optional: set[str] = set()
    if prefix == "visual.trunk." and isinstance(model.visual, TimmModel):
        classifiers = model.visual.trunk.default_cfg.get("classifier") or ()
        classifiers = (classifiers,) if isinstance(classifiers, str) else classifiers
        optional = {f"{prefix}{name}.{kind}" for name in classifiers for kind in ("weight", "bias")} - wanted.keys()
        optional |= {name for name in wanted if name.startswith("visual.head.")}
    return {prefix + name: tensor for name, tensor in state.items()}, optional


def _resize(model: open_clip.CustomTextCLIP, state: dict[str, Tensor], taken: Taken, context: str) -> None:
    """Positions in `state` become those of the model, where only their number differs."""
    goals = {name: model.get_parameter(name) for name in (_PICTURES, _CAPTIONS, _TRUNK) if name in taken.numbers}
    for name, goal in goals.items():
        found = state.get(name)
        if found is None or found.shape == goal.shape or found.shape[-1] != goal.shape[-1]:
            continue
        before, after = found.shape[-2], goal.shape[-2]
        if name == _CAPTIONS and context == "cut":
            require(
                before > after,
                f"{name} has {before} positions, fewer than the {after} of the model, which cannot be cut: "
                "model.init_context=stretch interpolates them",
            )
            state[name] = found[:after]
        elif name == _CAPTIONS:
            resize_text_pos_embed(state, model)
        elif name == _PICTURES and math.isqrt(before - 1) ** 2 == before - 1:
            resize_pos_embed(state, model)
        elif name == _TRUNK:
            state[name] = _resampled(model.visual.trunk, found)
        if state[name].shape == goal.shape:
            taken.resized[name] = f"{before} -> {after} positions"


def _resampled(trunk: nn.Module, positions: Tensor) -> Tensor:
    """By timm's own function, for its vision transformers."""
    prefix = 0 if getattr(trunk, "no_embed_class", False) else getattr(trunk, "num_prefix_tokens", 1)
    grid = getattr(getattr(trunk, "patch_embed", None), "grid_size", None)
    square = math.isqrt(positions.shape[1] - prefix) ** 2 == positions.shape[1] - prefix
    return resample_abs_pos_embed(positions, grid, num_prefix_tokens=prefix) if grid and square else positions


def _check(
    state: dict[str, Tensor], wanted: dict[str, Tensor], fits: set[str], optional: set[str], strict: bool
) -> None:
    if not strict:
        return
    missing = [name for name in wanted if name not in state and name not in optional]
    odd = [name for name in state if name not in wanted and name not in optional]
    other = [
        f"{name} {list(state[name].shape)}, here {list(wanted[name].shape)}"
        for name in wanted
        if name in state and name not in fits
    ]
    words = [
        f"{what}: {_some(names)}"
        for what, names in (("missing", missing), ("without a place in the model", odd), ("of another shape", other))
        if names
    ]
    if words:
        raise UserError(
            f"the weights do not fit the model: {'; '.join(words)} (model.init_strict=false takes what fits)"
        )


def _part(name: str) -> str:
    return name.partition(".")[0]


def _some(names: list[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
