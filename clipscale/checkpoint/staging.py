"""Host memory that a run's state is copied into, so that it can be written while the next steps change it.

    staging = Staging(state_bytes(model, optimizer), device)
    still = staging.take(snapshot)          # the same snapshot, in this memory: until the next `take`

Fresh memory is slow (on one machine 4.8 s for 1.73 GiB, against 0.15 s for a copy into memory that has been used): it
is allocated once, and touched before the first step.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import threading
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from clipscale.checkpoint.snapshot import Snapshot
from clipscale.checkpoint.tree import flatten, unflatten
from clipscale.tell import tell
from clipscale.words import short

_ALIGNMENT = 64  # bytes


class Staging:
    """Memory of `nbytes`, page-locked where the state is a GPU's; more if a state turns out to need more."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._allocate(nbytes)

    @property
    def nbytes(self) -> int:
        return self._memory.numel()

    def take(self, snapshot: Snapshot) -> Snapshot:
        """A copy: tensors that share memory share it here too, and memory layouts stay."""
        structure, tensors = flatten(snapshot.trees)
        if (needed := _bytes_of(tensors)) > self.nbytes:
            tell(f"the copy of the state grows from {short(self.nbytes)}B to {short(needed)}B: this save takes longer")
            self._allocate(needed)
        self._touching.join()
        staged, start = {}, 0
        for name, tensor in tensors.items():
            staged[name] = self._place(start, tensor).copy_(tensor, non_blocking=self._on_gpu)
            start += _aligned(tensor)
        if self._on_gpu:
            torch.cuda.current_stream().synchronize()
        return dataclasses.replace(snapshot, **unflatten(structure, staged), state=copy.deepcopy(snapshot.state))

    def _allocate(self, nbytes: int) -> None:
        """Touched by a thread, beside what else is built before the first step."""
        self._memory = torch.empty(nbytes, dtype=torch.uint8, pin_memory=self._on_gpu)
        self._touching = threading.Thread(target=self._memory.zero_, name="staging memory")
        self._touching.start()

    def _place(self, start: int, tensor: Tensor) -> Tensor:
        """Memory for a tensor, of its shape and, where that leaves no gaps, of its strides."""
        flat = self._memory[start : start + tensor.nbytes].view(tensor.dtype)
        like = torch.empty_like(tensor, device="meta")
        return flat.as_strided(like.shape, like.stride())


def staged_bytes(tree: Any) -> int:
    """Of host memory that the tensors of a tree need; they may be on the device "meta"."""
    return _bytes_of(flatten(tree)[1])


def state_bytes(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Of host memory that both need. Of an optimizer that has taken no step, what it will hold: found by a step on the
    device "meta", with one parameter of each shape; on the CPU, for one that looks at numbers."""
    weights = staged_bytes(model.state_dict())
    if optimizer.state:
        return weights + staged_bytes(optimizer.state_dict())
    return weights + sum(_bytes_after_a_step(type(optimizer), group) for group in optimizer.param_groups)


def _bytes_after_a_step(kind: type[torch.optim.Optimizer], group: dict[str, Any], device: str = "meta") -> int:
    kinds = Counter((param.shape, param.dtype) for param in group["params"])
    params = [torch.nn.Parameter(torch.zeros(shape, dtype=dtype, device=device)) for shape, dtype in kinds]
    for param in params:
        param.grad = torch.zeros_like(param)
    twin = kind([group | {"params": params} | ({"fused": False} if "fused" in group else {})])
    try:
        twin.step()
    except RuntimeError:
        if device == "cpu":
            raise
        return _bytes_after_a_step(kind, group, "cpu")
    shared = [value for own in twin.param_groups for value in own.values() if isinstance(value, Tensor)]
    each = (staged_bytes(twin.state[param]) * count for param, count in zip(params, kinds.values(), strict=True))
    return sum(each) + staged_bytes(shared)


def _bytes_of(tensors: dict[str, Tensor]) -> int:
    return sum(map(_aligned, tensors.values()))


def _aligned(tensor: Tensor) -> int:
    return math.ceil(tensor.nbytes / _ALIGNMENT) * _ALIGNMENT
