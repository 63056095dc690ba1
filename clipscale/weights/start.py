"""A run's first weights, by `model.init`.

for line in begin_from(config.model, towers):     # on the main rank; the others are sent its weights
    tell(line)
"""

from __future__ import annotations

from typing import NamedTuple

from open_clip.pretrained import get_pretrained_cfg

from clipscale.config import Model, Preprocess
from clipscale.errors import UserError, require
from clipscale.towers import Towers
from clipscale.upstream.open_clip_files import model_fields
from clipscale.weights.find import Found, find_weights, preprocess_from
from clipscale.weights.match import take_over
from clipscale.weights.read import read_weights


class Facts(NamedTuple):
    """What no tensor tells of the model that it is from."""

    quick_gelu: bool
    preprocess: Preprocess


def begin_from(config: Model, towers: Towers) -> list[str]:
    """The weights of `config.init` in the towers; what was taken, in lines.

    Raises:
        UserError: no such weights, or they do not fit.
    """
    try:
        return fill_towers(find_weights(config.init, config.name, ema=config.init_ema), config, towers)
    except UserError as error:
        raise UserError(f"model.init: {error}") from error


def fill_towers(found: Found, config: Model, towers: Towers) -> list[str]:
    """The same of weights that were found."""
    if (theirs := facts_of(found, config.name)) is not None:
        _check(theirs, config)
    state = read_weights(found, config.name)
    taken = take_over(
        towers.model, state, which=config.init_towers, strict=config.init_strict, context=config.init_context
    )
    lines = [f"weights of {found.words}", *taken.lines()]
    before = towers.logit_scale()
    towers.clamp_logit_scale()
    if towers.logit_scale() < before:
        lines.append(f"logit scale {before:.4g}, held at model.logit_scale_max={config.logit_scale_max:.4g}")
    return lines


def facts_of(found: Found, name: str | None) -> Facts | None:
    """None: a file alone does not tell. A tag's as open_clip's list has them."""
    if found.kind == "tag":
        listed = get_pretrained_cfg(name, str(found.path))
        return Facts(listed.get("quick_gelu", False), preprocess_from(listed))
    if found.model is None:
        return None
    return Facts(model_fields(found.model)["quick_gelu"], found.model.preprocess)


def _check(theirs: Facts, config: Model) -> None:
    """Another activation or other pixels would go unseen."""
    mine = model_fields(config)["quick_gelu"]
    require(
        theirs.quick_gelu == mine,
        f"the weights were trained with quick_gelu={str(theirs.quick_gelu).lower()}, and the model has "
        f"{str(mine).lower()}; set model.quick_gelu of a model of your own, or the model.name with or without "
        "-quickgelu",
    )
    if config.init_towers == "text" or not config.init_strict:
        return
    for name in ("mean", "std"):
        have, own = getattr(theirs.preprocess, name), getattr(config.preprocess, name)
        require(
            have == own,
            f"the weights were trained on pixels of another {name}: set model.preprocess.{name}="
            f"[{','.join(map(str, have))}] (or model.init_strict=false to go on with [{','.join(map(str, own))}])",
        )
