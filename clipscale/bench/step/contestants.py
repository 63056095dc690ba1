"""Who takes the step: clipscale keeping nothing and keeping what it may, open_clip's own loop, plain full-batch code.

for one in contestants(trainee, batch, shape, peers=True, free_bytes=8 << 30, pair_bytes=20 << 20):
    one.problem or one.take()      # a whole step; the loss
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from clipscale.bench.step.ours import OwnStep
from clipscale.bench.step.peers import dense_step, open_clip_step
from clipscale.bench.step.trainee import Batch, Trainee
from clipscale.words import counted

NOTHING_KEPT, KEPT = "clipscale, nothing kept", "clipscale, kept graphs"
OPEN_CLIP, DENSE = "open_clip", "full batch"

_FLOAT_BYTES = 4


class Shape(NamedTuple):
    """Chunk sizes, and what kept graphs may take: bytes, or auto."""

    image_chunk: int
    text_chunk: int
    keep_bytes: int | str


@dataclass(frozen=True)
class Contestant:
    name: str
    take: Callable[[], float]
    """One whole step; its loss."""
    how: str
    package: str = "clipscale"
    own: OwnStep | None = None
    """clipscale's, which tells more of its last step."""
    problem: str = ""
    """Why it cannot be measured here."""


def contestants(
    trainee: Trainee, batch: Batch, shape: Shape, *, peers: bool, free_bytes: int, pair_bytes: int
) -> list[Contestant]:
    """`free_bytes`: memory of the device that is left; `pair_bytes`: what the graph of a pair takes, roughly."""
    graphs_bytes = pair_bytes * len(batch)
    field = [_own(NOTHING_KEPT, trainee, batch, shape._replace(keep_bytes=0))]
    if shape.keep_bytes != 0:
        field.append(_own(KEPT, trainee, batch, shape))
    if peers:
        chunks = counted(-(-len(batch) // shape.image_chunk), "batch", "batches")
        field.append(
            Contestant(
                OPEN_CLIP,
                open_clip_step(trainee, batch, chunk=shape.image_chunk),
                f"train_one_epoch of open_clip_train, {chunks} of {shape.image_chunk} accumulated",
                "open_clip_torch",
                problem=_too_large(_FLOAT_BYTES * batch.images.numel(), free_bytes),  # it holds them on the device
            )
        )
    how = "the same towers, open_clip's ClipLoss and backward on the whole batch at once"
    problem = _too_large(graphs_bytes, free_bytes)
    return [*field, Contestant(DENSE, dense_step(trainee, batch), how, "open_clip_torch", problem=problem)]


def _own(name: str, trainee: Trainee, batch: Batch, shape: Shape) -> Contestant:
    step = OwnStep(trainee, batch, **shape._asdict())
    return Contestant(name, step.take, step.how, own=step)


def _too_large(needed_bytes: int, free_bytes: int) -> str:
    """A CPU without memory ends processes instead of refusing."""
    if needed_bytes <= free_bytes:
        return ""
    return f"skipped: wants {needed_bytes / 2**30:.1f} GiB, {free_bytes / 2**30:.1f} are free"
