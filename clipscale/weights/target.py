"""A model that a person points at, of clipscale or not, opened under settings: what is evaluated or exported.

    found, config = find_target("ViT-B-32:laion2b_s34b_b79k", ["model.image_size=336"])     # without torch
    towers = open_towers(found, config.model)

A target is a run, a checkpoint, an exported folder, a file of weights (whose model the words must name), or
NAME:TAG of open_clip's.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from clipscale.checkpoint import load_config_of
from clipscale.config import Config, Model, Preprocess
from clipscale.config.load import apply_overrides
from clipscale.tell import tell
from clipscale.upstream.open_clip_files import check_model, known_models
from clipscale.weights.find import Found, find_weights

if TYPE_CHECKING:
    from clipscale.towers import Towers

TARGETS = (
    "a run's folder (its newest checkpoint), a checkpoint's, an exported model's, a file of weights (with its "
    "model.name=...), or NAME:TAG of open_clip's"
)


def find_target(text: str, words: list[str], *, ema: bool = False) -> tuple[Found, Config]:
    """What lies there, and its config (a run's own, else the default one of its model) with `words` on top.

    Args:
        ema: the average of a checkpoint's weights is meant.

    Raises:
        UserError: nothing of the kind, a damaged checkpoint, or a model that cannot be.
    """
    name, colon, tag = text.partition(":")
    if colon and name in known_models() and not os.path.exists(text):
        found = find_weights(tag, name, ema=ema)
        config = Config(model=Model(name=name))
    else:
        found = find_weights(text, None, ema=ema)
        config = load_config_of(found.path) if found.kind == "checkpoint" else Config(model=found.model or Model())
    begun_with = {"init": None, "init_ema": False, "init_towers": "both", "init_strict": True}  # which is past
    model = replace(config.model, **begun_with)
    config = apply_overrides(replace(config, model=model), words)
    check_model(config.model)
    return found, config


def open_towers(found: Found, model: Model, **placed: Any) -> Towers:
    """The towers with these weights, positions fitted to the size that `model` has.

    Args:
        placed: `device`, `autocast` of `build_towers`.

    Raises:
        UserError: the weights do not fit the model.
    """
    from clipscale.towers import build_towers
    from clipscale.weights.start import facts_of, fill_towers

    if found.kind == "tag" and model.preprocess == Preprocess():
        model = replace(model, preprocess=facts_of(found, model.name).preprocess)
    towers = build_towers(model, **placed)
    lines = fill_towers(found, model, towers)
    if found.kind != "checkpoint" or _sizes(found.model) != _sizes(model):
        for line in lines:
            tell(line)
    return towers


def _sizes(model: Model) -> tuple[Any, ...]:
    return model.vision, model.text, model.image_size, model.context_length
