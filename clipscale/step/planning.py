"""The plan of a run's steps, made before the first of them: sizes of chunks, and what memory allows to keep.

    plan = plan_step(config, towers, world, recorded=None)
    plan_line(plan, towers, slots)          # 'step: chunks of 256 pictures and 1,024 captions ...'

What `auto` finds, memory that is free and the fastest chunks, differs from start to start, so a run's plan lies in its
checkpoints and is followed again when the run resumes on as many ranks under the same settings.
"""

from __future__ import annotations

import dataclasses
import socket
from collections import Counter
from typing import Any

import torch

from clipscale.config import Config, GradCache, Lock, TowerSettings
from clipscale.data.load.replay_plan import host_memory
from clipscale.dist import World
from clipscale.errors import require
from clipscale.step.costs import graph_costs
from clipscale.step.gradcache import captions_of
from clipscale.step.plan import GraphCost, StepPlan, TowerPlan
from clipscale.step.search import Search, Sizes
from clipscale.step.walks import Captions
from clipscale.tell import tell
from clipscale.towers import Towers, learns
from clipscale.words import counted

_MARGIN = 0.1  # of a GPU's memory, for what its allocator cuts off and what nobody counted
_OPTIMIZER_BYTES = 12  # a parameter: its gradient and AdamW's two moments, in float32
_EMBEDDING_BYTES = 16  # a number of one tower's embeddings, for both towers and what the loss makes of them
_WORKSPACE_BYTES = 1 << 30  # of the loss, and of what is small


def plan_step(config: Config, towers: Towers, world: World, recorded: dict[str, Any] | None) -> StepPlan:
    """The same on every rank; collective. `recorded`: the run's plan as `plan_record` gave it, if there is one."""
    slots = config.train.global_batch // world.size
    if recorded and recorded["settings"] == _settings(config, world):
        return StepPlan(*(_tower_plan(recorded[name]) for name in ("image", "text")))
    settings, training = config.gradcache, towers.model.training
    chosen = settings.image_chunk, settings.text_chunk, settings.forward_chunks
    towers.model.train()
    counts = settings.keep_bytes != 0 or "auto" in chosen
    costs = graph_costs(towers) if counts else (GraphCost(), GraphCost())
    drawing_layers = towers.draws_by_chunk()
    towers.model.train(training)
    for name, layers in drawing_layers.items():
        require(
            not (layers and config.towers.compile),
            f"towers.compile=true, but the {name} tower draws by chunk ({layers[:1]}), which a compiled graph does in "
            "its own way in each pass; set towers.compile=false, or that dropout to 0",
        )
        if layers:
            tell(
                f"the {name} tower draws by chunk in {counted(len(layers), 'layer')} ({layers[0]}): its chunks are the "
                "same in both passes and in the order of the batch, and a run on other ranks or chunks draws otherwise"
            )
    if towers.text.cut is None:
        tell("the text tower looks beyond the end of a caption: captions run at full length")
    room = _room_bytes(config, towers, world, slots)
    by_chunk = [bool(layers) for layers in drawing_layers.values()]
    sizes = _sizes(config, towers, world, room, costs, by_chunk)
    plans = [
        TowerPlan(size.chunk, size.chunk * size.forward_chunks, cost=cost, by_chunk=alike)
        for size, cost, alike in zip(sizes, costs, by_chunk, strict=True)
    ]
    keep_bytes = settings.keep_bytes
    if keep_bytes == "auto":
        keep_bytes = max(0, int(room - _replay_bytes(towers, StepPlan(*plans))))
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


def plan_line(plan: StepPlan, towers: Towers, slots: int) -> str:
    """What a run tells of its plan."""
    blank_NL = torch.zeros(1, towers.context_length, dtype=torch.int32).expand(slots, -1)
    pictures = f"{plan.image.kept_samples(slots) / slots if learns(towers.image.encoder) else 1:.0%}"
    least = f"{Captions(blank_NL, plan.text, None).kept / slots:.0%}"  # all of full length
    most = f"{captions_of(towers.text, blank_NL, plan.text).kept / slots:.0%}"  # all of them as short as can be
    least, most = (least, most) if learns(towers.text.encoder) else ("100%", "100%")
    captions = most if most == least else f"{least} to {most}"
    once = f"{pictures} of the pictures and {captions} of the captions{'' if most == least else ', by their length,'}"
    return (
        f"step: chunks of {counted(plan.image.chunk, 'picture')} and {counted(plan.text.chunk, 'caption')} of full "
        f"length; {once} go through their tower once, the others twice"
    )


