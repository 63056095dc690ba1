"""Both towers by pass: time on the device, time of the host, and the share of a plain matrix product.

list(tower_rows(world, compiled=False))  # {"model": "ViT-B-32", "tower": "image", "chunk": 256, "forward ms": ...}, ...

Under gradient caching a chunk costs a forward without gradients, and a forward and backward: its hardware FLOPs are
those of all three, counted as they run.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from clipscale.bench.gpu.timing import product_rate, timed
from clipscale.bench.step.flops import tower_flops
from clipscale.config import Model
from clipscale.device import is_out_of_memory
from clipscale.dist import World
from clipscale.towers import build_towers
from clipscale.towers.tower import Tower, autocast_dtype

TINY = Model(  # for a CPU
    embed_dim=16,
    vision={"image_size": 16, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16},
    text={"context_length": 8, "width": 32, "heads": 2, "layers": 1},
)
_MODELS = {
    "cuda": {name: Model(name=name) for name in ("ViT-B-32", "ViT-B-16", "ViT-L-14")},
    "cpu": {"tiny": TINY},
}
_CHUNKS = {"ViT-B-32": (256, 1024), "ViT-B-16": (256,), "ViT-L-14": (128, 256), "tiny": (2,)}
_COMPILED_CHUNKS = {"ViT-B-32": (256,), "ViT-B-16": (256,), "ViT-L-14": (128,), "tiny": (2,)}  # a minute each
_ROUNDS = {"cuda": 6, "cpu": 1}


def tower_rows(world: World, *, compiled: bool) -> Iterator[dict[str, Any]]:
    """Milliseconds, samples/s under gradient caching, GFLOP a sample, peak GB; a row a model, tower and chunk."""
    device = world.device
    autocast = autocast_dtype("auto", device)
    chunks = _COMPILED_CHUNKS if compiled else _CHUNKS
    for name, model in _MODELS[device.type].items():
        rate = product_rate("bf16", device).tflops
        towers = build_towers(model, device=device, autocast=autocast)
        towers.model.train()
        for tower in (towers.image, towers.text):
            for chunk in chunks[name]:
                row = {"model": name, "tower": tower.name, "chunk": chunk}
                try:
                    yield row | _measure(tower, towers.noise(tower, chunk), rate, compiled)
                except Exception as error:
                    if not is_out_of_memory(error):
                        raise
                    yield row | {"note": "out of memory"}
                _clear(tower)


def _measure(tower: Tower, inputs: Tensor, rate: float, compiled: bool) -> dict[str, Any]:
    device, chunk = inputs.device, len(inputs)

    def forward() -> Tensor:
        with torch.no_grad():
            return tower(inputs)

    grad = torch.randn_like(forward())

    def both() -> None:
        tower(inputs).backward(grad)

    flop = tower_flops(forward) + tower_flops(both)
    found: dict[str, Any] = {}
    if compiled:
        # On a CPU, where this only shows that it runs, without the minutes of generating code.
        tower.encoder.compile(dynamic=False, backend="inductor" if device.type == "cuda" else "eager")
        start = time.perf_counter()
        forward()
        both()
        found["compilation s"] = time.perf_counter() - start
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    once, twice = (timed(call, device, rounds=_ROUNDS[device.type]) for call in (forward, both))
    seconds = (once.device_ms + twice.device_ms) / 1e3
    found |= {
        "forward ms": once.device_ms,
        "of host": once.host_ms,
        "forward+backward ms": twice.device_ms,
        "of host too": twice.host_ms,
        "samples/s": chunk / seconds,
        "GFLOP a sample": flop / chunk / 1e9,
        "of matmul": flop / seconds / 1e12 / rate,
    }
    if device.type == "cuda":
        found["peak GB"] = torch.cuda.max_memory_allocated() / 1e9
    return found


def _clear(tower: Tower) -> None:
    for parameter in tower.encoder.parameters():
        parameter.grad = None
    if tower.device.type == "cuda":
        torch.cuda.empty_cache()
