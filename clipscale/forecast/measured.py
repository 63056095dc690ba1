"""What benchmarks have found on a device like the one that is planned for: the newest results that lie here.

    found = look_up(device)             # Found(step=Step(...), loss={65536: 5.5e14}, decode=1412.0, sources={...})

Looked at are the files of `clipscale bench step`, `loss` and `data` in bench-results/ and docs/benchmarks/ of the
current folder, those that `clipscale bench gpu` has made too. One that is no result, is not finished or is of another
device is passed over.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clipscale.forecast.hardware import Device

FOLDERS = ("bench-results", "docs/benchmarks")
DECODE = 1_412.0  # pictures a second and core: docs/benchmarks/data-amd-epyc-2-threads.md


@dataclass(frozen=True)
class Step:
    """A measured step in chunks, nothing kept; one rank."""

    model: str
    precision: str
    pairs: int
    tokens: float
    """Of a caption, as the text tower ran it."""
    seconds: float
    flops: float
    """Operations of the towers a second."""


@dataclass(frozen=True)
class Found:
    step: Step | None = None
    loss: dict[int, float] = field(default_factory=dict)
    """Operations a second, by pairs: in half precision on a GPU, in float32 on a CPU."""
    decode: float = DECODE
    """Pictures a second and core."""
    sources: dict[str, str] = field(default_factory=dict)
    """Files that towers, loss and decoding are from, of those that are measured."""


def look_up(device: Device, root: Path = Path()) -> Found:
    """The newest of each kind."""
    step: Step | None = None
    loss: dict[int, float] = {}
    decode, sources = DECODE, {}
    for path, document in sorted(_documents(root), key=lambda found: found[1]["stamp"]["date"]):
        its_own = _is_like(device, document)
        if its_own and (steps := list(_steps(document))):
            step, sources["towers"] = steps[-1], str(path)
        if its_own and (rates := _loss(document, device)):
            loss, sources["loss"] = loss | rates, str(path)
        if rate := _decode(document):
            decode, sources["decoding"] = rate, str(path)
    return Found(step, loss, decode, sources)


def _documents(root: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    for folder in FOLDERS:
        for path in sorted([*(root / folder).glob("*.json"), *(root / folder).glob("*-parts/*.json")]):
            try:
                document = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue
            if isinstance(document, dict) and document.get("finished") and "stamp" in document:
                yield path, document


def _is_like(device: Device, document: dict[str, Any]) -> bool:
    measured = str(document["stamp"].get("device", "")).lower()
    if not device.on_gpu:
        return measured.endswith(f", {device.cores} threads")
    return device.name.partition("-")[0] in measured.replace(" ", "")


def _steps(document: dict[str, Any]) -> Iterator[Step]:
    for case in document.get("steps", []):
        for row in case["rows"]:
            if row["contestant"] == "clipscale, nothing kept" and row["status"] == "measured":
                yield Step(
                    case["model"],
                    case["precision"],
                    case["batch"],
                    row["tokens_per_caption"],
                    row["step_seconds"]["median"],
                    row["tflops"] * 1e12,
                )


def _loss(document: dict[str, Any], device: Device) -> dict[int, float]:
    wanted = ("fp16", "bf16") if device.on_gpu else ("fp32",)
    return {
        case["batch"]: row["tflops"] * 1e12
        for case in document.get("cases", [])
        for row in case["rows"]
        if case["precision"] in wanted and row["contestant"] == "clipscale" and row["status"] == "measured"
    }


def _decode(document: dict[str, Any]) -> float:
    speed = document.get("speed") or {}
    rates = [row["images_per_second"]["median"] for row in speed.get("rows", []) if row["contestant"] == "clipscale"]
    return rates[0] / speed["cores"] if rates else 0.0
