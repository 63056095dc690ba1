"""What the pictures of every benchmark share.

problem = cannot_draw(document, folder)  # empty, or why there are none
foot(figure, document)                   # device, date and commit below a figure
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

# Okabe and Ito's colours, which colour-blind readers can tell apart, each with a marker of its own.
STYLES = (
    ("#0072B2", "o"),
    ("#56B4E9", "s"),
    ("#D55E00", "^"),
    ("#009E73", "D"),
    ("#CC79A7", "v"),
    ("#E69F00", "P"),
    ("#000000", "X"),
    ("#7F7F7F", "*"),
)


def cannot_draw(document: dict[str, Any], folder: Path) -> str:
    """Why there can be no pictures here, and what to do; empty: there can."""
    try:
        import matplotlib

        matplotlib.use("Agg")
    except ImportError:
        again = folder / f"{document['name']}.json"
        return f"no pictures: pip install matplotlib, then clipscale bench plot {again}"
    return ""


def foot(figure, document: dict[str, Any]) -> None:
    stamp = document["stamp"]
    figure.supxlabel(f"{stamp['device']}, {stamp['date'][:10]}, commit {stamp['commit']}", fontsize=7, color="#666666")
