"""The results of `bench step` as a person reads them: a table on the terminal, the same in Markdown."""

from __future__ import annotations

from typing import Any

from clipscale.bench.common.results import LAST_LINE, heading, images
from clipscale.bench.common.tables import contestants_table, markdown_table, short
from clipscale.bench.common.words import size_name

PARTS = ("image forward", "text forward", "loss", "image backward", "text backward", "optimizer")
COLUMNS = (
    "contestant",
    "samples/s",
    "quartiles",
    "n",
    "of open_clip",
    "of full batch",
    "GFLOP a pair",
    "TFLOP/s",
    "of matmul",
    "kept",
    "peak MiB",
    *(f"{part}: MiB" for part in PARTS),
)

TOWER_COLUMNS = (
    "way",
    "ms",
    "quartiles",
    "n",
    "times as fast",
    "MB moved a sample",
    "of open_clip's",
    "MB kept a sample",
    "of open_clip's",
)


def case_title(case: dict[str, Any]) -> str:
    matmul = case["matmul"]
    return (
        f"{case['model']}, batch {size_name(case['batch'])}, chunks of {case['image_chunk']} pictures and "
        f"{case['text_chunk']} captions, {case['precision']}; plain {matmul['dtype']} product {matmul['size']}^3: "
        f"{short(matmul['tflops'])} TFLOP/s"
    )


def cells(case: dict[str, Any], row: dict[str, Any]) -> list[str]:
    """One row, by `COLUMNS`; a contestant that was not measured has the reason under "samples/s"."""
    if row["status"] != "measured":
        return [row["contestant"], row["status"], *["-"] * (len(COLUMNS) - 2)]
    rate, parts = row["samples_per_second"], row["peak_bytes_by_part"]
    return [
        row["contestant"],
        short(rate["median"]),
        f"{short(rate['low'])}..{short(rate['high'])}",
        str(rate["repeats"]),
        *(_times(row[key]) for key in ("to_open_clip", "to_full_batch")),
        short(row["tower_flop"] / case["batch"] / 1e9),
        short(row["tflops"]),
        f"{row['ratio_to_matmul']:.3f}",
        f"{row['kept_share']:.0%}",
        _mib(row["peak_bytes"]),
        *(_mib(parts[part]) if part in parts else "-" for part in PARTS),
    ]


def lines_below(case: dict[str, Any]) -> list[str]:
    """What a table does not hold: time by part, and the text tower alone."""
    timed = [row for row in case["rows"] if row["status"] == "measured" and row["seconds_by_part"]]
    return [*(_time_line(row) for row in timed), _text_line(case)]


def _time_line(row: dict[str, Any]) -> str:
    whole = sum(row["seconds_by_part"].values())
    parts = (f"{part} {short(1e3 * s)} ms ({s / whole:.0%})" for part, s in row["seconds_by_part"].items())
    tokens = f"{row['tokens_per_caption']:.1f} tokens a caption run"
    return f"{row['contestant']}, time by part: {', '.join(parts)}; {tokens}."


def _text_line(case: dict[str, Any]) -> str:
    """The text tower alone."""
    text = case["text"]
    return (
        f"Text tower, both passes, nothing kept: {short(text['own_us']['median'])} us a caption, "
        f"{short(text['full_us']['median'])} at {text['length']} tokens: {text['full_to_own']['median']:.2f} x; "
        f"captions of {case['mean_tokens']:.1f} tokens on the average."
    )


def parity_line(model: str, parity: dict[str, Any]) -> str:
    verdict = "equal" if parity["met"] else "NOT equal"
    return (
        f"{model}: {parity['steps']} steps of {parity['pairs']} pairs in float32, against open_clip's own loop: "
        f"{verdict}; losses within {parity['loss_difference']:.1e} (bound {parity['loss_bound']:.0e}), the scale's "
        f"gradient within {parity['scale_gradient_difference']:.1e} of its largest "
        f"(bound {parity['scale_gradient_bound']:.0e})."
    )


def towers_title(found: dict[str, Any], tower: str) -> str:
    rows = found["rows"][tower]
    return f"{found['model']}, {tower} tower, {rows[0]['samples']} samples, {found['precision']}"


def tower_cells(rows: list[dict[str, Any]]) -> list[list[str]]:
    """By `TOWER_COLUMNS`; the first row is open_clip's."""
    lines = []
    for row in rows:
        spread, samples = row["ms"], row["samples"]
        line = [row["way"], short(spread["median"]), f"{short(spread['low'])}..{short(spread['high'])}"]
        line += [str(spread["repeats"]), f"{row['time_to_open_clip']:.2f}"]
        for key in ("moved_bytes", "kept_bytes"):
            counted = row[key] is not None
            line += [short(row[key] / samples / 1e6), f"{row[key] / rows[0][key]:.2f}"] if counted else ["-", "-"]
        lines.append(line)
    return lines


def towers_table(found: dict[str, Any]) -> str:
    """For the terminal."""
    lines = []
    for tower, rows in found["rows"].items():
        cells = [("measured", line) for line in tower_cells(rows)]
        lines += [towers_title(found, tower), *contestants_table(TOWER_COLUMNS, cells)]
    return "\n".join(lines)


def text_table(case: dict[str, Any]) -> str:
    """For the terminal."""
    rows = [(row["status"], cells(case, row)) for row in case["rows"]]
    return "\n".join([case_title(case), *contestants_table(COLUMNS, rows), *lines_below(case)])


def markdown(document: dict[str, Any], pictures: list[str]) -> str:
    """The whole of the results, with what made them."""
    lines = [*heading(document, "Towers" if document["arguments"]["towers"] else "Training step")]
    lines += [*document["notes"], "", *images(pictures)]
    for case in document["steps"]:
        table = markdown_table(COLUMNS, [cells(case, row) for row in case["rows"]])
        below = (f"- {line}" for line in lines_below(case))
        lines += ["", f"## {case_title(case)}", "", *table, "", *below]
    for found in document["towers"]:
        for tower, rows in found["rows"].items():
            table = markdown_table(TOWER_COLUMNS, tower_cells(rows))
            lines += ["", f"## {towers_title(found, tower)}", "", *table]
    if document["parity"]:
        lines += ["", "## The same losses", ""]
        lines += [f"- {parity_line(model, parity)}" for model, parity in document["parity"].items()]
    hows = {row["contestant"]: row["how"] for case in document["steps"] for row in case["rows"]}  # of the last batch
    lines += ["", "## Contestants", "", *(f"- {name}: {how}" for name, how in hows.items())] if hows else []
    return "\n".join([*lines, "", LAST_LINE, ""])


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:.1f}"
