"""Where a run stands, from its folder alone: while it runs, and after it died. No torch import.

    status = read_status("runs/mine")       # plain values, as `clipscale status --json` prints them
    status_lines(status)                    # ['runs/mine: running: process 4711 on h7 ...', 'step 1,200 of ...']

Nothing is written. The files it reads: docs/reliability.md.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from clipscale.checkpoint.find import candidates
from clipscale.checkpoint.holder import HeldError, look_at_holder
from clipscale.config.load import config_from_yaml
from clipscale.errors import require
from clipscale.files import last_rows, read_numbers, read_rows
from clipscale.guard.diagnosis import diagnose
from clipscale.progress import time_left
from clipscale.resilience.beats import read_beats
from clipscale.resilience.leaving import MARKER
from clipscale.telemetry.goodput import COLUMNS, KINDS, Row, goodput, seconds_a_step
from clipscale.words import counted, short

_LEAST_SHARE = 0.0005  # of the run's time: what took less is not told
_SILENT_SECONDS = 20.0  # a rank writes where it is every five
_LATE = 10  # times the pace: from here on a running step is said to be late


def read_status(run_dir: str) -> dict[str, Any]:
    """All that is known of the run; what is not known is None.

    Raises:
        UserError: there is no such folder, or it is none of a run.
    """
    folder = Path(run_dir)
    require(folder.is_dir(), f"{run_dir!r} is no folder")
    checkpoints = candidates(folder / "checkpoints")
    names = ("metrics.jsonl", "attempts.jsonl")
    require(
        bool(checkpoints) or any((folder / name).exists() for name in names),
        f"{run_dir!r} is no run's folder: it holds no {', no '.join(names)} and no checkpoint",
    )
    attempts = list(read_rows(folder / "attempts.jsonl"))
    recent = last_rows(folder / "metrics.jsonl")
    found = goodput(
        attempts, *(read_numbers(folder / name, COLUMNS) for name in ("metrics.jsonl", "metrics.superseded.jsonl"))
    )
    attempt, row = attempts[-1] if attempts else {}, recent[-1] if recent else {}
    pace = seconds_a_step(recent, since=attempt["time"]) if attempt else None
    step, last_step = row.get("step"), attempt.get("last_step")
    left = last_step - (step or 0) if last_step is not None else None
    faults = list(read_rows(folder / "faults.jsonl"))
    interrupted, holder = _json(folder / MARKER), _holder(folder)
    return {
        "run": run_dir,
        "state": _state(running=holder is not None, interrupted=interrupted is not None, step=step, left=left),
        "holder": holder,
        "silent_ranks": _silent_ranks(folder) if holder is not None else [],
        "interrupted": interrupted,
        "step": step,
        "last_step": last_step,
        "samples": row.get("samples"),
        "loss": row.get("loss"),
        "seconds_since_row": _age(row.get("time")),
        "seconds_a_step": pace,
        "eta_seconds": pace * left if pace is not None and left else None,
        "checkpoint": _newest(checkpoints),
        "goodput": found and asdict(found) | {"share": found.share},
        "faults": dict(Counter(fault["kind"] for fault in faults)),
        "last_fault": faults[-1] if faults else None,
        "diagnosis": _diagnosis(folder, recent),
        "ended_by_error": _is_end(faults[-1], attempt) if faults and attempt else False,
    }


def status_lines(status: dict[str, Any]) -> list[str]:
    """The same for a person."""
    lines = [f"{status['run']}: {_state_line(status)}", _step_line(status)]
    lines += [f"silent: {rank}" for rank in status["silent_ranks"]]
    lines.append(_checkpoint_line(status["checkpoint"]))
    if status["goodput"]:
        lines.append(_goodput_line(status["goodput"]))
    if fault := status["last_fault"]:
        kinds = ", ".join(f"{kind} {count}" for kind, count in status["faults"].items())
        step = "" if fault["step"] is None else f", step {fault['step']}"
        when = f"{time_left(_age(fault['time']))} ago{step}"
        lines.append(f"faults: {kinds}; the last ({when}): {fault['what']}; {fault['action']}")
    else:
        lines.append("faults: none")
    return lines + [f"diagnosis: {line}" for line in status["diagnosis"]]


# --- reading ----------------------------------------------------------------------------------------------------------


def _holder(folder: Path) -> str | None:
    """The process that runs it, in words; None: none does."""
    try:
        look_at_holder(folder)
    except HeldError as held:
        return str(held)
    return None


def _state(*, running: bool, interrupted: bool, step: int | None, left: int | None) -> str:
    if running:
        return "running"
    if interrupted:
        return "interrupted"
    if step is None:
        return "not begun"
    return "complete" if left == 0 else "stopped"


def _is_end(fault: Row, attempt: Row) -> bool:
    """Whether this last fault ended the last attempt; a process that was killed leaves none."""
    return fault["kind"] == "error" and fault["time"] > attempt["time"]


def _silent_ranks(folder: Path) -> list[str]:
    """Of a run on several ranks: those that have written nothing for a while, with their last word."""
    beats = [beat for beat in read_beats(folder) if beat.age > _SILENT_SECONDS]
    return [f"{beat.name}: {beat.place}, {time_left(beat.age)} ago" for beat in beats]


def _newest(checkpoints: list[tuple[int, Path]]) -> dict[str, Any] | None:
    """The newest whose files have the sizes that were written, and how many newer ones have not. Hashes would take
    minutes: a resume compares them."""
    for passed_over, (step, path) in enumerate(checkpoints):
        if sizes := _sizes(path):
            written = (path / "manifest.json").stat().st_mtime
            return {
                "path": str(path),
                "step": step,
                "bytes": sum(sizes),
                "age_seconds": _age(written),
                "passed_over": passed_over,
            }
    return None


def _sizes(path: Path) -> list[int]:
    """Of its files; none if one of them has another size than its manifest says."""
    manifest = _json(path / "manifest.json") or {}
    try:
        sizes = {name: (path / name).stat().st_size for name in manifest}
        return list(sizes.values()) if all(sizes[name] == manifest[name]["bytes"] for name in sizes) else []
    except (OSError, KeyError, TypeError):
        return []


def _diagnosis(folder: Path, recent: list[Row]) -> list[str]:
    """What the numbers tell; nothing where the run's config is not there, or another version's."""
    try:
        config = config_from_yaml((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return diagnose(recent, config)


def _json(path: Path) -> dict[str, Any] | None:
    """A small file's object; None where there is none, or something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _age(when: float | None) -> float | None:
    return None if when is None else max(0.0, time.time() - when)


