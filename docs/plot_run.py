"""Draw a run's curves from its metrics.jsonl: loss, and zero-shot top-1 where it was measured; or where its time went.

python docs/plot_run.py runs/quickstart docs/quickstart.png
python docs/plot_run.py --parts runs/quickstart runs/quickstart/parts.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

try:
    import matplotlib
except ModuleNotFoundError:
    raise SystemExit("docs/plot_run.py draws with matplotlib, which is not installed: pip install matplotlib") from None

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from clipscale.telemetry.parts_picture import draw_parts

LOSS, SCORE = "#2a50a0", "#c03a2b"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("picture", type=Path, help="PNG or SVG to write")
    parser.add_argument("--title", default=None)
    parser.add_argument("--parts", action="store_true", help="draw where the time of a step went")
    arguments = parser.parse_args()
    metrics = arguments.run / "metrics.jsonl"
    if not metrics.is_file():
        raise SystemExit(f"{metrics} does not exist; name the folder of a run that has begun")
    arguments.picture.parent.mkdir(parents=True, exist_ok=True)
    if arguments.parts:
        raise SystemExit(draw_parts(str(arguments.run), arguments.picture, arguments.title) or None)
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    draw_curves(rows, arguments.title or str(arguments.run)).savefig(arguments.picture, dpi=150)


def draw_curves(rows: list[dict], title: str) -> plt.Figure:
    scored = [row for row in rows if "zeroshot/top1" in row]
    figure, axis = plt.subplots(figsize=(7.2, 3.6), layout="constrained")
    axis.plot([row["samples"] for row in rows], [row["loss"] for row in rows], color=LOSS, linewidth=1.2)
    axis.set_xlabel("samples seen")
    axis.set_ylabel("contrastive loss (nats)", color=LOSS)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:g} k" if value else "0")
    axis.spines[["top"]].set_visible(False)
    axis.grid(alpha=0.25)
    if scored:
        right = axis.twinx()
        top1 = [row["zeroshot/top1"] for row in scored]
        right.plot([row["samples"] for row in scored], top1, "o-", color=SCORE, markersize=4)
        right.set_ylim(0, 1)
        right.set_ylabel("zero-shot top-1", color=SCORE)
        right.spines[["top"]].set_visible(False)
        end = (scored[-1]["samples"], top1[-1])
        right.annotate(f"{top1[-1]:.3f}", end, (-4, 6), textcoords="offset points", ha="right", color=SCORE)
    axis.set_title(title, loc="left", fontsize=10)
    return figure


if __name__ == "__main__":
    main()
