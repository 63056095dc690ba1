"""The picture of a result of `bench data`: pictures a second of each contestant, and where the time of one goes.

pictures, problem = draw(document, Path("bench-results"))
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clipscale.bench.common.plots import cannot_draw, foot
from clipscale.bench.data.stages import STAGES

_OURS, _THEIRS = "#0072B2", "#999999"
_STAGE_COLORS = ("#56B4E9", "#0072B2", "#D55E00", "#E69F00", "#009E73", "#CC79A7", "#000000", "#BBBBBB")


def draw(document: dict[str, Any], folder: Path) -> tuple[list[Path], str]:
    """<name>.png in `folder`; or, where it cannot be drawn, the reason."""
    if not (document["speed"] and document["stages"]):
        return [], "no pictures: they show the parts speed and stages"
    if problem := cannot_draw(document, folder):
        return [], problem
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 4.6), layout="constrained")
    speed, stages = figure.subplots(2, 1, height_ratios=(4, 3))
    _speed(speed, document["speed"])
    _stages(stages, document["stages"])
    for axis in (speed, stages):
        axis.invert_yaxis()
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
    foot(figure, document)
    picture = folder / f"{document['name']}.png"
    figure.savefig(picture, dpi=150)
    return [picture], ""


def _speed(axis: Any, speed: dict[str, Any]) -> None:
    """Bars of medians, lines from first to third quartile."""
    for row in speed["rows"]:
        rate = row["images_per_second"]
        color = _OURS if row["contestant"].startswith("clipscale") else _THEIRS
        axis.barh(row["contestant"], rate["median"], color=color, height=0.62)
        axis.plot([rate["low"], rate["high"]], [row["contestant"]] * 2, color="black", linewidth=1.2)
        text = f" {rate['median']:,.0f}   ({row['images_per_second_to_recipe']:.1f} x)"
        axis.text(rate["high"], row["contestant"], text, va="center", fontsize=8)
    axis.margins(x=0.18)
    axis.set_title(f"Images per second, end to end, {speed['cores']} cores", loc="left", fontsize=10)


def _stages(axis: Any, stages: dict[str, dict[str, float]]) -> None:
    for side, parts in stages.items():
        left = 0.0
        for stage, color in zip(STAGES, _STAGE_COLORS, strict=True):
            if stage in parts:
                axis.barh(side, parts[stage], left=left, color=color, height=0.62)
                left += parts[stage]
        axis.text(left, side, f" {left:,.0f}", va="center", fontsize=8)
    handles = [
        axis.barh([0], [0], color=color, label=stage) for stage, color in zip(STAGES, _STAGE_COLORS, strict=True)
    ]
    axis.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.45, -0.2), ncols=4, frameon=False, fontsize=8)
    axis.margins(x=0.1)
    axis.set_title("CPU microseconds of one picture, on one thread", loc="left", fontsize=10)
