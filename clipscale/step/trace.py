"""Which chunk of a step's second pass spoilt its gradient: noted while it runs, read only after it has gone wrong.

    trace = Trace()
    gradcache_step(..., trace=trace)
    found = trace.worst()                    # Worst(tower="text", slots=..., finite=False, size=nan)

Of each chunk two numbers stay on the device: the sum of one small gradient of the tower's first layers after it, which
a value that is not finite reaches from whatever layer it came, and the largest gradient of an embedding of the chunk.
Nothing waits for them on a good step.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

_FIRST = 3  # parameters among which the smallest is looked at


class Worst(NamedTuple):
    """The first chunk after which the gradient was not finite; of a gradient that is, the one that asked for most."""

    tower: str
    slots: slice | Tensor
    finite: bool
    size: float
    """Largest gradient of its embeddings, loss scale included."""


class Trace:
    """Of one step on one rank."""

    def __init__(self) -> None:
        self._chunks: list[tuple[str, slice | Tensor, Tensor]] = []

    def note(self, tower: str, encoder: nn.Module, slots: slice | Tensor, d_MD: Tensor) -> None:
        """A chunk's gradient `d_MD` has gone through the tower, whose parameters' `.grad` hold it now."""
        first = [parameter for parameter in encoder.parameters() if parameter.grad is not None][:_FIRST]
        seen = [min(first, key=Tensor.numel).grad.sum(), d_MD.detach().abs().amax()] if first and len(d_MD) else []
        if seen:
            self._chunks.append((tower, slots, torch.stack([number.to(torch.float32) for number in seen])))

    def worst(self) -> Worst | None:
        """None: no chunk went through. Waits for the device."""
        if not self._chunks:
            return None
        marks = torch.stack([mark for _, _, mark in self._chunks]).tolist()
        found = [
            Worst(tower, slots, all(map(_finite, mark)), mark[1])
            for (tower, slots, _), mark in zip(self._chunks, marks, strict=True)
        ]
        return next((chunk for chunk in found if not chunk.finite), None) or max(found, key=lambda chunk: chunk.size)


def _finite(number: float) -> bool:
    return abs(number) < float("inf")
