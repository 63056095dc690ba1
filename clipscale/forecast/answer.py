"""The answer of `clipscale plan`, as numbers: everything that the report tells and --json writes.

answer = plan_run(config, ranks=8, device=find_gpu("h100"))
answer["memory"]["fits"], answer["seconds"]["step"], answer["limit"], answer["advice"]
scale_rows(config, device, ranks=8)             # a row for 1, 2, 4, ... 1,024 ranks of the same slots
"""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from pathlib import Path
from typing import Any

from clipscale.config import Config
from clipscale.forecast.hardware import Device
from clipscale.forecast.job import Job, make_job
from clipscale.forecast.measured import Found, look_up
from clipscale.forecast.memory import CHUNK, EMBEDDINGS, Memory, memory_of
from clipscale.forecast.scale import exposed_seconds, hidden_from, hops, sum_seconds, wire_rate
from clipscale.forecast.seconds import data_seconds, job_flop, loss_rate, seconds_of
from clipscale.schedule import schedule_lines, total_steps
from clipscale.words import counted

MOST_RANKS = 1024
_SMALLEST_CHUNK = 8


def plan_run(
    config: Config, *, ranks: int, device: Device, timed: bool = True, tokens: float | None = None, root: Path = Path()
) -> dict[str, Any]:
    """Ready for JSON. `timed`: false where nothing but the device's memory is known.

    Raises:
        UserError: what `make_job` raises.
    """
    job = make_job(config, ranks=ranks, device=device, tokens=tokens)
    memory = memory_of(job)
    needed = memory.total if device.on_gpu else memory.total * min(ranks, device.per_node)
    fits = needed <= device.memory_bytes
    answer = {
        "format": 1,
        "run": {
            "model": config.model.name or "described",
            "parameters": job.parameters,
            "by": "formula" if job.image.formula and job.text.formula else "building it without memory",
            "global_batch": config.train.global_batch,
            "steps": total_steps(config),
            "ranks": ranks,
            "pairs_per_rank": job.slots,
            "image_chunk": job.chunks[0],
            "text_chunk": job.chunks[1],
            "tokens_per_caption": job.tokens,
            "kept_share": sum(memory.kept) / (2 * job.slots),
            "replay": memory.tier,
        },
        "device": dataclasses.asdict(device),
        "memory": {
            "parts": memory.parts,
            "peaks": memory.peaks,
            "peak": memory.peak,
            "total": memory.total,
            "device": device.memory_bytes,
            "fits": fits,
            "host": memory.host,
            "host_total": memory.host_total,
            "ranks_per_node": min(ranks, device.per_node),
        },
        "schedule": schedule_lines(config),
        "advice": _advice(job, memory, fits),
    }
    return answer | (_timing(job, memory, look_up(device, root)) if timed else {})


def _timing(job: Job, memory: Memory, found: Found) -> dict[str, Any]:
    parts = seconds_of(job, found, memory)
    step = sum(parts.values())
    computed = step - parts["data"]
    cores = job.slots * (2 if memory.tier == "recompute" else 1) / found.decode / computed
    threads = job.config.data.threads
    largest = max(parts, key=parts.__getitem__)
    advice = []
    if parts["data"] > 0.02 * step:
        largest = "data"
        if cores > threads:
            advice.append(f"data.threads={threads} decode too slowly: a rank needs {cores:.1f} cores")
    return {
        "seconds": {
            "parts": parts,
            "step": step,
            "run": step * total_steps(job.config),
            "pairs_per_second": job.config.train.global_batch / step,
            "tower_flop": job_flop(job),
            "data": data_seconds(job, found, memory),
        },
        "decode": {"cores_per_rank": cores, "threads": threads, "pictures_per_core": found.decode},
        "limit": largest,
        "from": found.sources,
        "timing_advice": advice,
    }


def _advice(job: Job, memory: Memory, fits: bool) -> list[str]:
    """What to change so that it fits; nothing where it does."""
    if fits:
        return []
    advice, config, device = [], job.config, job.device
    node = 1 if device.on_gpu else min(job.ranks, device.per_node)
    missing = memory.total - device.memory_bytes // node
    settings = {"image_chunk": job.chunks[0], "text_chunk": job.chunks[1]}
    while memory_of(_with_chunks(job, settings)).total > device.memory_bytes // node:
        largest = max(settings, key=lambda name: _chunk_of(job, settings, name))
        if settings[largest] <= _SMALLEST_CHUNK:
            break
        settings[largest] //= 2
    else:
        words = " ".join(f"gradcache.{name}={size}" for name, size in settings.items())
        advice.append(f"smaller chunks fit: {words}")
    if memory.parts[EMBEDDINGS] > missing or not advice:
        more = job.ranks
        while more <= MOST_RANKS and config.train.global_batch % (2 * more) == 0:
            more *= 2
            twin = replace(job, ranks=more)
            if memory_of(twin).total <= device.memory_bytes // node:
                advice.append(f"{counted(more, 'rank')} hold it")
                break
    return advice or ["no chunk is small enough: weights, gradients and moments alone need a device with more memory"]


def _with_chunks(job: Job, settings: dict[str, int]) -> Job:
    gradcache = replace(job.config.gradcache, **settings)
    return replace(job, config=replace(job.config, gradcache=gradcache))


def _chunk_of(job: Job, settings: dict[str, int], name: str) -> int:
    """Bytes of the activations if the other tower's chunk were nothing."""
    other = {key: size if key == name else 1 for key, size in settings.items()}
    return memory_of(_with_chunks(job, other)).parts[CHUNK]


def scale_rows(config: Config, *, ranks: int, device: Device, tokens: float | None, root: Path = Path()) -> list[dict]:
    """The same pairs a rank on 1, 2, 4, ... 1,024 ranks: what the wire carries and costs, and the step's time."""
    job, found = make_job(config, ranks=ranks, device=device, tokens=tokens), look_up(device, root)
    rows, many = [], 1
    while many <= MOST_RANKS:
        train = replace(config.train, global_batch=job.slots * many)
        streams = replace(config.data, streams=None)
        one = replace(job, config=replace(config, train=train, data=streams), ranks=many)
        rate = loss_rate(one, found)
        parts = seconds_of(one, found)
        first, second = hops(one)
        rows.append(
            {
                "ranks": many,
                "global_batch": train.global_batch,
                "wire_bytes_per_second": wire_rate(one) if many > 1 else 0.0,
                "hop_bytes": [first.bytes, second.bytes] if many > 1 else [0, 0],
                "hop_seconds": [first.seconds, second.seconds] if many > 1 else [0.0, 0.0],
                "tile_seconds": [first.flop / rate, second.flop / rate],
                "exposed_seconds": exposed_seconds(one, rate),
                "hidden_from_batch": hidden_from(one, rate),
                "sum_seconds": sum_seconds(one),
                "loss_seconds": parts["loss"],
                "step_seconds": sum(parts.values()),
                "gpu_bytes": memory_of(one).total,
            }
        )
        many *= 2
    return rows
