"""The two pictures of a result of `bench step`: samples a second over batch, and peak memory over batch.

pictures, problem = draw(document, Path("bench-results"))
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clipscale.bench.common.plots import STYLES, cannot_draw, foot
from clipscale.bench.common.words import size_name

_QUANTITIES = {"speed": ("Samples a second", "samples/s"), "memory": ("Peak memory beyond weights and moments", "MiB")}


def draw(document: dict[str, Any], folder: Path) -> tuple[list[Path], str]:
    """<name>-speed.png and <name>-memory.png in `folder`; or, where they cannot be drawn, the reason."""
    if len({case["batch"] for case in document["steps"]}) < 2:
        return [], "no pictures: a curve wants two batches"
    if problem := cannot_draw(document, folder):
        return [], problem
    pictures = []
    for quantity in _QUANTITIES:
        picture = folder / f"{document['name']}-{quantity}.png"
        _figure(document, quantity).savefig(picture, dpi=150)
        pictures.append(picture)
    return pictures, ""


def _figure(document: dict[str, Any], quantity: str):
    """One panel for each model."""
    from matplotlib.figure import Figure

    models = dict.fromkeys(case["model"] for case in document["steps"])
    figure = Figure(figsize=(8.4, 4.2 * len(models)), layout="constrained")
    for number, model in enumerate(models, start=1):
        cases = [case for case in document["steps"] if case["model"] == model]
        axis = figure.add_subplot(len(models), 1, number)
        _panel(axis, cases, quantity)
        title = f"{_QUANTITIES[quantity][0]}, {model}, {cases[0]['precision']}, fixed chunks"
        axis.set_title(title, loc="left", fontsize=10)
    foot(figure, document)
    return figure


def _panel(axis, cases: list[dict[str, Any]], quantity: str) -> None:
    value = _rate if quantity == "speed" else _mebibytes
    names = dict.fromkeys(row["contestant"] for case in cases for row in case["rows"])
    for name, (color, marker) in zip(names, STYLES, strict=False):
        points = [
            (case["batch"], *value(row))
            for case in cases
            for row in case["rows"]
            if row["contestant"] == name and row["status"] == "measured"
        ]
        if not points:
            continue
        xs, ys, lows, highs = zip(*points, strict=True)
        axis.plot(xs, ys, label=name, color=color, marker=marker, linewidth=1.6, markersize=5)
        axis.vlines(xs, lows, highs, color=color, linewidth=3, alpha=0.3)
    axis.set_xscale("log", base=2)
    if quantity == "memory":
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(lambda y, _: f"{y:,.0f}")
    else:
        axis.set_ylim(bottom=0)
    batches = [case["batch"] for case in cases]
    axis.set_xticks(batches, [size_name(batch).replace("k", " k").replace("m", " M") for batch in batches])
    axis.minorticks_off()
    axis.set_xlabel("batch (pairs; k = 1024)")
    axis.set_ylabel(_QUANTITIES[quantity][1])
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    if axis.lines:
        axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8)


def _rate(row: dict[str, Any]) -> tuple[float, float, float]:
    rate = row["samples_per_second"]
    return rate["median"], rate["low"], rate["high"]


def _mebibytes(row: dict[str, Any]) -> tuple[float, float, float]:
    mebibytes = row["peak_bytes"] / 2**20
    return mebibytes, mebibytes, mebibytes
