"""Tables for the terminal and in Markdown, and numbers as they stand in them.

short(0.019262)                          # 0.01926
aligned(["clipscale", "39.5"], [12, 6])  # one line: the first cell on the left, numbers on the right
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def aligned(row: Sequence[str], widths: Sequence[int]) -> str:
    """One line for the terminal: the first cell on the left, numbers on the right."""
    return "  ".join(f"{cell:{'>' if i else '<'}{widths[i]}}" for i, cell in enumerate(row))


def contestants_table(columns: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> list[str]:
    """Lines for the terminal: the heads, and each (status, cells). The reason why a contestant was not measured, its
    status then, takes the rest of its line."""
    measured = [columns, *(cells for status, cells in rows if status == "measured")]
    names = [*measured, *(cells for _, cells in rows)]
    widths = [max(len(cells[i]) for cells in (measured if i else names)) for i in range(len(columns))]
    return [aligned(columns, widths)] + [
        aligned(cells, widths) if status == "measured" else f"{cells[0].ljust(widths[0])}  {status}"
        for status, cells in rows
    ]


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [_row(columns), _row(["---", *["---:"] * (len(columns) - 1)]), *map(_row, rows)]


def short(number: float) -> str:
    """Four digits, without an exponent where it can be helped."""
    if number == 0 or not 1e-3 <= abs(number) < 1e6:
        return f"{number:.3g}"
    return f"{number:.{max(0, 3 - math.floor(math.log10(abs(number))))}f}"


def _row(row: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"
