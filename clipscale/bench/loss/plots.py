"""The two pictures of a result of `bench loss`: time over batch, and extra memory over batch, both log-log.

pictures, problem = draw(document, Path("bench-results"))
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clipscale.bench.common.plots import STYLES, cannot_draw, foot
from clipscale.bench.common.words import size_name

_REFERENCE = {"color": "#666666", "linewidth": 1.0, "linestyle": (0, (4, 3)), "zorder": 1}


def draw(document: dict[str, Any], folder: Path) -> tuple[list[Path], str]:
    """<name>-time.png and <name>-memory.png in `folder`; or, where they cannot be drawn, the reason."""
    if len({case["batch"] for case in document["cases"]}) < 2:
        return [], "no pictures: a curve wants two batches"
    if problem := cannot_draw(document, folder):
        return [], problem
    pictures = []
    for quantity in ("time", "memory"):
        picture = folder / f"{document['name']}-{quantity}.png"
        _figure(document, quantity).savefig(picture, dpi=150)
        pictures.append(picture)
    return pictures, ""


def _figure(document: dict[str, Any], quantity: str):
    """One panel for each width and precision."""
    from matplotlib.figure import Figure

    panels: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for case in document["cases"]:
        panels.setdefault((case["width"], case["precision"]), []).append(case)
    figure = Figure(figsize=(8.4, 4.2 * max(1, len(panels))), layout="constrained")
    styles = dict(zip((one["name"] for one in document["contestants"]), STYLES * 9, strict=False))
    for number, ((width, precision), cases) in enumerate(panels.items(), start=1):
        axis = figure.add_subplot(len(panels), 1, number)
        _panel(axis, cases, quantity, styles)
        what = "Time of loss and gradients" if quantity == "time" else "Memory beyond inputs and gradients"
        axis.set_title(f"{what}, width {width}, {precision}", loc="left", fontsize=10)
    foot(figure, document)
    return figure


def _panel(axis, cases: list[dict[str, Any]], quantity: str, styles: dict[str, tuple[str, str]]) -> None:
    batches = [case["batch"] for case in cases]
    value = _milliseconds if quantity == "time" else _mebibytes
    heights, ends = [], []
    for name, (color, marker) in styles.items():
        points = [(case["batch"], *value(row)) for case in cases for row in _measured(case, name)]
        if not points:
            continue
        xs, ys, lows, highs = zip(*points, strict=True)
        again = {"linestyle": ":", "markersize": 8, "markerfacecolor": "none"} if name.endswith("(autograd)") else {}
        look = {"linewidth": 1.6, "markersize": 5, "marker": marker, "color": color, "zorder": 3} | again
        axis.plot(xs, ys, label=_label(cases, name), **look)
        axis.vlines(xs, lows, highs, color=color, linewidth=3, alpha=0.3, zorder=2)
        heights += ys
        ends.append((ys[-1] / xs[-1] ** 2, _label(cases, name)))  # of lines that end at different batches, too
    name, floor = _reference_line(cases, quantity)
    axis.plot(batches, floor, label=name, **_REFERENCE)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(batches, [size_name(batch).replace("k", " k").replace("m", " M") for batch in batches])
    axis.minorticks_off()
    axis.set_xlabel("batch (pairs; k = 1024)")
    axis.set_ylabel("ms" if quantity == "time" else "MiB")
    axis.yaxis.set_major_formatter(lambda y, _: f"{y:,.0f}" if y >= 1 else f"{y:g}")
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    order = {label: rank for rank, (_, label) in enumerate(sorted(ends, reverse=True))}
    handles, labels = axis.get_legend_handles_labels()
    entries = sorted(zip(handles, labels, strict=True), key=lambda entry: order.get(entry[1], len(order)))
    axis.legend(*zip(*entries, strict=True), loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8)


def _measured(case: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [row for row in case["rows"] if row["contestant"] == name and row["status"] == "measured"]


def _milliseconds(row: dict[str, Any]) -> tuple[float, float, float]:
    both = row["both_ms"]
    return both["median"], both["low"], both["high"]


def _mebibytes(row: dict[str, Any]) -> tuple[float, float, float]:
    """At least a thousandth: a log axis has no zero."""
    mebibytes = max(row["extra_bytes"] / 2**20, 1e-3)
    return mebibytes, mebibytes, mebibytes


def _label(cases: list[dict[str, Any]], name: str) -> str:
    """With the first batch at which it was not measured any more, and why."""
    for case in cases:
        for row in case["rows"]:
            if row["contestant"] == name and row["status"] != "measured":
                return f"{name}\n({row['status'].partition(':')[0]} at {size_name(case['batch'])})"
    return name


def _reference_line(cases: list[dict[str, Any]], quantity: str) -> tuple[str, list[float]]:
    """8 B^2 D at the rate of a plain matrix product; or float32 gradients, 8 B D bytes."""
    if quantity == "memory":
        return "the gradients' own size\n(float32)", [8 * case["batch"] * case["width"] / 2**20 for case in cases]
    flops = [8 * case["batch"] ** 2 * case["width"] for case in cases]
    rates = [case["matmul"]["tflops"] * 1e12 for case in cases]
    return "8 B²D at the rate of\na plain product", [1e3 * flop / rate for flop, rate in zip(flops, rates, strict=True)]
