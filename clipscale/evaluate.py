"""Evaluation apart from training: a checkpoint -> its zero-shot accuracy."""

from __future__ import annotations

from clipscale.checkpoint import find_checkpoint, load_checkpoint, load_config_of
from clipscale.config import Config
from clipscale.config_load import apply_overrides
from clipscale.data.tokenize import build_tokenizer
from clipscale.dist import start_world
from clipscale.errors import require
from clipscale.eval.suite import EvalSuite
from clipscale.towers import autocast_dtype, build_towers


def evaluate_checkpoint(path: str, words: list[str]) -> dict[str, float]:
    """Zero-shot accuracy of a checkpoint (or of a run's newest one), under its own config with `words` on top.

    Args:
        path: a checkpoint's folder or a run's.
        words: `key.path=value` changes to the config stored in the checkpoint.

    Raises:
        UserError: no checkpoint there, a damaged one, or pictures that cannot be used.
    """
    found = find_checkpoint(path)
    config: Config = apply_overrides(load_config_of(found), words)
    require(
        config.eval.zeroshot.enabled,
        "no pictures to classify: add eval.zeroshot.urls=... (or eval.zeroshot.folder=...), "
        "eval.zeroshot.classnames=... and eval.zeroshot.templates=...",
    )
    with start_world(config.device) as world:
        snapshot = load_checkpoint(found)
        autocast = autocast_dtype(config.train.precision, world.device)  # as in training, so that the numbers agree
        towers = build_towers(config.model, device=world.device, autocast=autocast)
        towers.model.load_state_dict(snapshot.model)
        tokenize = build_tokenizer(towers.tokenizer_name, towers.context_length)
        return {"step": snapshot.step, **EvalSuite(config, towers, tokenize, world).zeroshot()}
