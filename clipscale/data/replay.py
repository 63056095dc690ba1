"""The replay buffer: a step's inputs stay in host memory and visit the device one chunk at a time, twice.

    for start, images in chunks(batch.images, size=256, device=device):
        tower(images)

On a GPU the next chunk's copy is in flight while the current one is computed on: `pin` puts a tensor into page-locked
memory for that. Both passes of gradient caching read the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch


def pin(tensor: torch.Tensor, device: torch.device | None) -> torch.Tensor:
    """Page-locked where `device` is a GPU, unchanged elsewhere."""
    return tensor.pin_memory() if device is not None and device.type == "cuda" else tensor


def chunks(inputs: torch.Tensor, size: int, device: torch.device) -> Iterator[tuple[int, torch.Tensor]]:
    """(start, inputs[start : start + size] on `device`), in order; the last chunk may be shorter.

    When the iteration has ended, nothing reads `inputs` any more: it may be filled anew.

    Args:
        inputs: [N, ...] in host memory (or on the device already).
    """
    if device.type != "cuda" or inputs.device.type == "cuda":
        for start in range(0, len(inputs), size):
            yield start, inputs[start : start + size].to(device)
        return
    copying, computing = torch.cuda.Stream(device), torch.cuda.current_stream(device)

    def fetch(start: int) -> torch.Tensor:
        with torch.cuda.stream(copying):
            return inputs[start : start + size].to(device, non_blocking=True)

    following = fetch(0)
    for start in range(0, len(inputs), size):
        current = following
        computing.wait_stream(copying)  # for this chunk's copy, before the next one is asked for
        current.record_stream(computing)
        following = fetch(start + size)
        yield start, current
    copying.synchronize()
