"""Evaluation apart from training: a checkpoint -> its zero-shot accuracy.

evaluate_checkpoint("runs/a", ["eval.zeroshot.folder=imagenet/val"])  # {'step': 3125, 'zeroshot/top1': 0.31, ...}
"""

from __future__ import annotations

from pathlib import Path

from clipscale.checkpoint import load_checkpoint
from clipscale.config import Config
from clipscale.dist import start_world
from clipscale.eval.suite import EvalSuite
from clipscale.fit_tokenizer import fitting_tokenizer
from clipscale.preflight.checks import check_evaluation
from clipscale.step.planning import chunks_of
from clipscale.towers import autocast_dtype, build_towers


def evaluate_checkpoint(path: str, words: list[str]) -> dict[str, float]:
    """Zero-shot accuracy of a checkpoint (or of a run's newest one), under its own config with `words` on top.

    Args:
        path: a checkpoint's folder or a run's.
        words: `key.path=value` changes to the config stored in the checkpoint.

    Raises:
        UserError: no checkpoint there, a damaged one, or pictures that cannot be used.
    """
    return evaluate_found(*check_evaluation(path, words))


def evaluate_found(found: Path, config: Config) -> dict[str, float]:
    """The same of a checkpoint and a config that `check_evaluation` has let pass."""
    with start_world(config.device) as world:
        snapshot = load_checkpoint(found)
        autocast = autocast_dtype(config.train.precision, world.device)  # as in training, so that the numbers agree
        towers = build_towers(config.model, device=world.device, autocast=autocast)
        towers.model.load_state_dict(snapshot.model)
        tokenize = fitting_tokenizer(towers)
        chunks = chunks_of(config, snapshot.state.plan)
        return {"step": snapshot.step, **EvalSuite(config, towers, chunks, tokenize, world).zeroshot()}
