"""What was not finite in a step, found out after the fact: side or parameter, rank, and the samples concerned.

    trouble = bad_embeddings(error, batch.valid)             # on every rank, of a NotFiniteError
    trouble = bad_gradient(towers, trace, norm=math.nan)
    what, broken = explain(trouble, towers, keys, world)     # collective: one line, the same on every rank

Costs a look at every weight or gradient, so it is for steps that are skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from clipscale.checkpoint.judge import first_not_finite
from clipscale.dist import World
from clipscale.loss import NotFiniteError
from clipscale.step import Trace
from clipscale.towers import Towers
from clipscale.words import counted

_NAMED = 4  # samples that are named in the log's line

_WORDS = {"image": "picture", "text": "caption"}


class Trouble(NamedTuple):
    """Of one step, as one rank knows it."""

    what: str
    """What was not finite, in words; the same on every rank."""
    mine: str = ""
    """This rank's part in it, after its name: 'whose 2 text embeddings are not finite'; '' for none that is known."""
    slots: Sequence[int] = ()
    """The samples concerned, among this rank's slots of the step."""
    weight: float = 0.0
    """The rank with the largest is the one to name."""


def bad_embeddings(error: NotFiniteError, valid: Tensor) -> Trouble:
    """Args:
    valid: bool [N], this rank's slots of the step: rows of the error are those of the valid ones.
    """
    if not error.rows:
        return Trouble("the loss is not finite")
    slots = valid.nonzero().flatten()[list(error.rows)].tolist()
    mine = f"has {error.side} embeddings that are not, of {counted(len(slots), 'sample')}"
    return Trouble("the loss is not finite", mine, slots, len(slots))


def bad_gradient(towers: Towers, trace: Trace | None, norm: float) -> Trouble:
    """Of a step whose gradient, summed over the ranks, is not finite; it stands in the parameters' `.grad`."""
    named = towers.model.named_parameters()
    first = first_not_finite((name, parameter.grad) for name, parameter in named if parameter.grad is not None)
    what = f"gradient norm is {norm}" + (f", first in {first}" if first else "")
    if trace is None or (worst := trace.worst()) is None:
        return Trouble(what)
    slots = worst.slots
    slots = slots.tolist() if isinstance(slots, Tensor) else [*range(slots.start, slots.stop)]
    chunk = f"a chunk of {counted(len(slots), _WORDS[worst.tower])}"
    if not worst.finite:
        return Trouble(what, f"made it so in {chunk}", slots, float("inf"))
    return Trouble(what, f"had the largest gradient in {chunk}", slots, worst.size)


def explain(
    trouble: Trouble, towers: Towers, keys: Callable[[Sequence[int]], list[str]], world: World
) -> tuple[str, bool]:
    """One line about the step, and whether the weights themselves are not finite on any rank; collective.

    Args:
        keys: shard and key of the samples in these slots of this rank.
    """
    weight = first_not_finite(towers.model.named_parameters())
    named = keys(trouble.slots[:_NAMED]) if trouble.slots else []
    everyone = world.gather((trouble.weight, trouble.mine, len(trouble.slots), named, weight))
    said = [trouble.what]
    rank, (_, mine, samples, names, _) = max(enumerate(everyone), key=lambda pair: (pair[1][0], -pair[0]))
    if mine:
        more = f" and {samples - len(names)} more" if samples > len(names) else ""
        said.append(f"rank {rank} {mine} ({', '.join(names)}{more})")
    broken = [(rank, found[-1]) for rank, found in enumerate(everyone) if found[-1]]
    if broken:
        said.append(f"weight {broken[0][1]} of rank {broken[0][0]} is not finite")
    return "; ".join(said), bool(broken)
