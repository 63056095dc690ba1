"""Evaluation apart from training: a checkpoint -> the scores of its evaluations of one kind.

evaluate_checkpoint("runs/a", "zeroshot", ["eval.zeroshot.folder=imagenet/val"])  # {'step': 3125, 'zeroshot/top1': ...}
"""

from __future__ import annotations

from pathlib import Path

from clipscale.checkpoint import load_checkpoint
from clipscale.config import Config
from clipscale.dist import start_world
from clipscale.errors import UserError
from clipscale.eval.suite import EvalSuite
from clipscale.fit_tokenizer import fitting_tokenizer
from clipscale.preflight.checks import check_evaluation
from clipscale.step.planning import chunks_of
from clipscale.towers import autocast_dtype, build_towers


def evaluate_checkpoint(path: str, kind: str, words: list[str]) -> dict[str, float]:
    """Scores of a checkpoint (or of a run's newest one), under its own config with `words` on top.

    Args:
        path: a checkpoint's folder or a run's.
        kind: "zeroshot" or "validation".
        words: `key.path=value` changes to the config stored in the checkpoint.

    Raises:
        UserError: no checkpoint there, a damaged one, or an evaluation that cannot be made.
    """
    scores, failed = evaluate_found(*check_evaluation(path, kind, words))
    if failed:
        raise next(iter(failed.values()))
    return scores


def evaluate_found(found: Path, config: Config, names: list[str]) -> tuple[dict[str, float], dict[str, UserError]]:
    """The same of what `check_evaluation` has let pass; and which of several evaluations cannot be made, and why.

    Raises:
        UserError: none of them can be made.
    """
    with start_world(config.device) as world:
        snapshot = load_checkpoint(found)
        autocast = autocast_dtype(config.train.precision, world.device)  # as in training, so that the numbers agree
        towers = build_towers(config.model, device=world.device, autocast=autocast)
        towers.model.load_state_dict(snapshot.model)
        tokenize = fitting_tokenizer(towers)
        suite = EvalSuite(config, towers, chunks_of(config, snapshot.state.plan), tokenize, world, names=names)
        return {"step": snapshot.step, **suite.run_all()}, suite.failed
