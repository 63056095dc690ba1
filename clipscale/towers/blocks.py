"""The blocks of an encoder, and activation checkpointing block by block (Chen et al., arXiv 1604.06174).

    checkpoint_blocks(encoder)                 # once, after building
    with whole_blocks(encoder):
        encoder(inputs)                        # as without

Of a block only its input is kept for the backward pass, which runs the block once more: the same bits, for one more
forward pass of the blocks. Layers that draw by position find the draws of that pass again (draws.py), those that draw
from torch's generator its state.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from clipscale.errors import require
from clipscale.towers.draws import redrawing

_NAMES = "resblocks", "blocks"  # open_clip's lists of them, and timm's


class _Checkpointed:
    whole: bool = False

    def forward(self, *args, **kwargs):
        if self.whole or not torch.is_grad_enabled():
            return super().forward(*args, **kwargs)
        return checkpoint(super().forward, *args, use_reentrant=False, context_fn=redrawing, **kwargs)


def blocks_of(encoder: nn.Module) -> list[nn.Module]:
    """Of an open_clip transformer or a timm backbone, in order; of another encoder none."""
    lists = [module for name, module in encoder.named_modules() if name.split(".")[-1] in _NAMES]
    return [block for blocks in lists for block in blocks.children()]


def known_blocks(encoder: nn.Module, setting: str) -> list[nn.Module]:
    """The same, for what `setting` does to them. UserError: an encoder whose blocks are not known."""
    blocks = blocks_of(encoder)
    require(
        bool(blocks),
        f"{setting}=true: the blocks of {type(encoder).__name__} are not known; set it to false, or take a tower of "
        "open_clip's or timm's",
    )
    return blocks


def checkpoint_blocks(encoder: nn.Module) -> None:
    """Keep of every block its input alone; the modules and the state dict stay.

    Raises:
        UserError: an encoder whose blocks are not known.
    """
    for block in known_blocks(encoder, "towers.checkpoint_blocks"):
        block.__class__ = _checkpointed(type(block))


def checkpointed(encoder: nn.Module) -> list[nn.Module]:
    """Its blocks that are."""
    return [block for block in blocks_of(encoder) if isinstance(block, _Checkpointed)]


@contextmanager
def whole_blocks(encoder: nn.Module) -> Iterator[None]:
    """Within: nothing is checkpointed."""
    blocks = checkpointed(encoder)
    for block in blocks:
        block.whole = True
    try:
        yield
    finally:
        for block in blocks:
            block.whole = False


@cache
def _checkpointed(kind: type[nn.Module]) -> type[nn.Module]:
    return type(kind.__name__, (_Checkpointed, kind), {"__module__": kind.__module__})
