"""The memory of a run by part: of the device, and of the host.

    found = memory_of(job)
    found.parts                       # {"weights": 605_000_000, ...} of a rank's device
    found.total, found.peak           # of them, what is there at once at most, and when: "the text tower's second pass"
    found.host                        # of a rank, outside its device; empty on a CPU, where both are one

On a GPU a margin is kept free, as the trainer's own plan keeps it (step/planning.py). On a CPU what torch and the
loader's process take is added. A step's peak is in its loss or in its second pass, whichever is more; both are told.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from clipscale.forecast.job import Job

MOMENTS = {"adamw": 8, "sgd": 0, "adam": 8, "nadamw": 8, "lamb": 8, "lion": 4, "adan": 16, "adopt": 8}
"""Bytes a parameter that an optimizer remembers, by optim.kind; of another kind as much as AdamW."""
OPERAND = {"fp16": 2, "bf16": 2, "tf32": 4, "fp32": 4, "fp64": 8}
_TILE_BYTES, _STATISTICS = 512 << 20, 32  # of the Triton kernels; a pair (README, the loss by itself)
_CPU_TILE, _CPU_SQUARES = 1024, 5  # rows of a tile in plain torch, and how many of its squares are there at once
_MARGIN = 0.1  # of a GPU, that the trainer leaves free when it keeps graphs
_CONTEXT = 600 << 20  # of CUDA and its libraries, on each GPU
_IN_FLIGHT = 2  # chunks of pictures on a GPU: one is used, one comes
_PROCESS = 725 << 20  # anonymous memory of torch, open_clip and their libraries, and what malloc keeps once it had it
_LOADER = 330 << 20  # of the loader's process


@dataclass(frozen=True)
class Memory:
    parts: dict[str, int]
    """Bytes of a rank's device. Not all of them are there at once."""
    peaks: dict[str, int]
    """In each part of a step: all that is there."""
    host: dict[str, int] = field(default_factory=dict)
    """Of its host, where that is another place."""
    kept: tuple[int, int] = (0, 0)
    """Pictures and captions whose graphs are kept, so that they go through their tower once."""
    tier: str = "host"
    """Where pictures wait."""

    @property
    def peak(self) -> str:
        """The part of the step that takes most."""
        return max(self.peaks, key=self.peaks.__getitem__)

    @property
    def total(self) -> int:
        return self.peaks[self.peak]

    @property
    def host_total(self) -> int:
        return sum(self.host.values())


WEIGHTS, GRADIENTS, STATE, AVERAGE = "weights", "gradients", "optimizer state", "averaged weights"
COPIES, EMBEDDINGS = "weights in half precision", "embeddings and their gradients"
LOSS, WORKSPACE = "operands and blocks of the loss", "workspace of the loss"
CHUNK, KEPT = "activations of a chunk", "graphs that are kept"
PICTURES, STAGING, PROCESS = "pictures", "copy for checkpoints", "process"
_IN_A_STEP = (GRADIENTS, LOSS, WORKSPACE, CHUNK, KEPT)  # and gone after it


def memory_of(job: Job) -> Memory:
    """Of one rank; the host's part of the first rank of a node, which alone stages checkpoints."""
    config, size, learned = job.config, job.parameters, sum(job.learned)
    average = 4 * learned * config.ema.enabled
    moments = MOMENTS.get(config.optim.kind, MOMENTS["adamw"]) * learned
    parts = {
        WEIGHTS: 4 * size,
        GRADIENTS: 4 * learned,
        STATE: moments,
        AVERAGE: average,
        COPIES: 2 * max(job.image.cast, job.text.cast) if job.half else 0,
        EMBEDDINGS: 8 * job.slots * job.width,
        LOSS: _loss_blocks(job),
        WORKSPACE: _workspace(job),
        CHUNK: int(max(_chunk_bytes(job))),
    }
    tier = _tier(job)
    on_device = {PROCESS: _CONTEXT} if job.device.on_gpu else {PROCESS: _PROCESS + _LOADER * _loads_apart(job)}
    if job.device.on_gpu:
        held = job.shape().held_bytes if tier == "gpu" else _IN_FLIGHT * job.shape().chunk_bytes
        on_device[PICTURES] = held
    parts |= on_device
    kept_bytes = _keep_bytes(job, parts)
    kept = _kept(job, kept_bytes)
    parts[KEPT] = int(_graph_image(job, kept[0]) + job.text.graph_bytes(kept[1], kept[1] * job.tokens))
    host = {
        PICTURES: _ring_bytes(job, tier, kept[0]),
        STAGING: (4 * size + average + moments) * config.checkpoint.background,
    }
    if job.device.on_gpu:
        host[PROCESS] = _PROCESS + _LOADER
    else:
        parts, host = {**parts, **host}, {}
    return Memory(parts, _peaks(job, parts, kept), host, kept, tier)


