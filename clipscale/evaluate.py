"""Evaluation apart from training: a checkpoint, or any weights -> the scores of its evaluations of one kind.

evaluate_checkpoint("runs/a", "zeroshot", ["eval.zeroshot.folder=imagenet/val"])  # {'step': 3125, 'zeroshot/top1': ...}
"""

from __future__ import annotations

from typing import Any, NamedTuple

from clipscale.checkpoint import load_state
from clipscale.config import Config
from clipscale.dist import start_world
from clipscale.errors import UserError
from clipscale.eval.suite import EvalSuite
from clipscale.fit_tokenizer import fitting_tokenizer
from clipscale.preflight.checks import check_evaluation
from clipscale.step.planning import chunks_of
from clipscale.towers import autocast_dtype
from clipscale.weights.find import Found
from clipscale.weights.target import open_towers


def evaluate_checkpoint(path: str, kind: str, words: list[str]) -> dict[str, float]:
    """Scores of a checkpoint (or of a run's newest one), or of other weights, under its own config with `words` on top.

    Args:
        path: whatever `weights.target.find_target` takes.
        kind: "zeroshot", "retrieval" or "validation".
        words: `key.path=value` changes to the config stored in the checkpoint, or to the default one.

    Raises:
        UserError: no weights there, a damaged checkpoint, or an evaluation that cannot be made.
    """
    evaluated = evaluate_found(*check_evaluation(path, kind, words))
    if evaluated.failed:
        raise next(iter(evaluated.failed.values()))
    return evaluated.scores


class Evaluated(NamedTuple):
    scores: dict[str, float]
    failed: dict[str, UserError]  # which of several evaluations cannot be made, and why
    details: dict[str, dict[str, Any]]  # what they found beyond their scores, fit for JSON


def evaluate_found(found: Found, config: Config, names: list[str]) -> Evaluated:
    """The same of what `check_evaluation` has let pass.

    Raises:
        UserError: none of them can be made.
    """
    with start_world(config.device) as world:
        autocast = autocast_dtype(config.train.precision, world.device)  # as in training, so that the numbers agree
        towers = open_towers(found, config.model, device=world.device, autocast=autocast)
        step, plan = {}, None
        if found.kind == "checkpoint":
            step["step"], state = load_state(found.path)
            plan = state.plan
        tokenize = fitting_tokenizer(towers)
        suite = EvalSuite(config, towers, chunks_of(config, plan), tokenize, world, names=names)
        scores = step | suite.run_all()
        return Evaluated(scores, suite.failed, suite.details())
