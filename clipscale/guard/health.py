"""How sound a run's numbers are: skipped steps in a row, and signs of collapse. Survives a restart. No torch.

    health = Health(**state.health)                 # RunState.health of a checkpoint; {} at the start
    sign = collapse_sign(row, pairs=4096, scale_init=14.3, chance=health.learned)
    problem(dataclasses.asdict(health))             # why a checkpoint of this state must not be published, or ''

A loss of ln(B) is that of guessing among the B pairs of a batch. Every run begins there, so there it means something
only once the loss had been clearly lower, or long after the warm-up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from clipscale.words import counted

_LEARNED_SHARE = 0.9  # of ln(B): a loss below this is clearly better than guessing
_CHANCE_NATS = 1e-3  # a loss so near to ln(B) is that of embeddings that are all alike
_DEAD_NORM = 1e-6  # of float32 gradients that cancel; a run that learns has norms above 1e-3
_DEAD_SCALE = 0.01  # of what it began at: no pair can be told from another under a smaller one


@dataclass
class Health:
    """The names are those of RunState.health."""

    nonfinite_in_a_row: int = 0  # steps that were skipped, the last one among them
    collapsed_in_a_row: int = 0  # steps with a sign of collapse, the last one among them
    learned: bool = False  # the loss has been clearly below ln(B)


def problem(health: Mapping[str, Any]) -> str:
    """Why the state that has this `RunState.health` is no good checkpoint; '' where it is one.

    Skipped steps leave the weights as they were: those are good.
    """
    steps = health.get("collapsed_in_a_row", 0)
    return f"the run shows collapse, for {counted(steps, 'step')}" if steps else ""


def has_learned(loss: float, pairs: int) -> bool:
    """Whether a loss (in nats) of so many pairs is clearly better than that of guessing."""
    return pairs > 1 and loss < _LEARNED_SHARE * math.log(pairs)


def is_chance(loss: float, pairs: int) -> bool:
    """Whether it is that of guessing."""
    return pairs > 1 and abs(loss - math.log(pairs)) <= _CHANCE_NATS


def is_dead_scale(scale: float, scale_init: float) -> bool:
    return scale < _DEAD_SCALE * scale_init


def is_dead_gradient(norm: float) -> bool:
    """Whether it is nothing, or what rounding leaves of nothing."""
    return norm < _DEAD_NORM


def collapse_sign(row: Mapping[str, Any], *, pairs: int, scale_init: float, chance: bool) -> str:
    """What in a step's row (of metrics.jsonl) tells of collapse, in words; '' for nothing.

    Args:
        pairs: valid pairs of the step.
        scale_init: what the logit scale began at.
        chance: the loss of guessing is a sign too.
    """
    if pairs < 2:  # one pair is never wrong
        return ""
    if is_dead_scale(row["logit_scale"], scale_init):
        return f"the logit scale is {row['logit_scale']:.3g}, near 0"
    if is_dead_gradient(row["grad_norm"]) and not has_learned(row["loss"], pairs):
        return "the gradient is 0"
    if chance and is_chance(row["loss"], pairs):
        return f"the loss is {row['loss']:.4f}, ln({pairs}): that of guessing"
    return ""
