"""The results as a person reads them: a table on the terminal, the same in Markdown; and as JSON, with every number."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from clipscale.bench.options import size_name

COLUMNS = (
    "contestant",
    "forward ms",
    "backward ms",
    "both ms",
    "quartiles",
    "n",
    "TFLOP/s",
    "of matmul",
    "extra MiB",
    "error dI",
    "error dT",
    "error loss",
    "error ds",
)
_BOTH = COLUMNS.index("both ms")
LAST_LINE = "What the columns mean: `docs/benchmarks/README.md` of clipscale."
_ERRORS = ("d_image", "d_text", "loss", "d_scale")


def case_title(case: dict[str, Any]) -> str:
    matmul = case["matmul"]
    return (
        f"batch {size_name(case['batch'])}, width {case['width']}, {case['precision']}; "
        f"plain {matmul['dtype']} product {matmul['size']}^3: {short(matmul['tflops'])} TFLOP/s"
    )


def cells(row: dict[str, Any]) -> list[str]:
    """One row, by `COLUMNS`; a contestant that was not measured has the reason under "both ms"."""
    name, engine = row["contestant"], row["engine"]
    if engine and not name.endswith(engine):
        name += f" [{engine}]"
    if row["status"] != "measured":
        return [name, *["-"] * (_BOTH - 1), row["status"], *["-"] * (len(COLUMNS) - _BOTH - 1)]
    both, error = row["both_ms"], row["error"] or {}
    return [
        name,
        short(row["forward_ms"]["median"]),
        short(row["backward_ms"]["median"]),
        short(both["median"]),
        f"{short(both['low'])}..{short(both['high'])}",
        f"{both['repeats']}{'' if row['warm'] else ' cold'}",
        short(row["tflops"]),
        f"{row['ratio_to_matmul']:.3f}",
        "-" if row["extra_bytes"] is None else f"{row['extra_bytes'] / 2**20:.1f}",
        *(_error(error.get(name)) for name in _ERRORS),
    ]


def text_table(case: dict[str, Any]) -> str:
    """For the terminal; the reason why a contestant was not measured takes the rest of its line."""
    rows = [(row["status"], cells(row)) for row in case["rows"]]
    measured = [list(COLUMNS), *(row for status, row in rows if status == "measured")]
    names = [*measured, *(row for _, row in rows)]
    widths = [max(len(row[i]) for row in (measured if i else names)) for i in range(len(COLUMNS))]
    lines = [case_title(case), aligned(COLUMNS, widths)]
    lines += [
        aligned(row, widths) if status == "measured" else f"{row[0].ljust(widths[0])}  {status}" for status, row in rows
    ]
    return "\n".join(lines)


def aligned(row: Sequence[str], widths: Sequence[int]) -> str:
    """One line for the terminal: the first cell on the left, numbers on the right."""
    return "  ".join(f"{cell:{'>' if i else '<'}{widths[i]}}" for i, cell in enumerate(row))


def markdown(document: dict[str, Any], pictures: list[str]) -> str:
    """The whole of the results, with what made them."""
    lines = heading(document, "Contrastive loss")
    lines += document["notes"]
    lines += ["", *images(pictures)]
    for case in document["cases"]:
        lines += ["", f"## {case_title(case)}", "", *markdown_table(COLUMNS, [cells(row) for row in case["rows"]])]
    lines += ["", "## Contestants", ""]
    lines += [
        f"- {one['name']}: {one['problem'] or ' '.join([one['package'], one['version']])}; {one['how']}"
        for one in document["contestants"]
    ]
    return "\n".join([*lines, "", LAST_LINE, ""])


def heading(document: dict[str, Any], what: str) -> list[str]:
    """Title, what made the results, and whether they are whole."""
    stamp = document["stamp"]
    lines = [
        f"# {what} on {stamp['device']}",
        "",
        f"Measured {stamp['date']} by clipscale {stamp['clipscale']} at commit {stamp['commit']}, with torch "
        f"{stamp['torch']}, triton {stamp['triton']}, CUDA {stamp['cuda']}, driver {stamp['driver']}, Python "
        f"{stamp['python']}:",
        "",
        f"```\n{document['command']}\n```",
        "",
    ]
    return lines if document["finished"] else [*lines, "**Not finished**: the command ended before its last case.", ""]


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [_row(columns), _row(["---", *["---:"] * (len(columns) - 1)]), *map(_row, rows)]


def images(pictures: list[str]) -> list[str]:
    return [f"![{Path(picture).stem}]({picture})" for picture in pictures]


def write(document: dict[str, Any], folder: Path, text: str) -> list[Path]:
    """<name>.json and <name>.md in `folder`, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers, page = folder / f"{document['name']}.json", folder / f"{document['name']}.md"
    numbers.write_text(json.dumps(_finite(document), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    page.write_text(text, encoding="utf-8")
    return [numbers, page]


def finish(
    document: dict[str, Any],
    folder: Path,
    *,
    draw: Callable[[dict[str, Any], Path], tuple[list[Path], str]],
    markdown: Callable[[dict[str, Any], list[str]], str],
) -> None:
    """Write a result with its pictures, and say where everything lies. `draw`: the pictures, or why there is none."""
    pictures, problem = draw(document, folder)
    files = [*write(document, folder, markdown(document, [picture.name for picture in pictures])), *pictures]
    if problem:
        print(problem)
    print("written: " + " ".join(str(file) for file in files))


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become words."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _row(row: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"


def short(number: float) -> str:
    """Four digits, without an exponent where it can be helped."""
    if number == 0 or not 1e-3 <= abs(number) < 1e6:
        return f"{number:.3g}"
    return f"{number:.{max(0, 3 - math.floor(math.log10(abs(number))))}f}"


def _error(error: float | str | None) -> str:
    return "-" if error is None else f"{float(error):.1e}"
