"""Patch dropout and drop path that draw by position: the same on any ranks, in any chunks, in any order.

    draw_by_position(encoder)                      # once, after building: open_clip's and timm's layers
    with drawing(key, positions_M):
        features_MD = encoder(inputs)              # in training mode
    draws_by_chunk(encoder, lambda: encoder(x))    # ['blocks.0.attn.attn_drop']: layers that still draw from torch

What a sample draws in a layer is an endless sequence of numbers, a function of (key, name of the layer, the sample's
position); each call of the layer in a forward pass takes its next part. Nothing is kept and nothing waits for the host.
Outside of `drawing` these layers draw from torch's generator, as they did before. What activation checkpointing runs
again in the backward pass opens the draws of its forward pass once more (`redrawing`).

Patches are kept in ascending order: a transformer takes them as a set, and rows that lie in order are read faster.

Shapes: M chunk, N tokens, K of them kept, W width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import open_clip.transformer
import timm.layers
import torch
from torch import Tensor, nn

from clipscale.counter import fold
from clipscale.counter_torch import draw, uniform

_CALLS_APART = 1 << 32  # numbers of a layer's sequence: more than a call takes


class _Open:
    """What the layers look at: the samples of the forward pass under way."""

    def __init__(self) -> None:
        self.keys_M: Tensor | None = None  # None: no `drawing` is open
        self.calls: Counter[int] = Counter()  # of each layer so far


_open = _Open()


@contextmanager
def drawing(key: int, positions_M: Tensor) -> Iterator[None]:
    """A forward pass over the samples at these positions (int64 [M], on the device of the inputs)."""
    before = _open.keys_M, _open.calls
    _open.keys_M, _open.calls = draw(key, positions_M), Counter()
    try:
        yield
    finally:
        _open.keys_M, _open.calls = before


class _Redrawing:
    """Within, as often as it is entered: the draws that were open when it was made, from where they stood."""

    def __init__(self) -> None:
        self._then = _open.keys_M, _open.calls.copy()

    def __enter__(self) -> None:
        self._now = _open.keys_M, _open.calls
        _open.keys_M, _open.calls = self._then[0], self._then[1].copy()

    def __exit__(self, *_: object) -> None:
        _open.keys_M, _open.calls = self._now


def redrawing() -> tuple[AbstractContextManager, AbstractContextManager]:
    """`context_fn` of torch's checkpoint: what it runs now draws as ever, what it runs again the same once more."""
    return nullcontext(), _Redrawing()


def _next(layer: int, rows: int, numbers: int) -> tuple[Tensor, Tensor]:
    """Key and counter of this call's draws: `numbers` for each of `rows`, of which each sample has equally many."""
    assert rows % len(_open.keys_M) == 0
    keys_M1 = draw(layer, _open.keys_M)[:, None]
    start = _open.calls[layer] * _CALLS_APART
    _open.calls[layer] += 1
    each = rows // len(keys_M1) * numbers
    return keys_M1, torch.arange(start, start + each, device=keys_M1.device)[None]


def _keep_patches(x: Tensor, layer: int, prob: float, prefix: int) -> tuple[Tensor, Tensor]:
    """[M, prefix + N, W] -> [M, prefix + K, W] with all of the prefix, and which of the N were kept, int64 [M, K]."""
    rows, tokens = x.shape[:2]
    patches = tokens - prefix
    draws = draw(*_next(layer, rows, patches)).view(rows, patches)
    kept_MK = draws.topk(max(1, int(patches * (1 - prob))), sorted=False).indices.sort().values
    first_M1 = torch.arange(0, rows * tokens, tokens, device=x.device)[:, None]
    prefix_MP = torch.arange(prefix, device=x.device).expand(rows, -1)
    taken = torch.cat((prefix_MP, kept_MK + prefix), dim=1) + first_M1
    return x.flatten(0, 1).index_select(0, taken.flatten()).unflatten(0, taken.shape), kept_MK


class _ByPosition(nn.Module):
    layer: int  # a key of its own; what else the layer has, it had before

    def by_position(self, prob: float) -> bool:
        return self.training and prob > 0 and _open.keys_M is not None


class OpenClipPatchDropout(_ByPosition, open_clip.transformer.PatchDropout):
    def forward(self, x: Tensor) -> Tensor:
        if not self.by_position(self.prob):
            return super().forward(x)
        return _keep_patches(x, self.layer, self.prob, int(self.exclude_first_token))[0]


class TimmPatchDropout(_ByPosition, timm.layers.PatchDropout):
    def forward(self, x: Tensor) -> Tensor:
        if not self.by_position(self.prob):
            return super().forward(x)
        return _keep_patches(x, self.layer, self.prob, self.num_prefix_tokens)[0]


class TimmPatchDropoutWithIndices(_ByPosition, timm.layers.PatchDropoutWithIndices):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        if not self.by_position(self.prob):
            return super().forward(x)
        return _keep_patches(x, self.layer, self.prob, self.num_prefix_tokens)


class TimmDropPath(_ByPosition, timm.layers.DropPath):
    def forward(self, x: Tensor) -> Tensor:
        if not self.by_position(self.drop_prob):
            return super().forward(x)
        keep = 1 - self.drop_prob
        factor = (uniform(*_next(self.layer, len(x), 1)) < keep).to(x.dtype)
        if keep > 0 and self.scale_by_keep:
            factor = factor / keep
        return x * factor.view(-1, *[1] * (x.ndim - 1))


_SWAPS: dict[type[nn.Module], type[_ByPosition]] = {
    open_clip.transformer.PatchDropout: OpenClipPatchDropout,
    timm.layers.PatchDropout: TimmPatchDropout,
    timm.layers.PatchDropoutWithIndices: TimmPatchDropoutWithIndices,
    timm.layers.DropPath: TimmDropPath,
}


def draw_by_position(encoder: nn.Module) -> None:
    """Let every layer of the known classes draw by position. Nothing else changes: settings, hooks, state dict."""
    for name, module in encoder.named_modules():
        if swap := _SWAPS.get(type(module)):
            module.__class__ = swap  # the same module, so that whoever holds it need not be found
            module.layer = fold(name)


def draws_by_chunk(encoder: nn.Module, forward: Callable[[], object]) -> list[str]:
    """Names of the modules that draw from torch's generators in `forward`, one pass of the encoder: dropout and such.

    They draw for a chunk as a whole. Told by the state of the generators around every module, hence without a list of
    classes; functional dropout and that inside of attention are the module's that calls it. Empty in eval mode. The
    generators are left as they were, no gradient is made.
    """
    device = next(encoder.parameters()).device
    devices = [device] if device.type == "cuda" else []
    found: list[str] = []
    outer: list[tuple[list[Tensor], int]] = []

    def states() -> list[Tensor]:
        return [torch.get_rng_state(), *map(torch.cuda.get_rng_state, devices)]

    def before(*_: object) -> None:
        outer.append((states(), len(found)))

    def after(module: nn.Module, *_: object) -> None:
        states_before, found_before = outer.pop()
        if len(found) == found_before and not all(map(torch.equal, states_before, states())):
            found.append(names[module])  # none inside of it did

    names = {module: name or type(module).__name__ for name, module in encoder.named_modules()}
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng(devices=devices))
        for module in names:
            stack.callback(module.register_forward_pre_hook(before).remove)
            stack.callback(module.register_forward_hook(after).remove)
        forward()
    return list(dict.fromkeys(found))
