"""What a tower costs that no formula knows, of timm or Hugging Face for one: built and run without memory or device.

    image, text = built_towers(config.model, config.towers, half=True)

torch's fake tensors have a shape, a type and a device and no numbers: a model of any size is made and goes through its
layers at once, also as on a GPU that is not here. Operations are torch's own count (torch.utils.flop_counter), bytes
those that autograd saves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from clipscale.config import Model, TowerSettings
from clipscale.forecast.towers import TowerFacts
from clipscale.step.costs import saved_storages
from clipscale.towers import Tower, build_towers
from clipscale.towers.fast import speed_up

_FEW, _MANY = 8, 16  # samples
_SHORT = 16  # tokens
_ATTENTION = ("attn", "self_attn", "attention")  # what a layer calls its own


def built_towers(model: Model, settings: TowerSettings, *, half: bool) -> tuple[TowerFacts, TowerFacts]:
    """Image and text tower of a model that `check_model` lets pass. `half`: as under autocast on a GPU.

    Raises:
        UserError: it cannot be built.
    """
    with torch.device("meta"):
        towers = build_towers(model, replace(settings, compile=False, residual="open_clip"), device="meta")
    for tower in (towers.image, towers.text):
        speed_up(tower.encoder, settings)  # the residual stream, which wants autocast: it comes below
    towers.model.train()
    device = "cuda" if half else "cpu"
    with FakeTensorMode():
        _place(towers.model, device)
        side, length = towers.image_size, towers.context_length

        def pictures(samples: int) -> Tensor:
            return torch.zeros(samples, 3, side, side, dtype=torch.uint8, device=device)

        def captions(samples: int, tokens: int = length) -> Tensor:
            return torch.zeros(samples, tokens, dtype=torch.int64, device=device)

        short = _SHORT if towers.text.cut is not None and length > _SHORT else None
        return _facts(towers.image, pictures, 1, None, half), _facts(towers.text, captions, length, short, half)


def _place(model: nn.Module, device: str) -> None:
    """Every parameter and buffer as a fake one on a device."""
    made: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            twin = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            made[id(tensor)] = nn.Parameter(twin, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else twin
        return made[id(tensor)]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            tensors.update({name: fake(tensor) for name, tensor in tensors.items() if tensor is not None})


def _facts(tower: Tower, inputs: Callable[..., Tensor], tokens: int, short: int | None, half: bool) -> TowerFacts:
    """`tokens` of a full sample (of a picture, 1: it is never cut); `short`: those of a caption that is cut."""
    sample = (_graph(tower, inputs(_MANY), half) - _graph(tower, inputs(_FEW), half)) / (_MANY - _FEW)
    flop, of_token, token = _flop(tower, inputs(1)), 0.0, 0.0
    if short is not None:
        token = (_graph(tower, inputs(_FEW), half) - _graph(tower, inputs(_FEW, short), half)) / (
            _FEW * (tokens - short)
        )
        of_token = (flop - _flop(tower, inputs(1, short))) / (tokens - short)
    layers = max(1, sum(name.rpartition(".")[2] in _ATTENTION for name, _ in tower.encoder.named_modules()))
    return TowerFacts(
        name=tower.name,
        parameters=sum(each.numel() for each in tower.encoder.parameters()),
        cast=sum(each.numel() for name, each in tower.encoder.named_parameters() if "embed" not in name),
        tokens=tokens,
        cuttable=short is not None,
        flop=(flop - of_token * tokens, of_token, 0.0),
        graph_sample=max(0.0, sample - token * tokens),
        graph_token=token,
        replay_token=0.3 * sample / layers / tokens,  # of what a layer keeps: a plain tower's share
        formula=False,
    )


def _graph(tower: Tower, inputs: Tensor, half: bool) -> int:
    """Bytes that the graph of a chunk keeps beyond what it shares with that of another chunk."""
    with _as_on_a_gpu() if half else nullcontext(), torch.enable_grad():
        shared, first = saved_storages(tower, inputs)
        own, second = saved_storages(tower, inputs)
    del first, second  # alive until here, or the second would lie where the first has been
    return sum(size for storage, size in own.items() if storage not in shared)


def _flop(tower: Tower, inputs: Tensor) -> int:
    """Of a forward pass in float32, attention as plain products."""
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        tower(inputs)
    return counter.get_total_flops()


@contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    """Within: bf16 autocast and fused attention, which torch itself switches off where no GPU is there."""
    enabled, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        with mock.patch.object(F, "scaled_dot_product_attention", _fused_attention):
            yield
    finally:
        torch.set_autocast_enabled("cuda", enabled)
        torch.set_autocast_dtype("cuda", dtype)
        torch.clear_autocast_cache()


def _fused_attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_, **__) -> Tensor:
    """What a GPU takes: flash attention; its memory is that of the others that take a mask."""
    query, key, value = (each.to(torch.bfloat16) for each in (query, key, value))
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]
