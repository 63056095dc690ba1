"""A model's towers alone, a chunk forward and backward: clipscale's forwards beside open_clip's, each switch by itself.

    found = measure_towers(model, device, precision="bf16", samples=(8, 16), seconds=10, seed=0)
    found["image"][0]          # {"way": "open_clip", "ms": ..., "time_to_open_clip": ..., "moved_bytes": ..., ...}

All ways share one set of weights and take turns. Bytes are counted: what every operation but a view reads and writes,
and what the graph keeps for the backward pass. On a CPU the count is that of a GPU's autocast, which has LayerNorm in
float32 where a CPU's leaves it alone; the time is the CPU's own.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from clipscale.bench.common.spread import Spread
from clipscale.bench.common.turns import Supplier, take_turns
from clipscale.config import AS_OPEN_CLIP, Model, TowerSettings
from clipscale.step.costs import saved_bytes
from clipscale.towers import Tower, Towers, autocast_dtype, build_towers

NOTE = (
    "A chunk of noise, pictures or captions of full length, goes through a tower forwards and backwards in training "
    "mode; all ways share the weights and take turns. Bytes are counted: what every operation but a view reads and "
    "writes, and what the graph keeps; on a CPU as by a GPU's autocast, which has LayerNorm in float32."
)
OPEN_CLIP, OURS = "open_clip", "clipscale"
_WAYS = {
    OPEN_CLIP: AS_OPEN_CLIP,
    "fast_attention": dataclasses.replace(AS_OPEN_CLIP, fast_attention=True),
    "fast_norms": dataclasses.replace(AS_OPEN_CLIP, fast_norms=True),
    "residual=bf16": dataclasses.replace(AS_OPEN_CLIP, residual="bf16"),
    OURS: TowerSettings(),
    f"{OURS}, residual=bf16": TowerSettings(residual="bf16"),
    f"{OURS}, checkpoint_blocks": TowerSettings(checkpoint_blocks=True),
    f"{OURS}, compile": TowerSettings(compile=True),
}
_ROUNDS = 5


def measure_towers(
    model: Model,
    device: torch.device,
    *,
    precision: str,
    samples: tuple[int, int],
    seconds: float,
    compiled: bool,
    seed: int,
) -> dict[str, list[dict[str, Any]]]:
    """Rows of the image and of the text tower, by way; one that changes nothing of a tower has none.

    Args:
        samples: of a chunk of pictures, and of captions of full length.
        seconds: for the turns of one way.
        compiled: also by torch.compile, whose bytes are not counted.
    """
    ways = _build(model, device, precision, seed, compiled=compiled)
    return {
        name: _rows({way: getattr(towers, name) for way, towers in ways.items()}, ways[OPEN_CLIP], count, seconds)
        for name, count in zip(("image", "text"), samples, strict=True)
    }


def _build(model: Model, device: torch.device, precision: str, seed: int, *, compiled: bool) -> dict[str, Towers]:
    autocast = autocast_dtype(precision, device)
    built: dict[str, Towers] = {}
    for way, settings in _WAYS.items():
        if (precision == "fp32" and ("bf16" in way or way == "fast_norms")) or (settings.compile and not compiled):
            continue
        towers = build_towers(model, settings, device=device, autocast=autocast, seed=seed)
        if built:
            towers.model.load_state_dict(built[OPEN_CLIP].model.state_dict(keep_vars=True), assign=True)
        towers.model.train()
        built[way] = towers
    return built


def _rows(ways: dict[str, Tower], towers: Towers, samples: int, seconds: float) -> list[dict[str, Any]]:
    inputs = towers.noise(getattr(towers, next(iter(ways.values())).name), samples)
    ways = {way: tower for way, tower in ways.items() if way in (OPEN_CLIP, OURS) or _differs(tower, ways[OPEN_CLIP])}
    field = [Supplier(way, partial(_pass, tower, inputs), ahead=0, filling=1) for way, tower in ways.items()]
    turns = take_turns(field, rounds=_ROUNDS, seconds=seconds / _ROUNDS)[1]
    times = {way: [1e3 * samples * turn.wall_seconds / turn.items for turn in done] for way, done in turns.items()}
    return [
        {
            "way": way,
            "samples": samples,
            "ms": Spread.of(times[way])._asdict(),
            "time_to_open_clip": statistics.median(
                theirs / ours for ours, theirs in zip(times[way], times[OPEN_CLIP], strict=True)
            ),
            "moved_bytes": None if _WAYS[way].compile else moved_bytes(partial(_pass, tower, inputs)),
            "kept_bytes": None if _WAYS[way].compile else _kept_bytes(tower, inputs),
        }
        for way, tower in ways.items()
    ]


def _differs(tower: Tower, other: Tower) -> bool:
    """Whether a switch does anything here: other classes of modules."""
    kinds = [[type(module) for module in one.encoder.modules()] for one in (tower, other)]
    return kinds[0] != kinds[1]


def _pass(tower: Tower, inputs: Tensor) -> int:
    with tower.shared_casts():
        embeddings = tower(inputs)
        embeddings.backward(torch.ones_like(embeddings))
    for parameter in tower.encoder.parameters():
        parameter.grad = None
    if tower.device.type == "cuda":
        torch.cuda.synchronize()
    return len(inputs)


def _kept_bytes(tower: Tower, inputs: Tensor) -> int:
    with norms_as_on_a_gpu():
        return saved_bytes(tower, inputs)


# --- what is counted --------------------------------------------------------------------------------------------------


class _Moved(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        read = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        written = [each for each in tree_leaves(result) if isinstance(each, Tensor)]
        if not func.is_view and not func.name().startswith(("aten::detach", "aten::empty", "aten::_unsafe_view")):
            self.count += sum(each.numel() * each.element_size() for each in (*read, *written))
        return result


def moved_bytes(call: Callable[[], Any]) -> int:
    """What the operations of a call read and write, forward and backward."""
    with norms_as_on_a_gpu(), _Moved() as moved:
        call()
    return moved.count


@contextmanager
def norms_as_on_a_gpu() -> Iterator[None]:
    """Within: a CPU's autocast has LayerNorm in float32, as a GPU's has it."""
    library = torch.library.Library("aten", "IMPL")

    def layer_norm(x, shape, weight=None, bias=None, eps=1e-5, _=True):
        with torch.autocast("cpu", enabled=False):
            return F.layer_norm(x.float(), shape, weight, bias, eps)

    library.impl("layer_norm", layer_norm, "AutocastCPU")
    try:
        yield
    finally:
        library._destroy()
