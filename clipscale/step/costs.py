"""What the graphs of a chunk hold in memory, counted: for the decision how many are kept from pass 1 to pass 2.

    graph_costs(towers)                       # (GraphCost of the image tower, GraphCost of the text tower)

Counted are the tensors that autograd saves, each storage once, without the weights and without the copies of weights
that all graphs share. A few small chunks tell the rest: the bytes are linear in samples, and in tokens where attention
keeps no square; where it does (plain attention on a CPU), what lies between is overestimated. Of checkpointed blocks
the graph keeps the inputs alone; what the largest of them keeps while it is run again is counted apart.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from clipscale.step.gradcache import Encoder
from clipscale.step.plan import GraphCost
from clipscale.towers import Tower, Towers
from clipscale.towers.blocks import checkpointed, whole_blocks

_SAMPLES = 8, 16  # of the chunks that are measured
_SHORT = 16  # tokens


def graph_costs(towers: Towers) -> tuple[GraphCost, GraphCost]:
    """Of the image and of the text tower, as they stand: a training mode counts what training keeps."""
    side, length, device = towers.image_size, towers.context_length, towers.image.device

    def pictures(samples: int) -> Tensor:
        return torch.zeros(samples, 3, side, side, dtype=torch.uint8, device=device)

    def captions(samples: int, tokens: int) -> Tensor:
        return torch.zeros(samples, tokens, dtype=torch.int64, device=device)

    few, many = _SAMPLES
    image = _line(saved_bytes(towers.image, pictures(few)), saved_bytes(towers.image, pictures(many)))
    full = saved_bytes(towers.text, captions(few, length))
    text = _line(full, saved_bytes(towers.text, captions(many, length)))
    if towers.text.cut is not None and length > _SHORT:
        token = (full - saved_bytes(towers.text, captions(few, _SHORT))) / (few * (length - _SHORT))
        text = GraphCost(text.fixed, max(0.0, text.sample - token * length), token)
    blocks = (block_bytes(towers.image, pictures(few)), block_bytes(towers.text, captions(few, length)))
    return tuple(replace(cost, block=size / few) for cost, size in zip((image, text), blocks, strict=True))


def _line(few: int, many: int) -> GraphCost:
    sample = (many - few) / (_SAMPLES[1] - _SAMPLES[0])
    return GraphCost(max(0.0, few - sample * _SAMPLES[0]), sample)


def saved_bytes(tower: Encoder, inputs) -> int:
    """Bytes that the graph of one chunk keeps beyond what it shares with that of another chunk."""
    devices = [tower.device] if tower.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.enable_grad(), tower.shared_casts():
        shared, first = saved_storages(tower, inputs)
        own, second = saved_storages(tower, inputs)
    del first, second  # alive until here, or the second would lie where the first has been
    return sum(size for storage, size in own.items() if storage not in shared)


def block_bytes(tower: Tower, inputs: Tensor) -> int:
    """Bytes that the largest checkpointed block keeps while the backward pass runs it again; 0: there is none."""
    blocks = checkpointed(tower.encoder)
    if not blocks:
        return 0
    devices, sizes, found = [tower.device] if tower.device.type == "cuda" else [], [], {}
    with ExitStack() as stack:
        for context in (torch.random.fork_rng(devices), torch.enable_grad(), tower.shared_casts()):
            stack.enter_context(context)
        stack.enter_context(whole_blocks(tower.encoder))
        shared, first = saved_storages(tower, inputs)

        def after(*_: object) -> None:
            sizes.append(sum(size for storage, size in found.items() if storage not in shared))

        for block in blocks:
            stack.callback(block.register_forward_pre_hook(lambda *_: found.clear()).remove)
            stack.callback(block.register_forward_hook(after).remove)
        saved_storages(tower, inputs, found)
    del first  # alive until here, as in `saved_bytes`
    return max(sizes)


def saved_storages(tower: Encoder, inputs, found: dict[int, int] | None = None) -> tuple[dict[int, int], Tensor]:
    """Bytes of each storage that a call's graph saves, by what torch calls it, written into `found`; and the
    embeddings, which hold the graph: a name is one storage's only as long as that is there."""
    weights = {each.untyped_storage()._cdata for each in tower.encoder.state_dict().values()}
    found = {} if found is None else found

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            found[storage._cdata] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        embeddings = tower(inputs)
    return found, embeddings
