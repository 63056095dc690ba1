"""What a part has left on the disk, as rows: flat, a name and a number or a word each. None yet: no rows.

own_rows(folder / "towers.jsonl")        # of measure.py: rows already
loss_rows(folder / "loss.json")          # of another benchmark: what its table says, as far as it came
pytest_rows(folder)                        # of pytest's log: how many passed, and what failed first
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_SHOWN_FAILURES = 12
_OUTCOME = re.compile(r"^(?:\[[^\]]*\] *)?(\S+\.py::.+?) (PASSED|FAILED|ERROR|SKIPPED)\b")
_REASON = re.compile(r"^(?:FAILED|ERROR) (\S+\.py::.+?) - (.*)$")


def own_rows(file: Path) -> list[dict[str, Any]]:
    """Of a file with a row a line; a last line that was cut short is none."""
    return [row for line in _text(file).splitlines() if (row := _parsed(line)) is not None]


def loss_rows(file: Path) -> list[dict[str, Any]]:
    """Of a result of `clipscale bench loss`: one row for a contestant in a case."""
    rows = []
    for case in (_parsed(_text(file)) or {"cases": []})["cases"]:
        for row in case["rows"]:
            found = {name: case[name] for name in ("batch", "precision")} | {"contestant": row["contestant"]}
            if row["status"] == "measured":
                found |= {
                    "both ms": row["both_ms"]["median"],
                    "TFLOP/s": row["tflops"],
                    "of matmul": row["ratio_to_matmul"],
                    "extra MB": row["extra_bytes"] / 1e6,
                }
            rows.append(found | {"note": row["status"]})
    return rows


def step_rows(file: Path) -> list[dict[str, Any]]:
    """Of a result of `clipscale bench step`: one row for a contestant in a case."""
    rows = []
    for case in (_parsed(_text(file)) or {"steps": []})["steps"]:
        for row in case["rows"]:
            found = {name: case[name] for name in ("model", "batch")} | {"contestant": row["contestant"]}
            if row["status"] == "measured":
                found |= {
                    "step s": row["step_seconds"]["median"],
                    "pairs/s": row["samples_per_second"]["median"],
                    "of open_clip": row["to_open_clip"],
                    "kept share": row["kept_share"],
                    "of matmul": row["ratio_to_matmul"],
                    "peak GB": row["peak_bytes"] / 1e9,
                }
            rows.append(found | {"note": row["status"]})
    return rows


def pytest_rows(folder: Path) -> list[dict[str, Any]]:
    """Of what pytest -v printed: the numbers, and the first that failed, with the reason where it came to tell it."""
    lines = _text(folder / "tests.log").splitlines()
    outcomes = dict(match.groups() for line in lines if (match := _OUTCOME.match(line)))
    if not outcomes:
        return []
    counts = Counter(outcomes.values())
    rows = [{"what": word.lower(), "value": counts[word]} for word in ("PASSED", "FAILED", "ERROR", "SKIPPED")]
    reasons = dict(match.groups() for line in lines if (match := _REASON.match(line)))
    return [*rows, *_failures(outcomes, reasons)]


def _failures(outcomes: dict[str, str], reasons: dict[str, str]) -> Iterator[dict[str, Any]]:
    failed = [test for test, outcome in outcomes.items() if outcome in ("FAILED", "ERROR")]
    for test in failed[:_SHOWN_FAILURES]:
        yield {"what": test, "value": outcomes[test].lower(), "note": reasons.get(test, "")}


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""


def _parsed(text: str) -> dict[str, Any] | None:
    try:
        return json.loads(text)
    except ValueError:
        return None
