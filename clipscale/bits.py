"""A short hash of a tensor's bits, worked out where the tensor lies: whether weights are the same is asked often.

hash_bits(torch.ones(3))        # [] int64; hash_bits(torch.ones(3) * (1 + 1e-7)) is another
"""

from __future__ import annotations

import torch
from torch import Tensor

_WEIGHT = 0x9E3779B97F4A7C15 - (1 << 64)  # odd: 2^64 divided by the golden ratio
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
AT_ONCE = 1 << 22  # elements: their 64-bit copies are 32 MiB


@torch.no_grad()
def hash_bits(tensor: Tensor) -> Tensor:
    """A 64-bit hash of a tensor's bits and of where they stand, [] int64 on its device; the same for the same bits.

    Every element, as an integer, times an odd number of its place, summed modulo 2^64: any change of one element shows.
    """
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    bits = tensor.detach().contiguous().view(-1).view(_BITS[tensor.element_size()])
    for start in range(0, bits.numel(), AT_ONCE):
        part = bits[start : start + AT_ONCE].to(torch.int64)
        places = torch.arange(start, start + part.numel(), device=tensor.device)
        total += (part * (places * 2 + 1).mul_(_WEIGHT)).sum()
    return total
