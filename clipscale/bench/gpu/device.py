"""What the device is, and what it reaches: plain matrix products, and copies within its memory.

list(device_rows(world))                 # {"what": "product fp16 8192^3", "value": 764.2, "unit": "TFLOP/s"}, ...
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from typing import Any

import torch

from clipscale.bench.gpu.timing import product_rate, timed
from clipscale.dist import World

_PRECISIONS = {"cuda": ("fp16", "bf16", "tf32"), "cpu": ("fp32",)}
_COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 22}
_ASKED = (
    *("power.limit", "power.draw", "clocks.sm", "clocks.max.sm", "clocks.mem", "temperature.gpu", "memory.used"),
    *("utilization.gpu", "compute_mode", "pcie.link.gen.current", "pcie.link.width.current"),
)


def device_rows(world: World) -> Iterator[dict[str, Any]]:
    """Rates in TFLOP/s and GB/s, medians, as rows (what, value, unit)."""
    device = world.device
    if device.type == "cuda":
        yield from _card(device)
    for precision in _PRECISIONS[device.type]:
        size, rate = product_rate(precision, device)
        yield {"what": f"product {precision} {size}^3", "value": rate, "unit": "TFLOP/s"}
    size = _COPY_BYTES[device.type]
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    rate = 2 * size / timed(lambda: target.copy_(source), device).device_ms / 1e6
    yield {"what": "copy within its memory, read and written", "value": rate, "unit": "GB/s"}


def _card(device: torch.device) -> Iterator[dict[str, Any]]:
    """As torch and nvidia-smi know it; without nvidia-smi, torch alone."""
    known = torch.cuda.get_device_properties(device)
    yield {"what": "memory", "value": known.total_memory / 1e9, "unit": "GB"}
    yield {"what": "multiprocessors", "value": known.multi_processor_count, "unit": ""}
    yield {"what": "compute capability", "value": f"{known.major}.{known.minor}", "unit": ""}
    yield {"what": "second-level cache", "value": known.L2_cache_size / 2**20, "unit": "MiB"}
    query = ["nvidia-smi", f"--id=GPU-{known.uuid}", f"--query-gpu={','.join(_ASKED)}", "--format=csv,noheader"]
    try:
        line = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        yield {"what": "nvidia-smi", "value": f"does not tell: {error}", "unit": ""}
        return
    for what, value in zip(_ASKED, line.split(", "), strict=False):
        yield {"what": what, "value": value.strip(), "unit": ""}
