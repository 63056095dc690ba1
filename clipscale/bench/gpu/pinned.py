"""Page-locked memory as the loader has it: what locking costs, and what copies to the device gain by it.

list(pinned_rows(world))                 # {"what": "page-lock 4.0 GB", "value": 1.9, "unit": "s"}, ...
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from clipscale.bench.gpu.timing import timed
from clipscale.data.load.blocks import Blocks, Layout
from clipscale.dist import World

_LAYOUTS = {"cuda": Layout(blocks=104, chunk=256, side=224, length=77), "cpu": Layout(2, 8, 32, 8)}  # 4 GB, 50 KB
_FAULT_THREADS = 8


def pinned_rows(world: World) -> Iterator[dict[str, Any]]:
    """Seconds and GB/s, as rows (what, value, unit)."""
    device, layout = world.device, _LAYOUTS[world.device.type]
    size = f"{layout.total_bytes / 1e9:.1f} GB"
    yield {"what": "threads of this process's machine", "value": os.cpu_count(), "unit": ""}
    blocks = Blocks.make(layout)
    yield _seconds(f"fault in {size} by {_FAULT_THREADS} threads", lambda: blocks.fault_in(_FAULT_THREADS))
    target = torch.empty(blocks.images[0].shape, dtype=torch.uint8, device=device)

    def rate(what: str, source: torch.Tensor) -> dict[str, Any]:
        times = timed(lambda: target.copy_(source, non_blocking=True), device)
        return {"what": what, "value": source.nbytes / times.device_ms / 1e6, "unit": "GB/s"}

    yield rate("copy a chunk to the device, pageable", blocks.images[0])
    if device.type == "cpu":
        yield {"what": f"page-lock {size}", "value": "no GPU to lock it for", "unit": ""}
        return
    try:
        yield _seconds(f"page-lock {size}", blocks.pin)
    except RuntimeError as error:
        yield {"what": f"page-lock {size}", "value": f"refused: {error}", "unit": ""}
    else:
        yield rate("copy a chunk to the device, page-locked", blocks.images[1])
        yield _seconds(f"unlock {size}", blocks.unpin)
    staging: list[torch.Tensor] = []
    make = lambda: staging.append(torch.empty(layout.total_bytes, dtype=torch.uint8, pin_memory=True))  # noqa: E731
    yield _seconds(f"{size} of torch's own page-locked memory", make)
    chunk = staging[0][: blocks.images[0].nbytes].view(blocks.images[0].shape)
    yield rate("copy a chunk to the device, from that", chunk)


def _seconds(what: str, work: Callable[[], Any]) -> dict[str, Any]:
    start = time.perf_counter()
    work()
    return {"what": what, "value": time.perf_counter() - start, "unit": "s"}
