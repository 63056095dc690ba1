"""What is measured: clipscale's own doors here, other packages in `peers.py`.

A contestant is two functions of `Inputs`: `forward` computes the loss, `both` the loss and its gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from clipscale.bench.loss.inputs import Inputs
from clipscale.bench.loss.team import Outcome, Team
from clipscale.loss import contrastive_grads, contrastive_loss
from clipscale.loss.engines import resolve_engine

_LARGEST_LOSS_SCALE = 2.0**15  # fits float16, in which some losses come


@dataclass(frozen=True)
class Contestant:
    name: str
    forward: Callable[[Inputs], Any]
    both: Callable[[Inputs], list[Outcome]]
    """One outcome a rank of this process."""
    how: str
    """In a few words: what is called, and how."""
    package: str = "clipscale"
    """The distribution it comes in."""
    kind: Literal["softmax", "sigmoid"] = "softmax"
    operations: int = 8
    """Floating-point operations of forward and backward, in units of B^2 D: what the loss needs, not what is done."""
    problem: str = ""
    """Why it cannot be measured here at all."""
    engine: Callable[[str], str] = lambda precision: ""
    """clipscale's own: what computes at that precision, triton or torch."""
    backward: Callable[[Inputs, Any], list[Outcome]] | None = None
    """Those outcomes, from what `forward` returned (`in_two_passes`). None: `both` is one call."""


def in_two_passes(
    name: str,
    forward: Callable[[Inputs], Any],
    backward: Callable[[Inputs, Any], list[Outcome]],
    how: str,
    package: str = "clipscale",
    **fields: Any,
) -> Contestant:
    """A contestant whose `both` is `forward` and then `backward`, so that the two can be timed within it."""

    def both(inputs: Inputs) -> list[Outcome]:
        return backward(inputs, forward(inputs))

    return Contestant(name, forward, both, how, package, backward=backward, **fields)


def own_contestants(team: Team, *, engines: tuple[str, ...], tile: int | None) -> list[Contestant]:
    """`contrastive_grads` on each engine, and `contrastive_loss` under autograd on the first."""
    contestants = []
    for engine in engines:
        suffix = f" {engine}" if len(engines) > 1 else ""
        contestants.append(_grads(team, f"clipscale{suffix}", engine, tile))
    return [*contestants, _autograd(team, "clipscale (autograd)", engines[0], tile)]


def _engine(engine: str, team: Team, precision: str) -> str:
    """What computes there, triton or torch; empty where the engine cannot, which the contestant itself will say."""
    try:
        return resolve_engine(engine, team.device, precision).name
    except ValueError:
        return ""


def _grads(team: Team, name: str, engine: str, tile: int | None) -> Contestant:
    def forward(inputs: Inputs) -> list[Tensor]:
        def loss(image_ND, text_ND, group, _):
            with torch.no_grad():
                return contrastive_loss(
                    image_ND, text_ND, inputs.scale, group, precision=inputs.precision, engine=engine, tile=tile
                )

        return team.each(inputs, loss)

    def both(inputs: Inputs) -> list[Outcome]:
        def grads(image_ND, text_ND, group, first):
            got = contrastive_grads(
                image_ND, text_ND, inputs.scale, group=group, precision=inputs.precision, engine=engine, tile=tile
            )
            return Outcome(got.loss, got.d_image_ND, got.d_text_ND, got.d_logit_scale, first)

        return team.each(inputs, grads)

    how = "forward: contrastive_loss without gradients; both: contrastive_grads, as the trainer calls it"
    return Contestant(name, forward, both, how, engine=partial(_engine, engine, team))


def _autograd(team: Team, name: str, engine: str, tile: int | None) -> Contestant:
    def forward(inputs: Inputs) -> list[Evaluation]:
        def evaluate(image_ND, text_ND, group, first):
            leaves = as_leaves(inputs, image_ND, text_ND)
            loss = contrastive_loss(*leaves, group, precision=inputs.precision, engine=engine, tile=tile)
            return Evaluation(loss, leaves, first)

        return team.each(inputs, evaluate)

    def backward(inputs: Inputs, evaluations: list[Evaluation]) -> list[Outcome]:
        """No rank waits for another one in it. open_clip's convention: times the ranks."""
        return [differentiate(inputs, one, factor=team.ranks) for one in evaluations]

    how = "contrastive_loss, whose forward computes the gradients too; autograd, as a peer is measured"
    return in_two_passes(name, forward, backward, how, engine=partial(_engine, engine, team))


class Evaluation(NamedTuple):
    """What the forward of one rank leaves for autograd."""

    loss: Tensor
    leaves: list[Tensor]
    """As `as_leaves` gives them."""
    first: int
    """Position in the batch of row 0."""


def as_leaves(inputs: Inputs, image_ND: Tensor, text_ND: Tensor) -> list[Tensor]:
    """Images, texts and the scale (float32 or float64, []), all of which want a gradient. Embeddings are not copied."""
    dtype = torch.float64 if image_ND.dtype == torch.float64 else torch.float32
    scale = torch.tensor(inputs.scale, dtype=dtype, device=image_ND.device)
    return [leaf.detach().requires_grad_() for leaf in (image_ND, text_ND, scale)]


def differentiate(inputs: Inputs, evaluation: Evaluation, *, factor: float = 1.0) -> Outcome:
    """Autograd's gradients of the loss; in float16, scaled by a power of two up to B as a GradScaler would.

    `factor`: what the contestant's gradients of the embeddings are multiplied by already.
    """
    loss, leaves, first = evaluation
    lift = 1.0
    if leaves[0].dtype == torch.float16:
        lift = min(2.0 ** (inputs.batch.bit_length() - 1), _LARGEST_LOSS_SCALE)
    d_image_ND, d_text_ND, d_scale = torch.autograd.grad(loss, leaves, torch.full_like(loss, lift), allow_unused=True)
    return Outcome(loss.detach(), d_image_ND, d_text_ND, d_scale, first, lift * factor, lift)
