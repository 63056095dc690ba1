"""`clipscale bench gpu`: part after part, each in a process of its own, written down as soon as it has ended.

status = bench_gpu(options, "clipscale bench gpu --minutes 25")

This process itself never touches the device, so that no part meets the memory of another, and one that hangs or takes
the driver down with it is ended alone.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from signal import SIGTERM, default_int_handler, signal
from typing import Any

from clipscale.bench.common.results import write
from clipscale.bench.gpu.bars import bars, end_of
from clipscale.bench.gpu.found import own_rows
from clipscale.bench.gpu.options import GpuBench
from clipscale.bench.gpu.parts import PARTS, Part, Place, limit_seconds
from clipscale.bench.gpu.processes import last_line, run_within
from clipscale.bench.gpu.report import markdown, terminal
from clipscale.errors import UserError, require
from clipscale.launch import launched

_STAMP_SECONDS = 120


def bench_gpu(options: GpuBench, command: str) -> int:
    """Measure, print and write; returns the exit status: 1 when a part failed or had to be stopped.

    `command` is what was typed, for the record. SIGTERM is taken as Ctrl-C: what was measured is written first.

    UserError under torchrun, and for a device that is not there or does not answer.
    """
    require(launched().size == 1, "bench gpu is one process on one GPU: start it without torchrun or srun")
    end = time.monotonic() + 60 * options.minutes
    with _terminated_as_interrupted():
        found = _ask_device(options.device)
        document = {
            "format": 1,
            "name": options.name or found["name"],
            "command": command,
            "finished": False,
            "stamp": found["stamp"],
            "arguments": asdict(options),
            "device": found["kind"],
        }
        return run_parts([part for part in PARTS if part.name in options.only], document, Path(options.output), end)


def run_parts(parts: Sequence[Part], document: dict[str, Any], output: Path, end: float) -> int:
    """Run the parts until `end` (`time.monotonic()`), and write `document` after each; returns the exit status."""
    folder = output / f"{document['name']}-parts"
    folder.mkdir(parents=True, exist_ok=True)
    document["parts"] = [_not_begun(part) for part in parts]
    try:
        for number, part in enumerate(parts):
            limit = limit_seconds(part, parts[number + 1 :], end - time.monotonic(), document["device"])
            _run(part, document["parts"][number], Place(document["device"], folder), limit, end)
            _write(document, output)
        document["finished"] = True
    finally:
        files = _write(document, output)
        print("\n" + terminal(document))
        print("written: " + " ".join(map(str, files)) + f"; logs: {folder}", flush=True)
    return int(any(part["status"] in ("failed", "stopped") for part in document["parts"]))


def _run(part: Part, told: dict[str, Any], place: Place, limit: float | None, end: float) -> None:
    """Fill in what is told of the part, also when this process is interrupted meanwhile."""
    if missing := part.missing():
        told.update(status="not there", note=missing)
    elif limit is None:
        told.update(status="left out", note=f"{max(0.0, end - time.monotonic()):.0f} s left")
    else:
        for file in place.folder.glob(f"{part.name}[.-]*"):  # of an earlier run
            file.unlink()
        print(f"{part.name}: {part.what}; at most {limit:.0f} s", flush=True)
        told.update(status="interrupted", limit_seconds=limit)
        start = time.monotonic()
        try:
            told.update(_outcome(part, place, start + limit))
        finally:
            told.update(seconds=time.monotonic() - start, rows=part.rows(place.folder))
    print(f"  {end_of(told)}", flush=True)


def _outcome(part: Part, place: Place, end: float) -> dict[str, str]:
    """How the commands of a part ended: status and note. After one that fails the next is begun all the same."""
    log, outcome = place.folder / f"{part.name}.log", {"status": "measured", "note": ""}
    for command in part.commands(place):
        ended = run_within(command, limit_seconds=max(1.0, end - time.monotonic()), log=log)
        if ended.status is None:
            return {"status": "stopped", "note": f"not done after {ended.seconds:.0f} s"}
        if ended.status not in part.fine and outcome["status"] == "measured":
            outcome = {"status": "failed", "note": f"status {ended.status}, {last_line(log)}"}
    return outcome


def _ask_device(device: str) -> dict[str, Any]:
    """What the result's heading says, from a process that ends before the first part begins."""
    with tempfile.TemporaryDirectory() as folder:
        log, file = Path(folder, "log"), Path(folder, "stamp.jsonl")
        ended = run_within(_stamp_command(device, file), limit_seconds=_STAMP_SECONDS, log=log)
        if ended.status is None:
            raise UserError(f"--device={device}: it does not answer within {_STAMP_SECONDS} s; try nvidia-smi")
        require(ended.status == 0, f"--device={device}: {last_line(log)}")
        return own_rows(file)[0]


def _stamp_command(device: str, file: Path) -> list[str]:
    return [sys.executable, "-m", "clipscale.bench.gpu.measure", "stamp", device, str(file)]


def _not_begun(part: Part) -> dict[str, Any]:
    facts = {"name": part.name, "what": part.what, "status": "not begun", "note": ""}
    return facts | {"seconds": 0.0, "limit_seconds": None, "rows": []}


def _write(document: dict[str, Any], output: Path) -> list[Path]:
    document["bars"] = bars(document["parts"])
    return write(document, output, markdown(document))


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """A SIGTERM raises KeyboardInterrupt meanwhile, where this thread may say so."""
    before = signal(SIGTERM, default_int_handler)
    try:
        yield
    finally:
        signal(SIGTERM, before)
