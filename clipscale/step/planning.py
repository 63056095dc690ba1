"""The plan of a run's steps, made before the first of them: sizes of chunks, and what memory allows to keep.

    plan = plan_step(config, towers, world, recorded=None)
    plan_line(plan, slots)                  # 'step: chunks of 256 pictures and 1,024 captions ...'

What `gradcache.keep_bytes=auto` finds free differs from start to start, so a run's plan lies in its checkpoints and is
followed again when the run resumes on as many ranks under the same settings.
"""

from __future__ import annotations

import dataclasses
import socket
from collections import Counter
from typing import Any

import torch

from clipscale.config import Config, GradCache
from clipscale.data.load.replay_plan import host_memory
from clipscale.dist import World
from clipscale.step.costs import graph_costs
from clipscale.step.plan import GraphCost, StepPlan, TowerPlan
from clipscale.tell import tell
from clipscale.towers import Towers
from clipscale.words import counted

_MARGIN = 0.1  # of a GPU's memory, for what its allocator cuts off and what nobody counted
_OPTIMIZER_BYTES = 12  # a parameter: its gradient and AdamW's two moments, in float32
_EMBEDDING_BYTES = 16  # a number of one tower's embeddings, for both towers and what the loss makes of them
_WORKSPACE_BYTES = 1 << 30  # of the loss, and of what is small


def plan_step(config: Config, towers: Towers, world: World, recorded: dict[str, Any] | None) -> StepPlan:
    """The same on every rank; collective. `recorded`: the run's plan as `plan_record` gave it, if there is one."""
    settings, slots = config.gradcache, config.train.global_batch // world.size
    if recorded and recorded["settings"] == _settings(config, world):
        return StepPlan(*(_tower_plan(recorded[name]) for name in ("image", "text")))
    training = towers.model.training
    towers.model.train()
    costs, by_chunk = graph_costs(towers), towers.draws_by_chunk()
    towers.model.train(training)
    for name, layers in by_chunk.items():
        if layers:
            tell(
                f"the {name} tower draws by chunk in {counted(len(layers), 'layer')} ({layers[0]}): its chunks are the "
                "same in both passes and in the order of the batch, and a run on other ranks or chunks draws otherwise"
            )
    if towers.text.cut is None:
        tell("the text tower looks beyond the end of a caption: captions run at full length")
    plans = [
        TowerPlan(
            min(chunk, slots), min(chunk, slots) * settings.forward_chunks, cost=cost, by_chunk=bool(by_chunk[name])
        )
        for name, chunk, cost in zip(by_chunk, (settings.image_chunk, settings.text_chunk), costs, strict=True)
    ]
    keep_bytes = settings.keep_bytes
    if keep_bytes == "auto":
        keep_bytes = _free_bytes(config, towers, world, StepPlan(*plans), slots)
    keep_bytes, image_cost, text_cost = _agreed(world, keep_bytes, *costs)
    image, text = plans
    image = dataclasses.replace(image, keep_bytes=keep_bytes, cost=image_cost)
    left = keep_bytes - image_cost.of(image.chunk) * (image.kept_samples(slots) / image.chunk)
    return StepPlan(image, dataclasses.replace(text, keep_bytes=int(max(left, 0)), cost=text_cost))


def plan_record(plan: StepPlan, config: Config, world: World) -> dict[str, Any]:
    """As JSON can hold it."""
    return {"settings": _settings(config, world), **dataclasses.asdict(plan)}


def chunks_of(config: Config, recorded: dict[str, Any] | None) -> tuple[int, int]:
    """Pictures, and captions, of a chunk where nothing is trained: as the config says, or the run's plan found."""
    settings = config.gradcache
    found = {name: (recorded or {}).get(name, {}).get("chunk") for name in ("image", "text")}
    image, text = settings.image_chunk, settings.text_chunk
    return (
        image if image != "auto" else found["image"] or GradCache().image_chunk,
        text if text != "auto" else found["text"] or GradCache().text_chunk,
    )


def plan_line(plan: StepPlan, slots: int) -> str:
    """What a run tells of its plan."""
    kept = plan.image.kept_samples(slots) / slots
    return (
        f"step: chunks of {counted(plan.image.chunk, 'picture')} and {counted(plan.text.chunk, 'caption')} of full "
        f"length; graphs of {kept:.0%} of the pictures are kept, and {plan.text.keep_bytes / 1e9:.1f} GB of captions'"
    )


def _settings(config: Config, world: World) -> dict[str, Any]:
    """All that the user decides and a plan depends on."""
    return dataclasses.asdict(config.gradcache) | {"slots": config.train.global_batch // world.size}


def _tower_plan(record: dict[str, Any]) -> TowerPlan:
    return TowerPlan(**record | {"cost": GraphCost(**record["cost"])})


def _agreed(world: World, keep_bytes: int, *costs: GraphCost) -> tuple[int, GraphCost, GraphCost]:
    """The least that any rank has to keep, and the main rank's costs."""
    everyone = world.gather((keep_bytes, *costs))
    return min(rank[0] for rank in everyone), everyone[0][1], everyone[0][2]


def _free_bytes(config: Config, towers: Towers, world: World, plan: StepPlan, slots: int) -> int:
    """What this rank may keep: on a CPU a quarter of the memory that is left, shared among the node's ranks; on a GPU
    what weights, optimizer, embeddings, loss, one chunk's backward pass and pictures that wait there leave."""
    hosts = Counter(world.gather(socket.gethostname()))
    device = towers.image.device
    if device.type != "cuda":
        return host_memory().left // 4 // hosts[socket.gethostname()]
    free, total = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    parameters = sum(parameter.numel() for parameter in towers.model.parameters() if parameter.requires_grad)
    chunk = max(
        plan.image.cost.of(plan.image.chunk),
        plan.text.cost.of(plan.text.chunk, plan.text.chunk * towers.context_length),
    )
    waiting = total // 20 if config.replay.gpu_bytes is None else config.replay.gpu_bytes
    needed = parameters * _OPTIMIZER_BYTES + slots * towers.embed_dim * _EMBEDDING_BYTES + _WORKSPACE_BYTES
    needed += 2 * chunk + (waiting if config.replay.kind in ("auto", "gpu") else 0)
    return max(0, int(free - needed - _MARGIN * total))
