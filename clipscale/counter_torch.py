"""counter.py's draws on the device that trains, bit for bit: torch's 64-bit integers, no loop, nothing waits.

    key = fold(seed, "augment")                            # counter.py
    keys_M = draw(key, positions_M)                        # a key for each sample, on the positions' own device
    uniform(keys_M[:, None], torch.arange(4)[None])        # four numbers in [0, 1) for each

torch has no full set of operations on uint64, so the bits are held as int64, whose products wrap around alike.
"""

from __future__ import annotations

from torch import Tensor


def draw(key: int | Tensor, counter: Tensor) -> Tensor:
    """`counter.draw`: its 64 bits as int64, one for each element of `counter` (int64); `key` broadcasts against it."""
    key = _signed(key) if isinstance(key, int) else key
    return _mix(_mix(counter * _signed(0x9E3779B97F4A7C15) + key) ^ key)


def uniform(key: int | Tensor, counter: Tensor) -> Tensor:
    """`counter.uniform`: float64 in [0, 1)."""
    return _shifted(draw(key, counter), 11).double() * 2.0**-53


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """To the right as unsigned numbers are: zeros come in, not the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x
