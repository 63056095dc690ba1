"""Replicated towers: the same weights everywhere at the start, gradients summed over the ranks once per step.

No DDP: with hundreds of chunks, overlapping the last one buys nothing, and separate towers, frozen towers and ranks
with different chunk counts need no special case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from clipscale.dist import World

_BUCKET_BYTES = 64 << 20


def broadcast_parameters(model: nn.Module, world: World) -> None:
    """Rank 0's parameters and buffers on every rank; collective."""
    if world.size > 1:
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, src=0)


def sum_gradients(parameters: Iterable[nn.Parameter], world: World) -> None:
    """Replace every `.grad` by its sum over the ranks, in flat buckets of at most 64 MiB; collective.

    A parameter that needs a gradient and got none on this rank counts as zero.
    """
    if world.size > 1:
        sum_in_buckets(parameters, dist.all_reduce)


def sum_in_buckets(parameters: Iterable[nn.Parameter], all_reduce: Callable[[Tensor], object]) -> None:
    """The same among whatever ranks `all_reduce` sums a tensor over, in place."""
    for bucket in _buckets([parameter for parameter in parameters if parameter.requires_grad]):
        for parameter in bucket:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        grads = [parameter.grad for parameter in bucket]
        flat: Tensor = _flatten_dense_tensors(grads)
        all_reduce(flat)
        for grad, total in zip(grads, _unflatten_dense_tensors(flat, grads), strict=True):
            grad.copy_(total)


def _buckets(parameters: list[nn.Parameter]) -> Iterable[list[nn.Parameter]]:
    """Runs of parameters of one dtype, the same on every rank."""
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        if bucket and (parameter.dtype != bucket[0].dtype or size + parameter.nbytes > _BUCKET_BYTES):
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += parameter.nbytes
    if bucket:
        yield bucket
