"""What a device is called, and how it says that its memory is full.

device_name(torch.device("cuda"))        # 'NVIDIA H100 80GB HBM3'
is_out_of_memory(error)
"""

from __future__ import annotations

import platform
from pathlib import Path

import torch


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's and how many threads torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"


def is_out_of_memory(error: BaseException) -> bool:
    """torch's CUDA error, Python's, or one without a class of its own: torch's CPU allocator's, the CUDA driver's,
    cuBLAS's."""
    words = ("DefaultCPUAllocator", "can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in str(error) for word in words)