def _settings(config: Config, world: World) -> dict[str, Any]:
    """All that the user decides and a plan depends on."""
    decided = dataclasses.asdict(config.gradcache) | {
        "slots": config.train.global_batch // world.size,
        "precision": config.train.precision,
        "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else world.device.type,
    }
    if config.towers != TowerSettings():  # plans of earlier versions have none
        decided["towers"] = dataclasses.asdict(config.towers)
    if config.train.lock != Lock():
        decided["lock"] = dataclasses.asdict(config.train.lock)
    return decided


def _tower_plan(record: dict[str, Any]) -> TowerPlan:
    return TowerPlan(**record | {"cost": GraphCost(**record["cost"])})


def _agreed(world: World, keep_bytes: int, *costs: GraphCost) -> tuple[int, GraphCost, GraphCost]:
    """The least that any rank has to keep, and the main rank's costs."""
    everyone = world.gather((keep_bytes, *costs))
    return min(rank[0] for rank in everyone), everyone[0][1], everyone[0][2]


def _sizes(
    config: Config,
    towers: Towers,
    world: World,
    room_bytes: float,
    costs: tuple[GraphCost, GraphCost],
    by_chunk: list[bool],
) -> list[Sizes]:
    """Of the image and of the text tower: the least that any rank has found."""
    settings = config.gradcache
    if world.device.type == "cuda" and settings.keep_bytes != "auto":
        room_bytes -= settings.keep_bytes
    search = Search(config, towers, config.train.global_batch // world.size, room_bytes)
    pairs = zip((towers.image, towers.text), (settings.image_chunk, settings.text_chunk), costs, by_chunk, strict=True)
    sizes = [search.sizes(tower, chunk, cost, by_chunk=alike) for tower, chunk, cost, alike in pairs]
    if "auto" not in (settings.image_chunk, settings.text_chunk, settings.forward_chunks):
        return sizes
    found = [Sizes(*map(min, zip(*of_tower, strict=True))) for of_tower in zip(*world.gather(sizes), strict=True)]
    wide = " and ".join(f"{each.chunk * each.forward_chunks:,}" for each in found)
    tell(
        f"gradcache: auto is chunks of {counted(found[0].chunk, 'picture')} and {counted(found[1].chunk, 'caption')}, "
        f"in pass 1 of {wide}: {search.told()}"
    )
    return found


def _room_bytes(config: Config, towers: Towers, world: World, slots: int) -> float:
    """What this rank has for the towers' graphs: on a CPU a quarter of the memory that is left, shared among the node's
    ranks; on a GPU what weights, optimizer, embeddings, loss and pictures that wait there leave."""
    hosts = Counter(world.gather(socket.gethostname()))
    device = towers.image.device
    if device.type != "cuda":
        return host_memory().left // 4 // hosts[socket.gethostname()]
    free, total = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    parameters = sum(parameter.numel() for parameter in towers.model.parameters() if parameter.requires_grad)
    waiting = total // 20 if config.replay.gpu_bytes is None else config.replay.gpu_bytes
    needed = parameters * _OPTIMIZER_BYTES + slots * towers.embed_dim * _EMBEDDING_BYTES + _WORKSPACE_BYTES
    needed += waiting if config.replay.kind in ("auto", "gpu") else 0
    return free - needed - _MARGIN * total


def _replay_bytes(towers: Towers, plan: StepPlan) -> float:
    """What a chunk's own backward pass takes of a GPU beside the graphs that are kept."""
    if towers.image.device.type != "cuda":
        return 0
    return 2 * max(
        plan.image.cost.peak(plan.image.chunk),
        plan.text.cost.peak(plan.text.chunk, plan.text.chunk * towers.context_length),
    )