# --- telling ----------------------------------------------------------------------------------------------------------


def _state_line(status: dict[str, Any]) -> str:
    state = status["state"]
    if state == "running":
        return f"running: {status['holder']}"
    if state == "interrupted":
        why, step = (status["interrupted"].get(name) for name in ("why", "step"))
        when = "before a step was done" if step is None else f"saved after step {step:,}"
        return f"not running: told to stop ({why}), {when}; the same command goes on from there"
    if state == "stopped":
        how = (
            "an error ended it" if status["ended_by_error"] else "it ended without a word: killed, or its machine lost"
        )
        return f"not running: {how}; the same command goes on from the newest checkpoint"
    return {"complete": "complete", "not begun": "not running, and no step is done"}[state]


def _step_line(status: dict[str, Any]) -> str:
    step, last_step = status["step"], status["last_step"]
    if step is None:
        return "no step is done yet" + (f", of {last_step:,}" if last_step else "")
    of = f" of {last_step:,} ({step / last_step:.1%})" if last_step else ""
    parts = [f"step {step:,}{of}", f"samples {short(status['samples'], digits=4)}"]
    parts.append("loss not finite" if status["loss"] is None else f"loss {status['loss']:.4f}")
    since, pace = status["seconds_since_row"], status["seconds_a_step"]
    if since is not None:
        parts.append(f"{time_left(since)} ago")
    if pace is not None:
        parts.append(f"{pace:.3g} s a step")
        if status["state"] == "running" and since > _LATE * pace:
            parts.append("the next one is late")
    if status["eta_seconds"] is not None:
        parts.append(
            f"eta {time_left(status['eta_seconds'])}" + ("" if status["state"] == "running" else " once it runs")
        )
    return ", ".join(parts)


def _checkpoint_line(found: dict[str, Any] | None) -> str:
    if found is None:
        return "checkpoint: none that is whole"
    line = (
        f"checkpoint: after step {found['step']:,}, {time_left(found['age_seconds'])} old, {short(found['bytes'])}B, "
        "sizes as written (hashes are compared at a resume)"
    )
    newer = counted(found["passed_over"], "newer one is damaged", "newer ones are damaged")
    return f"{line}; {newer}" if found["passed_over"] else line


def _goodput_line(found: dict[str, Any]) -> str:
    seconds, steps = found["seconds"], found["steps"]
    total = sum(seconds.values())
    told = []
    for kind in KINDS:
        if kind != "steps" and seconds[kind] >= _LEAST_SHARE * total:
            count = f" ({counted(steps[kind], 'step')})" if kind in steps else ""
            told.append(f"{kind} {seconds[kind] / total:.1%}{count}")
    rest = f"; the rest: {', '.join(told)}" if told else ""
    return f"goodput {found['share']:.1%} of {time_left(total)} in {counted(found['attempts'], 'attempt')}{rest}"
