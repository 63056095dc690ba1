"""The results as a person reads them: a table on the terminal, the same in Markdown."""

from __future__ import annotations

from typing import Any

from clipscale.bench.common.results import LAST_LINE, heading, images
from clipscale.bench.common.tables import contestants_table, markdown_table, short
from clipscale.bench.common.words import size_name

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
    both, backward, error = row["both_ms"], row["backward_ms"], row["error"] or {}
    return [
        name,
        short(row["forward_ms"]["median"]),
        "-" if backward is None else short(backward["median"]),
        short(both["median"]),
        f"{short(both['low'])}..{short(both['high'])}",
        f"{both['repeats']}{'' if row['warm'] else ' cold'}",
        short(row["tflops"]),
        f"{row['ratio_to_matmul']:.3f}",
        "-" if row["extra_bytes"] is None else f"{row['extra_bytes'] / 2**20:.1f}",
        *(_error(error.get(name)) for name in _ERRORS),
    ]


def text_table(case: dict[str, Any]) -> str:
    """For the terminal."""
    rows = [(row["status"], cells(row)) for row in case["rows"]]
    return "\n".join([case_title(case), *contestants_table(COLUMNS, rows)])


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


def _error(error: float | str | None) -> str:
    return "-" if error is None else f"{float(error):.1e}"
