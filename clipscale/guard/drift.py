"""Ranks that have drifted apart: their parameters, which must be the same to the bit, are compared by a short hash.

    compare_ranks(towers.model, {}, world, step=100)  # collective; RestartError names rank and tensor

Every rank computes the same updates from the same summed gradient, so a difference is a fault: of memory, of a GPU, of
a driver, or of an operation that is not repeatable. Checkpoints are rank 0's alone, so a restart makes all equal again.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from clipscale.bits import hash_bits
from clipscale.dist import World
from clipscale.errors import RestartError
from clipscale.telemetry.faults import record_fault


def compare_ranks(model: nn.Module, averages: dict[str, Tensor], world: World, *, step: int) -> None:
    """Compare the model's parameters and buffers, and averages of them, over the ranks; collective. Alone, nothing.

    Raises:
        RestartError: on every rank, where they differ. It names the first tensor, by the model's order, in which ranks
            differ from most others, and those ranks.
    """
    if world.size == 1:
        return
    tensors = model.state_dict() | {f"the average of {name}": tensor for name, tensor in averages.items()}
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
