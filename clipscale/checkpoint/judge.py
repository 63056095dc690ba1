"""Whether a state may become a checkpoint: what is not finite in it, by name.

first_bad({"logit_scale": nan, ...}, optimizer.state_dict())      # 'weight logit_scale is not finite'; '' if all are

One pass over each tensor where it lies, without a copy; a GPU is waited for once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def first_bad(
    model: dict[str, torch.Tensor], optimizer: dict[str, Any], ema: dict[str, torch.Tensor] | None = None
) -> str:
    """The first tensor with a NaN or an infinity, in words; '' where there is none.

    Args:
        model: a state dict.
        optimizer: an optimizer's state dict.
        ema: averaged weights by name.
    """
    name = first_not_finite(_tensors(model, optimizer, ema or {}))
    return f"{name} is not finite" if name else ""


def first_not_finite(named: Iterable[tuple[str, Any]]) -> str:
    """The name of the first tensor with a NaN or an infinity; '' where there is none. Others than tensors are good."""
    import torch

    names, extremes = [], []
    for name, tensor in named:
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.numel():
            names.append(name)
            extremes.append(torch.stack(torch.aminmax(tensor.detach())))  # a NaN is both
    finite = [True] * len(names)
    for device in {pair.device for pair in extremes}:
        places = [place for place, pair in enumerate(extremes) if pair.device == device]
        found = torch.stack([extremes[place].double() for place in places]).isfinite().all(dim=1)
        for place, good in zip(places, found.tolist(), strict=True):
            finite[place] = good
    return next((name for name, good in zip(names, finite, strict=True) if not good), "")


def _tensors(model: dict[str, Any], optimizer: dict[str, Any], ema: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, tensor in model.items():
        yield f"weight {name}", tensor
    for name, tensor in ema.items():
        yield f"averaged weight {name}", tensor
    for parameter, slots in optimizer.get("state", {}).items():
        for name, tensor in slots.items():
            yield f"{name} of the optimizer's parameter {parameter}", tensor
