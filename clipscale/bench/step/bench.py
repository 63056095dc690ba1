"""`clipscale bench step`: every model and batch, written down as soon as it is measured.

status = bench_step(options, "clipscale bench step --peers")
"""

from __future__ import annotations

from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from clipscale.bench.common.results import finish, write
from clipscale.bench.common.stamp import package_version, result_name, stamp
from clipscale.bench.step.captions import Lengths, read_lengths
from clipscale.bench.step.case import Budget, Case, CaseRun
from clipscale.bench.step.contestants import KEPT, NOTHING_KEPT, Shape
from clipscale.bench.step.options import SMALL, StepBench
from clipscale.bench.step.parity import measure_parity
from clipscale.bench.step.plots import draw
from clipscale.bench.step.report import markdown, parity_line, text_table, towers_table
from clipscale.bench.step.towers import NOTE as TOWERS_NOTE
from clipscale.bench.step.towers import measure_towers
from clipscale.bench.step.trainee import OPTIM, build_trainee, model_config
from clipscale.device import is_out_of_memory
from clipscale.dist import start_world
from clipscale.errors import SharedError, UserError, require
from clipscale.upstream.open_clip_files import check_model

_DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {"models": (SMALL,), "batches": (256, 512), "image_chunk": 64, "text_chunk": 64, "precision": "fp32"},
    "cuda": {
        "models": ("ViT-B-32",),
        "batches": (1024, 4096, 16384),
        "image_chunk": 256,
        "text_chunk": 1024,
        "precision": "bf16",
    },
}


def bench_step(options: StepBench, command: str) -> int:
    """Measure, print and write; returns the exit status: 1 when a step of clipscale failed or the losses differ.

    `command` is what was typed, for the record.

    UserError for options that do not fit this machine; the cases before it are written.
    """
    with start_world(options.device) as world:
        if world.size > 1:
            raise SharedError("clipscale bench step measures one process on one device; start it without torchrun")
        precisions = ("fp32", "bf16") if options.precision == "auto" else (options.precision,)
        options = _for_device(options, world.device)
        lengths = read_lengths(options.captions)
        document, folder = _document(options, world.device, lengths, command), Path(options.output)
        for model in options.models:
            check_model(model_config(model))  # before the first is measured
        budget = Budget(options.seconds, options.limit_seconds)
        for model, precision in product(options.models, precisions if options.towers else ()):
            found = _towers(model, precision, options, world.device)
            document["towers"].append(found)
            print(towers_table(found) + "\n", flush=True)
            write(document, folder, markdown(document, []))
        for model in () if options.towers else options.models:
            for case in _measured(model, options, world.device, lengths, budget):
                document["steps"].append(case)
                print(text_table(case) + "\n", flush=True)
                write(document, folder, markdown(document, []))
            if options.parity:
                found = document["parity"][model] = _parity(model, options, world.device, lengths)
                print(parity_line(model, found) + "\n", flush=True)
                write(document, folder, markdown(document, []))
        document["finished"] = True
        print("\n".join(document["notes"]))
        finish(document, folder, draw=draw, markdown=markdown)
    rows = [row for case in document["steps"] for row in case["rows"] if row["contestant"] in (NOTHING_KEPT, KEPT)]
    failed = any(row["status"].startswith("failed") for row in rows)
    return int(failed or not all(parity["met"] for parity in document["parity"].values()))


def _for_device(options: StepBench, device: torch.device) -> StepBench:
    """With the device's defaults in the place of None and auto."""
    require(
        options.precision != "fp16" or device.type == "cuda",
        "--precision=fp16 wants a GPU: a CPU multiplies halves slowly; take fp32 or bf16",
    )
    given = {name: value for name in _DEFAULTS["cpu"] if (value := getattr(options, name)) not in (None, "auto")}
    return replace(
        options,
        name=options.name or result_name("towers" if options.towers else "step", device),
        **_DEFAULTS[device.type] | given,
    )


def _measured(model: str, options: StepBench, device: torch.device, lengths: Lengths, budget: Budget):
    """A model's cases, batches from small to large, so that each tells how long the next will take."""
    trainee = build_trainee(model_config(model), device=device, precision=options.precision, seed=options.seed)
    for pairs in options.batches:
        case = Case(model, pairs, _shape(options, pairs))
        try:
            yield CaseRun(trainee, case, lengths, budget, peers=options.peers, seed=options.seed).run()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(f"{case}: a single chunk does not fit into memory; lower --image-chunk") from error


def _towers(model: str, precision: str, options: StepBench, device: torch.device) -> dict[str, Any]:
    chunks = options.image_chunk, options.text_chunk
    rows = measure_towers(
        model_config(model),
        device,
        precision=precision,
        samples=chunks,
        seconds=options.seconds,
        compiled=options.compiled,
        seed=options.seed,
    )
    return {"model": model, "precision": precision, "rows": rows}


def _parity(model: str, options: StepBench, device: torch.device, lengths: Lengths) -> dict[str, Any]:
    """At the smallest batch."""
    pairs = options.batches[0]
    return measure_parity(
        model_config(model), device, lengths, pairs=pairs, shape=_shape(options, pairs), seed=options.seed
    )


def _shape(options: StepBench, pairs: int) -> Shape:
    return Shape(min(options.image_chunk, pairs), min(options.text_chunk, pairs), options.keep_bytes)


def _document(options: StepBench, device: torch.device, lengths: Lengths, command: str) -> dict[str, Any]:
    if options.towers:
        notes = [TOWERS_NOTE]
    else:
        notes = [
            "A step: forward, loss, backward and AdamW "
            f"(lr {OPTIM.lr:g}, eps {OPTIM.eps:g}, fused for all), pictures of noise copied from host memory; every "
            "contestant trains the same model object in turn, from the same weights.",
            f"Captions: {lengths.summary()}",
        ]
    notes.append(f"open_clip_torch {package_version('open_clip_torch')}.")
    return {
        "format": 1,
        "name": options.name,
        "command": command,
        "finished": False,
        "stamp": stamp(device),
        "arguments": asdict(options),
        "device": device.type,
        "notes": notes,
        "steps": [],
        "parity": {},
        "towers": [],
    }
