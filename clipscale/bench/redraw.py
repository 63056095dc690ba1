"""`clipscale bench plot`: the pictures of a result, drawn again from its JSON.

pictures = redraw("bench-results/loss-nvidia-h200.json")
"""

from __future__ import annotations

import json
from pathlib import Path

from clipscale.bench.data import plots as data_plots
from clipscale.bench.loss import plots as loss_plots
from clipscale.bench.step import plots as step_plots
from clipscale.errors import UserError, reason, require

_DRAWS = {"cases": loss_plots.draw, "speed": data_plots.draw, "steps": step_plots.draw}  # by a part that one has


def redraw(path: str) -> list[Path]:
    """The pictures of a result's JSON file, beside it. UserError for a file that is none, or without matplotlib."""
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({reason(error)}); give a .json that clipscale bench wrote") from error
    fits = isinstance(document, dict) and document.get("format") == 1
    draws = [draw for part, draw in _DRAWS.items() if fits and part in document]
    require(len(draws) == 1, f"{path}: not a result; give a .json that clipscale bench wrote")
    pictures, problem = draws[0](document, Path(path).parent)
    require(not problem, problem)
    return pictures