def _peaks(job: Job, parts: dict[str, int], kept: tuple[int, int]) -> dict[str, int]:
    """By part of a step. A tower of which all is kept has no second pass of its own; the gradients of one that goes
    through in a single chunk come when its activations go."""
    always = sum(size for name, size in parts.items() if name not in _IN_A_STEP)
    kept_text = job.text.graph_bytes(kept[1], kept[1] * job.tokens)
    of_image, of_text = (4 * count for count in job.learned)
    transient = job.image.replay_token * job.image.tokens * job.chunks[0]
    twice = (count < job.slots and not locked for count, locked in zip(kept, job.locked, strict=True))
    image, text = (chunk * again for chunk, again in zip(_chunk_bytes(job), twice, strict=True))
    one_by_one = job.slots > job.chunks[0], job.slots * job.tokens > job.text_chunk_tokens
    found = {
        "the loss": parts[KEPT] + parts[LOSS] + parts[WORKSPACE],
        "the kept graphs' backward pass": (parts[KEPT] + of_image + transient) * (parts[KEPT] > 0),
        "the image tower's second pass": image + kept_text + of_image * one_by_one[0],
        "the text tower's second pass": text + of_image + of_text * one_by_one[1],
        "the optimizer's step": parts[GRADIENTS],
    }
    return {name: int(always + size) for name, size in found.items()}


def _loss_blocks(job: Job) -> int:
    """Copies of embeddings as operands; in a ring, text blocks and gradients that come and go (loss/ring.py)."""
    operand, gradient = OPERAND[job.loss_precision], 8 if job.loss_precision == "fp64" else 4
    blocks = {1: 2 * operand, 2: 3 * operand + 2 * gradient}.get(job.ranks, 3 * operand + 3 * gradient)
    own = 2 * gradient if job.loss_precision == "fp64" else 0  # gradients do not fit the embeddings' memory
    return (blocks + own) * job.slots * job.width


def _workspace(job: Job) -> int:
    size, statistics = OPERAND[job.loss_precision], _STATISTICS * job.slots
    if job.device.on_gpu:
        return min(_TILE_BYTES, size * job.slots**2) + statistics
    tile = min(job.config.loss.tile or _CPU_TILE, job.slots)
    return _CPU_SQUARES * max(4, size) * tile**2 + statistics


def _chunk_bytes(job: Job) -> tuple[float, float]:
    """At the peak of a chunk's backward pass, of each tower."""
    pictures, tokens = job.chunks[0], job.text_chunk_tokens
    captions = tokens / job.tokens
    return (
        _graph_image(job, pictures) + job.image.replay_token * job.image.tokens * pictures,
        job.text.graph_bytes(captions, tokens) + job.text.replay_token * tokens,
    )


def _graph_image(job: Job, pictures: int) -> float:
    return job.image.graph_bytes(pictures, pictures * job.image.tokens)


def _keep_bytes(job: Job, parts: dict[str, int]) -> float:
    """What the trainer would keep graphs in: what is asked for; of `auto`, on a GPU, what would be free."""
    asked = job.config.gradcache.keep_bytes
    if asked != "auto":
        return asked
    if not job.device.on_gpu:
        return 0
    others = sum(parts.values()) - parts[CHUNK]
    return job.device.memory_bytes * (1 - _MARGIN) - others - 2 * max(_chunk_bytes(job))


def _kept(job: Job, keep_bytes: float) -> tuple[int, int]:
    """Whole chunks of pictures first; of captions, whose chunks differ, what is left. A locked tower has no graphs."""
    chunk, of_chunk = job.chunks[0], _graph_image(job, job.chunks[0])
    image, text = (job.slots * (not locked) for locked in job.locked)
    pictures = min(image, int(max(0, keep_bytes) // of_chunk) * chunk)
    left = max(0.0, keep_bytes - _graph_image(job, pictures))
    return pictures, min(text, int(left / job.text.graph_bytes(1, job.tokens)))


def _tier(job: Job) -> str:
    """replay.kind; of `auto`, the GPU where its share holds a step, else the host."""
    replay = job.config.replay
    if replay.kind != "auto":
        return replay.kind
    share = job.device.memory_bytes // 20 if replay.gpu_bytes is None else replay.gpu_bytes
    return "gpu" if job.device.on_gpu and job.shape().held_bytes <= share else "host"


def _ring_bytes(job: Job, tier: str, kept: int) -> int:
    """Of the loader's blocks: a step's that waits, where it waits here, and what is decoded ahead; and the tokens."""
    shape = job.shape(kept - kept % job.chunks[0])
    blocks = (-(-shape.held_slots // shape.chunk) if tier == "host" else 0) + max(shape.ahead, 3)
    caption = 4 * job.text.tokens + 1
    return blocks * (shape.chunk_bytes + shape.chunk * caption) + job.slots * caption


def _loads_apart(job: Job) -> bool:
    return job.config.data.loader == "process"
