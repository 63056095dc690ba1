"""The results of `bench gpu` as a person reads them: bars first, then every part with its rows.

print(terminal(document))
write(document, folder, markdown(document))
"""

from __future__ import annotations

from typing import Any

from clipscale.bench.common.results import LAST_LINE, heading
from clipscale.bench.common.tables import aligned, markdown_table, short
from clipscale.bench.gpu.bars import end_of

_BARS = ("bar", "wanted", "reached", "next thing to try")
_PARTS = ("part", "seconds", "limit", "end")
TINY = "On a CPU every part is tiny: this shows that the parts run, and the figures mean nothing."


def terminal(document: dict[str, Any]) -> str:
    """How the parts ended, and the bars, a line or two each: a table of them would be too wide."""
    parts = [list(_PARTS), *map(_part_cells, document["parts"])]
    widths = [max(len(row[i]) for row in parts) for i in range(len(_PARTS) - 1)]
    lines = [f"{aligned(row[:-1], widths)}  {row[-1]}" for row in parts]
    lines += ["", "bar: wanted, reached, next thing to try"]
    for bar in document["bars"]:
        lines.append(f"{_mark(bar)} {bar['what']}: {bar['bound']}, {bar['reached']}")
        lines += [f"     {bar['next']}"] if bar["next"] else []
    return "\n".join([*lines, *_notes(document)])


def markdown(document: dict[str, Any]) -> str:
    """The whole of the results, with what made them."""
    lines = [*heading(document, "A GPU's first hour"), *_notes(document)]
    bars = [[bar["what"], bar["bound"], _reached(bar), bar["next"] or "-"] for bar in document["bars"]]
    lines += ["", *markdown_table(_BARS, bars)]
    lines += ["", "## Parts", "", *markdown_table(_PARTS, [_part_cells(part) for part in document["parts"]])]
    for part in document["parts"]:
        if part["rows"]:
            columns = list(dict.fromkeys(name for row in part["rows"] for name in row))
            rows = [[_cell(row.get(name)) for name in columns] for row in part["rows"]]
            lines += ["", f"## {part['name']}: {part['what']}", "", *markdown_table(columns, rows)]
    return "\n".join([*lines, "", LAST_LINE, ""])


def _notes(document: dict[str, Any]) -> list[str]:
    return [TINY] if document["device"] == "cpu" else []


def _part_cells(part: dict[str, Any]) -> list[str]:
    limit = part["limit_seconds"]
    return [part["name"], f"{part['seconds']:.0f}", "-" if limit is None else f"{limit:.0f}", end_of(part)]


def _mark(bar: dict[str, Any]) -> str:
    return {True: "yes ", False: "no  ", None: "?   "}[bar["met"]]


def _reached(bar: dict[str, Any]) -> str:
    return bar["reached"] if bar["met"] is not False else f"**{bar['reached']}**"


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return short(value) if isinstance(value, float) else str(value)
