"""Ranks that have drifted apart: their parameters, which must be the same to the bit, are compared by a short hash.

    compare_ranks(towers.model, world, step=100)      # collective; RestartError names rank and tensor

Every rank computes the same updates from the same summed gradient, so a difference is a fault: of memory, of a GPU, of
a driver, or of an operation that is not repeatable. Checkpoints are rank 0's alone, so a restart makes all equal again.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from clipscale.dist import World
from clipscale.errors import RestartError
from clipscale.telemetry.faults import record_fault

_WEIGHT = 0x9E3779B97F4A7C15 - (1 << 64)  # odd: 2^64 divided by the golden ratio
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_AT_ONCE = 1 << 22  # elements: their 64-bit copies are 32 MiB


def compare_ranks(model: nn.Module, world: World, *, step: int) -> None:
    """Compare the model's parameters and buffers over the ranks; collective. Alone, nothing.

    Raises:
        RestartError: on every rank, where they differ. It names the first tensor, by the model's order, in which ranks
            differ from most others, and those ranks.
    """
    if world.size == 1:
        return
    tensors = model.state_dict()
    mine = torch.stack([hash_bits(tensor) for tensor in tensors.values()])
    everyone = [torch.empty_like(mine) for _ in range(world.size)]
    dist.all_gather(everyone, mine)
    table = torch.stack(everyone).cpu()  # [ranks, tensors]
    if (table == table[0]).all():
        return
    place = int((table != table[0]).any(dim=0).nonzero()[0])
    usual = int(table[:, place].mode().values)
    odd = [rank for rank, value in enumerate(table[:, place].tolist()) if value != usual]
    who = f"rank {odd[0]} differs" if len(odd) == 1 else f"ranks {', '.join(map(str, odd))} differ"
    if world.size == 2:
        who = "ranks 0 and 1 differ"
    what = f"step {step}: {who} in {[*tensors][place]}: ranks have drifted apart, by a fault of memory, GPU or driver"
    record_fault("drift", what, action="the run ends before a checkpoint of this state", step=step)
    raise RestartError(
        f"{what}; start again: all ranks go on from the checkpoint that rank 0 wrote before. If it comes back, look at "
        "that rank's host and GPU, or set train.deterministic=true"
    )


@torch.no_grad()
def hash_bits(tensor: Tensor) -> Tensor:
    """A 64-bit hash of a tensor's bits and of where they stand, [] int64 on its device; the same for the same bits.

    Every element, as an integer, times an odd number of its place, summed modulo 2^64: any change of one element shows.
    """
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    bits = tensor.detach().contiguous().view(-1).view(_BITS[tensor.element_size()])
    for start in range(0, bits.numel(), _AT_ONCE):
        part = bits[start : start + _AT_ONCE].to(torch.int64)
        places = torch.arange(start, start + part.numel(), device=tensor.device)
        total += (part * (places * 2 + 1).mul_(_WEIGHT)).sum()
    return total
