"""How long a step takes, by part, from a device's datasheet and stated shares of it, or from what was measured there.

    seconds_of(job, found)            # {"image tower": 1.46, "text tower": 0.36, "loss": 0.01, ..., "data": 0.0}
    job_flop(job)                     # operations of the towers in a step of a rank

A GPU's tower is the sum of two times: its products at PRODUCTS of the datasheet's rate, and what lies between them
(norms, activations, residuals, casts) as bytes through memory at TRAFFIC of its bandwidth. Both shares are those of one
H100 (docs/benchmarks/step-h100.md: 7.3 s a step of ViT-B-32, 7.6 s by this). A CPU's tower is its operations by a rate.
Of a device with a measured step all times of towers are multiplied by what that step took over what it would have by
this.
"""

from __future__ import annotations

from clipscale.config import AS_OPEN_CLIP, Model
from clipscale.forecast.job import Job, is_half
from clipscale.forecast.measured import Found, Step
from clipscale.forecast.memory import Memory, memory_of
from clipscale.forecast.scale import exposed_seconds, sum_seconds
from clipscale.forecast.towers import TowerFacts, plain_towers
from clipscale.upstream.open_clip_files import known_models

PRODUCTS, TRAFFIC, LOSS = 0.70, 0.50, 0.55
"""Shares of the datasheet's rate and bandwidth that towers reach, and of its rate that the loss does."""
CPU_TOWERS, CPU_LOSS = 0.60, 0.85
COPIES = 0.80
"""Of the datasheet's bandwidth, to and from host memory."""
_BETWEEN = 3.3  # bytes that go through memory in a pass, by byte that autograd saves
_UPDATE_BYTES = 44  # of AdamW with clipping, a parameter


def seconds_of(job: Job, found: Found, memory: Memory | None = None) -> dict[str, float]:
    """Of a step of one rank, by part. `data` is what a step waits for pictures beyond the others' time."""
    memory = memory or memory_of(job)
    pictures, captions = memory.kept
    factor = _factor(job, found.step)
    kept_image, kept_text = pictures / job.slots, captions / job.slots
    parts = {
        "image tower": factor * _tower(job, job.image, job.image.tokens, kept_image, found, locked=job.locked[0]),
        "text tower": factor * _tower(job, job.text, job.tokens, kept_text, found, locked=job.locked[1]),
        "loss": loss_flop(job) / loss_rate(job, found),
        "ring": exposed_seconds(job, loss_rate(job, found)),
        "gradients' sum": sum_seconds(job),
        "optimizer": _UPDATE_BYTES * sum(job.learned) / (job.device.bandwidth * TRAFFIC),
    }
    parts["data"] = max(0.0, data_seconds(job, found, memory) - sum(parts.values()))
    return parts


def data_seconds(job: Job, found: Found, memory: Memory) -> float:
    """That a rank's pictures of a step take to decode and to be copied, whichever is longer."""
    reads = 2 if memory.tier == "recompute" else 1
    decode = reads * job.slots / (found.decode * job.config.data.threads)
    copies = 1 if memory.tier == "gpu" else 2 - memory.kept[0] / job.slots
    copy = copies * job.shape().step_bytes / (job.device.host * COPIES) if job.device.on_gpu else 0.0
    return max(decode, copy)


def loss_flop(job: Job) -> float:
    """8 B^2 D over the ranks."""
    return 8.0 * job.slots * job.config.train.global_batch * job.width


def loss_rate(job: Job, found: Found) -> float:
    """Operations a second: of the nearest batch that was measured, else by the datasheet."""
    if found.loss and job.loss_precision in (("fp16", "bf16") if job.device.on_gpu else ("fp32",)):
        return found.loss[min(found.loss, key=lambda pairs: abs(pairs - job.slots))]
    rates = {"fp16": job.device.half, "bf16": job.device.half, "tf32": job.device.tf32}
    return rates.get(job.loss_precision, job.device.fp32) * (LOSS if job.device.on_gpu else CPU_LOSS)


def job_flop(job: Job) -> float:
    """Operations of both towers in a step of one rank where nothing is kept: two forward passes and a backward."""
    of_towers = job.image.forward_flop(), job.text.forward_flop(job.tokens)
    return job.slots * sum(
        _passes(job, locked=locked) * flop for locked, flop in zip(job.locked, of_towers, strict=True)
    )


def _passes(job: Job, kept: float = 0.0, *, locked: bool = False) -> float:
    """Forward passes that a sample's work is worth: the backward pass two, and one more for checkpointed blocks."""
    return 1.0 if locked else 4 - kept + job.config.towers.checkpoint_blocks


def _tower(job: Job, tower: TowerFacts, tokens: float, kept: float, found: Found, *, locked: bool = False) -> float:
    """Of all slots. `kept`: the share that goes through once."""
    passes = _passes(job, kept, locked=locked) * job.slots
    flop = passes * tower.forward_flop(tokens)
    if not job.device.on_gpu:
        return flop / (found.step.flops if found.step else job.device.fp32 * CPU_TOWERS)
    rate = job.device.half if job.half else job.device.fp32
    traffic = passes * _BETWEEN * tower.graph_bytes(1, tokens)
    return flop / (rate * PRODUCTS) + traffic / (job.device.bandwidth * TRAFFIC)


def _factor(job: Job, step: Step | None) -> float:
    """What the measured step took over what it would have by this; 1 where there is none to compare."""
    if step is None or not job.device.on_gpu or step.model not in known_models():
        return 1.0
    if (step.precision in ("bf16", "fp16")) != is_half(job.config, job.device):
        return 1.0
    image, text = plain_towers(Model(name=step.model), AS_OPEN_CLIP, half=job.half)  # as GPUs were measured
    if image is None or text is None:
        return 1.0
    none = Found()
    of_pair = (_tower(job, image, image.tokens, 0, none) + _tower(job, text, step.tokens, 0, none)) / job.slots
    return step.seconds / (step.pairs * of_pair)
