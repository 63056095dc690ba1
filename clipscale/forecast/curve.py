"""The learning rate over a run, drawn: in text, and as a picture.

text_plot(config)                              # some ten lines
draw_curve(config, Path("rate.png"))           # '' or why there is none
"""

from __future__ import annotations

from pathlib import Path

from clipscale.config import Config
from clipscale.errors import reason
from clipscale.schedule import learning_rate, schedule_lines, total_steps
from clipscale.words import short

_COLUMNS, _ROWS, _POINTS = 64, 8, 1000
_EIGHTHS = " ▁▂▃▄▅▆▇█"


def text_plot(config: Config) -> list[str]:
    """A column is a share of the steps, as high as the rate in its middle; the axis is in steps."""
    steps = total_steps(config)
    heights = [rate / config.peak_lr * _ROWS for _, rate in _points(config, min(_COLUMNS, steps))]
    lines = []
    for row in reversed(range(_ROWS)):
        label = {_ROWS - 1: f"{config.peak_lr:.3g}", 0: "0"}.get(row, "")
        cells = (_EIGHTHS[round(8 * min(1.0, max(0.0, height - row)))] for height in heights)
        lines.append(f"{label:>9} |{''.join(cells)}".rstrip())
    end = f"step {steps:,} ({short(config.train.samples)} samples)"
    return [*lines, f"{'':9} +{'-' * len(heights)}", f"{'':10} 1{end:>{max(len(heights) - 1, len(end) + 1)}}"]


def draw_curve(config: Config, picture: Path) -> str:
    """PNG, PDF or SVG, by the picture's suffix. Gives why there is none; empty where there is."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return f"no {picture.name}: matplotlib draws it, which is not installed: pip install matplotlib"
    figure = Figure(figsize=(7.2, 3.2), layout="constrained")
    axis = figure.subplots()
    steps, rates = zip(*_points(config, min(_POINTS, total_steps(config))), strict=True)
    axis.plot(steps, rates, color="#0077BB")
    axis.set(xlabel="step", ylabel="learning rate", ylim=(0, 1.05 * config.peak_lr))
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title(schedule_lines(config)[0], loc="left", fontsize=8, wrap=True, parse_math=False)
    try:
        figure.savefig(picture, dpi=150)
    except (OSError, ValueError) as error:
        return f"no {picture.name}: {reason(error) if isinstance(error, OSError) else error}"
    return ""


def _points(config: Config, count: int) -> list[tuple[int, float]]:
    """So many steps, evenly spread, with their rates."""
    batch, steps = config.train.global_batch, total_steps(config)
    middles = [int((2 * point + 1) * steps / (2 * count)) for point in range(count)]
    return [(step + 1, learning_rate(config, step * batch)) for step in middles]
