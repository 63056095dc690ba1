"""One stacked picture of where a run's time went, drawn from its metrics.jsonl.

problem = draw_parts("runs/a", Path("runs/a/parts.png"))    # empty, or why there is none and what to do
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

from clipscale.errors import reason
from clipscale.telemetry.parts import PARTS, from_row

_BINS = 150  # more steps than that are drawn as means over neighbours
_CUT = 2.0  # times the median: what is higher is cut off, or a slow first step would flatten all the others
_COLORS = dict(
    zip(
        PARTS,
        # A hue for each kind of work, and a tower's second pass darker than its first.
        (
            *("#CC3311", "#EE7733", "#88CCEE", "#99DDAA", "#DDCC77", "#0077BB", "#228855"),
            *("#AA4499", "#666677", "#332288", "#882255", "#CCCCCC"),
        ),
        strict=True,
    )
)


def draw_run(run: str) -> str:
    """Of a run that is over, into its folder; a line about it, whatever goes wrong."""
    picture = Path(run, "parts.png")
    try:
        problem = draw_parts(run, picture)
    except OSError as error:
        problem = f"no {picture.name}: {reason(error)}"
    return problem or f"where the time went: {picture}"


def draw_parts(run: str, picture: Path, title: str | None = None) -> str:
    """Seconds of a step by part, stacked, over the samples seen; PNG or SVG, by the picture's suffix.

    Steps whose rows have no parts are left out.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return (
            f"no {picture.name}: matplotlib draws it, which is not installed: pip install matplotlib, then "
            f"python docs/plot_run.py --parts {run} {picture}"
        )
    rows = _read(Path(run, "metrics.jsonl"))
    if not rows:
        return f"no {picture.name}: no row of {Path(run, 'metrics.jsonl')} says where the time went"
    edges, names, heights = _stack(rows)
    total = sum(sum(seconds.values()) for _, seconds in rows)
    sums = {name: sum(seconds.get(name, 0.0) for _, seconds in rows) for name in names}
    figure = Figure(figsize=(8.4, 4.2), layout="constrained")
    axis = figure.subplots()
    axis.stackplot(
        edges,
        [[*height, height[-1]] for height in heights],  # a step's height holds from its edge to the next
        labels=[f"{name} {sums[name] / total:.1%}" for name in names],
        colors=[_COLORS[name] for name in names],
        step="post",
        linewidth=0,
    )
    steps = [sum(parts) for parts in zip(*heights, strict=True)]
    axis.set(xlim=(edges[0], edges[-1]), ylim=(0, 1.05 * min(max(steps), _CUT * median(steps))))
    axis.set_xlabel("samples seen")
    axis.set_ylabel("seconds of a step, with what follows it")
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title(title or run, loc="left", fontsize=10, parse_math=False)
    figure.legend(loc="outside right upper", reverse=True, frameon=False, fontsize=8)
    figure.savefig(picture, dpi=150)
    return ""


def _read(metrics: Path) -> list[tuple[int, dict[str, float]]]:
    """(samples seen, seconds by part) of every row that has parts."""
    with metrics.open(encoding="utf-8") as file:
        rows: list[dict[str, Any]] = [json.loads(line) for line in file]
    return [(row["samples"], seconds) for row in rows if (seconds := from_row(row))]


def _stack(rows: list[tuple[int, dict[str, float]]]) -> tuple[list[int], list[str], list[list[float]]]:
    """The edges of the bins in samples, the parts that occur in the order of a step, and mean seconds [part][bin]."""
    bins = min(len(rows), _BINS)
    cuts = [len(rows) * place // bins for place in range(bins + 1)]
    samples = [seen for seen, _ in rows]
    begin = max(0, 2 * samples[0] - samples[1]) if len(rows) > 1 else 0
    edges = [begin, *(samples[cut - 1] for cut in cuts[1:])]
    names = [name for name in PARTS if any(name in seconds for _, seconds in rows)]
    heights = [
        [mean(seconds.get(name, 0.0) for _, seconds in rows[start:stop]) for start, stop in pairwise(cuts)]
        for name in names
    ]
    return edges, names, heights
