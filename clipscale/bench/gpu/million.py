"""A step of a million pairs with its time by part: towers by pass, loss, optimizer.

list(million_rows(world))                # {"pairs": 1048576, "step s": 300.1, "image forward s": 95.2, ...}

A smaller step goes before it, which compiles and tunes, and is there if the time does not suffice for the large one.
The pictures are noise, a few chunks that come again and again: a million of them would take 158 GB of memory.

Shapes: N pairs, M pictures of a chunk, S side of a picture.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clipscale.bench.gpu.towers import TINY
from clipscale.bench.step.captions import draw_captions, read_lengths
from clipscale.bench.step.trainee import Trainee, build_trainee
from clipscale.config import Model
from clipscale.data.load.replay import Chunk, to_device
from clipscale.data.load.shape import spans
from clipscale.dist import World
from clipscale.loss import contrastive_grads_in_place
from clipscale.step import StepPlan, TowerPlan, gradcache_step
from clipscale.telemetry.parts import Parts

_DISTINCT_CHUNKS = 8


class _Size(NamedTuple):
    model: Model
    precision: str
    pairs: tuple[int, ...]
    image_chunk: int
    text_chunk: int


_SIZES = {
    "cuda": _Size(Model(name="ViT-B-32"), "bf16", (2**14, 2**20), 1024, 2048),
    "cpu": _Size(TINY, "fp32", (4, 8), 2, 4),
}


def million_rows(world: World) -> Iterator[dict[str, Any]]:
    """Seconds of a whole step and of its parts, peak GB; a row a batch. Chunks are of fixed size, no graph is kept."""
    size = _SIZES[world.device.type]
    trainee = build_trainee(size.model, device=world.device, precision=size.precision, seed=0)
    for pairs in size.pairs:
        trainee.restore()
        yield _step(trainee, pairs, size)


def _step(trainee: Trainee, pairs: int, size: _Size) -> dict[str, Any]:
    device, towers = trainee.device, trainee.towers
    images = _Noise(pairs, size.image_chunk, towers.image_size, pin=device.type == "cuda")
    tokens = draw_captions(
        read_lengths(None), pairs, length=towers.context_length, vocabulary=towers.vocabulary, seed=0
    )
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainee.begin()
    parts = Parts(device)
    result = gradcache_step(
        towers,
        images,
        tokens,
        torch.ones(pairs, dtype=torch.bool),
        plan=StepPlan(TowerPlan(size.image_chunk), TowerPlan(size.text_chunk)),
        loss_and_grads=contrastive_grads_in_place,
        key=0,
        parts=parts,
    )
    with parts.part("optimizer"):
        trainee.finish(clip=math.inf)
    seconds = parts.take()
    whole = sum(seconds.values())
    found = {"pairs": pairs, "step s": whole, "pairs/s": pairs / whole}
    found |= {f"{part} s": spent for part, spent in seconds.items()}
    found["tokens a caption"] = result.tokens_per_caption
    if device.type == "cuda":
        found["peak GB"] = torch.cuda.max_memory_allocated() / 1e9
    return found


class _Noise:
    """Pictures [N, 3, S, S], the same few chunks of M again and again."""

    def __init__(self, pairs: int, chunk: int, side: int, *, pin: bool) -> None:
        self._pairs, self._chunk = pairs, chunk
        noise = torch.randint(0, 256, (_DISTINCT_CHUNKS, chunk, 3, side, side), dtype=torch.uint8)
        self._noise = noise.pin_memory() if pin else noise

    def __len__(self) -> int:
        return self._pairs

    def first(self, device: torch.device, kept: int = 0) -> Iterator[tuple[int, Tensor]]:
        del kept
        return self.again(device)

    def again(self, device: torch.device, kept: int = 0) -> Iterator[tuple[int, Tensor]]:
        def chunks() -> Iterator[Chunk]:
            for number, (start, stop) in enumerate(spans(kept, self._pairs, self._chunk)):
                yield Chunk(start, self._noise[number % _DISTINCT_CHUNKS][: stop - start])

        return to_device(chunks(), device)
