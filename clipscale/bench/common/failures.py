"""What a contestant's failure is called in a result.

first_line(error)          # CUDA error: an illegal memory access was encountered
"""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """Of its message, or its type where there is none; 120 characters at most."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:120]
