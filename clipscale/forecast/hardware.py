"""Devices by their datasheets: memory, rates of products, bandwidths. What is reached of them is seconds.py's matter.

    find_gpu("h100")                 # Device(name="h100", memory_bytes=80_000_000_000, ...)
    this_machine()                   # its GPU, as the driver's files name it, or its CPU

Rates are dense and without boost tricks: NVIDIA's datasheets of the SXM parts where there are several.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from clipscale.errors import UserError
from clipscale.words import counted, did_you_mean

CORE_FLOPS = 50e9  # float32 products of a core; measured here: 57e9 a thread of an AMD EPYC
_CPU_BANDWIDTH, _CPU_NETWORK = 20e9, 1.25e9
_DRIVER = Path("/proc/driver/nvidia/gpus")


@dataclass(frozen=True)
class Device:
    """One of them, and how it is tied to others. Bandwidths are bytes a second, in one direction."""

    name: str
    memory_bytes: int
    half: float
    """Operations a second of fp16 and bf16 products."""
    tf32: float
    fp32: float
    bandwidth: float
    """Of its memory."""
    link: float
    """To each of the other GPUs of its node together."""
    network: float
    """Out of the node, of this GPU's share of the adapters."""
    host: float
    """To and from host memory."""
    per_node: int = 8
    cores: int = 0
    """Of a CPU; 0: a GPU."""

    @property
    def on_gpu(self) -> bool:
        return not self.cores


def _gpu(
    name: str, gigabytes: float, half: float, tf32: float, fp32: float, memory: float, link: float, network: float
) -> Device:
    """Rates in TFLOP/s, bandwidths in GB/s."""
    host = 55.0 if half > 900 else 25.0  # PCIe 5 or 4, x16
    rates = half * 1e12, tf32 * 1e12, fp32 * 1e12
    return Device(name, int(gigabytes * 1e9), *rates, *(rate * 1e9 for rate in (memory, link, network, host)))


GPUS = {
    device.name: device
    for device in (
        _gpu("a100", 80, 312, 156, 19.5, 2039, 300, 25),
        _gpu("a100-40", 40, 312, 156, 19.5, 1555, 300, 25),
        _gpu("a800", 80, 312, 156, 19.5, 2039, 200, 25),
        _gpu("h100", 80, 989, 494, 67, 3350, 450, 50),
        _gpu("h200", 141, 989, 494, 67, 4800, 450, 50),
        _gpu("b200", 180, 2250, 1125, 75, 7700, 900, 50),
        _gpu("l40s", 48, 362, 183, 91.6, 864, 25, 12.5),
        _gpu("rtx4090", 24, 165, 82.6, 82.6, 1008, 25, 12.5),
    )
}


def find_gpu(name: str) -> Device:
    """UserError for one that has no row."""
    device = GPUS.get(name.lower())
    if device is None:
        hint = did_you_mean(name.lower(), GPUS) or f"those with a datasheet here are {', '.join(GPUS)}"
        raise UserError(f"--gpu={name}: no such GPU; {hint}; of another, --gpu-memory tells whether a run fits")
    return device


def this_machine(wanted: str) -> Device:
    """The device that a run with `device=wanted` would take here.

    Raises:
        UserError: the GPU has no row, or is asked for and not there.
    """
    models = [] if wanted == "cpu" else sorted(_DRIVER.glob("*/information"))
    if not models:
        if wanted == "cuda":
            raise UserError("device=cuda, and this machine has no GPU: say for which the plan is, by --gpu")
        return cpu()
    model = next(line.split(":")[1].strip() for line in models[0].read_text().splitlines() if line.startswith("Model"))
    squeezed = model.lower().replace(" ", "")
    names = [name for name in GPUS if name.partition("-")[0] in squeezed]
    if not names:
        raise UserError(f"this machine's GPU, {model}, has no datasheet here; say --gpu (one like it) or --gpu-memory")
    return GPUS["a100-40" if "a100" in names and "40gb" in squeezed else names[-1]]


def cpu() -> Device:
    """This machine's, with all of its memory."""
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    rate, name = cores * CORE_FLOPS, f"cpu ({counted(cores, 'core')})"
    bandwidths = _CPU_BANDWIDTH, _CPU_BANDWIDTH, _CPU_NETWORK, _CPU_BANDWIDTH
    return Device(name, memory, rate, rate, rate, *bandwidths, per_node=1, cores=cores)
