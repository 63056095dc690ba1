"""The same losses as open_clip's own loop: 20 steps of AdamW from the same weights on the same batches, in float32.

    found = measure_parity(model, device, lengths, pairs=64, shape=Shape(16, 16, 0), seed=0)
    found["met"]                       # losses within 1e-5, gradients of the logit scale within 1e-3 of the largest

open_clip takes every batch whole (accumulation 1), clipscale takes it in chunks. The scale's gradient is compared for
itself: AdamW divides each gradient by its own size, so that a constant factor on it does not show in the losses (four
times too large, after 20 steps of the tests' model: 5e-7, which is rounding).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from clipscale.bench.step.captions import Lengths
from clipscale.bench.step.contestants import Shape
from clipscale.bench.step.ours import OwnStep
from clipscale.bench.step.peers import open_clip_step
from clipscale.bench.step.trainee import Batch, Trainee, build_trainee, draw_batch
from clipscale.config import Model
from clipscale.loss.precision import exact_products

STEPS = 20
LOSS_BOUND, SCALE_BOUND = 1e-5, 1e-3
_CONVOLUTIONS_APART = hasattr(torch.backends.cudnn, "conv")  # since torch 2.9


class Track(NamedTuple):
    """Of every step."""

    losses: list[float]
    scale_gradients: list[float]
    """Of the logarithm of the logit scale."""


def measure_parity(
    model: Model, device: torch.device, lengths: Lengths, *, pairs: int, shape: Shape, seed: int
) -> dict[str, Any]:
    """The numbers, ready for JSON."""
    trainee = build_trainee(model, device=device, precision="fp32", seed=seed)
    batches = [draw_batch(trainee, pairs, lengths, distinct=pairs, seed=seed + step) for step in range(STEPS)]
    with exact_products("fp32", device), _exact_convolutions():
        own = follow(trainee, batches, own_maker(trainee, shape))
        theirs = follow(trainee, batches, lambda batch: open_clip_step(trainee, batch, chunk=pairs))
    return {"pairs": pairs, "image_chunk": shape.image_chunk, "text_chunk": shape.text_chunk} | compare(own, theirs)


@contextmanager
def _exact_convolutions() -> Iterator[None]:
    """Within: cuDNN does not round float32 to TF32, as it does by default."""
    settings = torch.backends.cudnn.conv if _CONVOLUTIONS_APART else torch.backends.cudnn
    name, exact = ("fp32_precision", "ieee") if _CONVOLUTIONS_APART else ("allow_tf32", False)
    before = getattr(settings, name)
    setattr(settings, name, exact)
    try:
        yield
    finally:
        setattr(settings, name, before)


def own_maker(trainee: Trainee, shape: Shape) -> Callable[[Batch], Callable[[], float]]:
    """Makes clipscale's step on a batch, its loss in float32."""

    def make(batch: Batch) -> Callable[[], float]:
        return OwnStep(trainee, batch, **shape._asdict(), loss_precision="fp32").take

    return make


def follow(trainee: Trainee, batches: list[Batch], make: Callable[[Batch], Callable[[], float]]) -> Track:
    """A step on every batch, from the first weights on."""
    track, log_scale = Track([], []), trainee.towers.model.logit_scale
    trainee.restore()
    hook = trainee.optimizer.register_step_pre_hook(
        lambda *_: track.scale_gradients.append(log_scale.grad.item())  # complete, and not yet used
    )
    try:
        for batch in batches:
            track.losses.append(make(batch)())
    finally:
        hook.remove()
    return track


def compare(own: Track, theirs: Track) -> dict[str, Any]:
    """Largest differences: of the losses as they are, of the scale's gradients in units of the largest one."""
    loss = max(abs(a - b) for a, b in zip(own.losses, theirs.losses, strict=True))
    top = max(map(abs, theirs.scale_gradients))
    scale = max(abs(a - b) for a, b in zip(own.scale_gradients, theirs.scale_gradients, strict=True)) / top
    return {
        "steps": len(own.losses),
        "losses": {"clipscale": own.losses, "open_clip": theirs.losses},
        "loss_difference": loss,
        "loss_bound": LOSS_BOUND,
        "scale_gradient_difference": scale,
        "scale_gradient_bound": SCALE_BOUND,
        "met": loss <= LOSS_BOUND and scale <= SCALE_BOUND,
    }
