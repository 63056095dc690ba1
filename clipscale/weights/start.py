"""A run's first weights, by `model.init`.

for line in begin_from(config.model, towers):     # on the main rank; the others are sent its weights
    tell(line)
"""

from __future__ import annotations

from clipscale.config import Model
from clipscale.errors import UserError, require
from clipscale.open_clip_files import model_fields
from clipscale.towers import Towers
from clipscale.weights.find import Found, find_weights
from clipscale.weights.match import take_over
from clipscale.weights.read import read_weights


def begin_from(config: Model, towers: Towers) -> list[str]:
    """The weights of `config.init` in the towers; what was taken, in lines.

    Raises:
        UserError: no such weights, or they do not fit.
    """
    try:
        return fill_towers(find_weights(config.init, config.name), config, towers)
    except UserError as error:
        raise UserError(f"model.init: {error}") from error


def fill_towers(found: Found, config: Model, towers: Towers) -> list[str]:
    """The same of weights that were found."""
    _check_activation(found, config)
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


def _check_activation(found: Found, config: Model) -> None:
    """No tensor tells of the activation: one of another kind would go unseen."""
    if found.kind == "tag":
        from open_clip.pretrained import get_pretrained_cfg

        theirs = get_pretrained_cfg(config.name, str(found.path)).get("quick_gelu", False)
    elif found.model is not None:
        theirs = model_fields(found.model)["quick_gelu"]
    else:
        return
    ours = model_fields(config)["quick_gelu"]
    require(
        theirs == ours,
        f"the weights were trained with quick_gelu={str(theirs).lower()}, and the model has "
        f"{str(ours).lower()}; set model.quick_gelu of a model of your own, or the model.name with or without "
        "-quickgelu",
    )
