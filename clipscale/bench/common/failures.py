"""What a contestant's failure is called in a result.

first_line(error)          # CUDA error: an illegal memory access was encountered
is_out_of_memory(error)    # whoever ran out of it
"""

from __future__ import annotations

import torch


def first_line(error: BaseException) -> str:
    """Of its message, or its type where there is none; 120 characters at most."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:120]


def is_out_of_memory(error: Exception) -> bool:
    """torch's CUDA error, Python's, or one without a class of its own: torch's CPU allocator's, the CUDA driver's."""
    words = ("DefaultCPUAllocator", "CUDA error: out of memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in str(error) for word in words)
