"""The results of `bench data` as tables, for the terminal and in Markdown.

for table in tables(document):
    print(text(table))
write(document, folder, markdown(document, pictures))
"""

from __future__ import annotations

from typing import Any, NamedTuple

from clipscale.bench.common.results import LAST_LINE, heading, images
from clipscale.bench.common.tables import aligned, markdown_table, short
from clipscale.bench.data.stages import STAGES
from clipscale.words import counted


class Table(NamedTuple):
    title: str
    columns: list[str]
    rows: list[list[str]]


def tables(document: dict[str, Any]) -> list[Table]:
    """Of the parts that were measured."""
    found = []
    for part, make in _TABLES.items():
        if document[part]:
            found.append(make(document[part]))
    if document["speed"]:
        found.insert(1, _cores_table(document["speed"], document["arguments"]["model_rates"]))
    if document["bars"]:
        found.append(_bars_table(document["bars"]))
    return found


def text(table: Table) -> str:
    rows = [table.columns, *table.rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(table.columns))]
    return "\n".join([table.title, *(aligned(row, widths) for row in rows)])


def markdown(document: dict[str, Any], pictures: list[str]) -> str:
    lines = [*heading(document, "Data loading"), *document["notes"], "", *images(pictures)]
    for table in tables(document):
        lines += ["", f"## {table.title}", "", *markdown_table(table.columns, table.rows)]
    if document["speed"]:
        lines += [
            "",
            "## Contestants",
            "",
            *(f"- {row['contestant']}: {row['how']}" for row in document["speed"]["rows"]),
        ]
    return "\n".join([*lines, "", LAST_LINE, ""])


def _speed_table(speed: dict[str, Any]) -> Table:
    columns = ["contestant", "images/s", "quartiles", "a core", "CPU us/image", "quartiles"]
    columns += ["images/s: of recipe", "of uint8", "CPU: of recipe", "of uint8"]
    rows = []
    for row in speed["rows"]:
        rate, cpu = row["images_per_second"], row["cpu_us"]
        cells = [row["contestant"], short(rate["median"]), _quartiles(rate), short(rate["median"] / speed["cores"])]
        cells += [short(cpu["median"]), _quartiles(cpu)]
        cells += [f"{row[f'images_per_second_{other}']:.2f}" for other in ("to_recipe", "to_uint8")]
        cells += [f"{row[f'cpu_us_{other}']:.3f}" for other in ("to_recipe", "to_uint8")]
        rows.append(cells)
    return Table(f"End to end, {speed['cores']} cores, {speed['rounds']} rounds", columns, rows)


def _cores_table(speed: dict[str, Any], model_rates: dict[str, float]) -> Table:
    """Inline decoding is for debugging, so it has no column."""
    sides = [row for row in speed["rows"] if "inline" not in row["contestant"]]
    columns = ["one GPU takes"]
    for row in sides:
        columns.append(row["contestant"])
        if row["contestant"] == "clipscale":
            columns.append("replay.kind=recompute")
    rows = []
    for name, rate in model_rates.items():
        cells = [name if "images/s" in name else f"{name}, {rate:g} images/s"]
        for row in sides:
            cores = rate / (row["images_per_second"]["median"] / speed["cores"])
            cells.append(f"{cores:.1f}")
            if row["contestant"] == "clipscale":
                cells.append(f"{2 * cores:.1f}")
        rows.append(cells)
    return Table("Cores for a GPU", columns, rows)


def _stages_table(stages: dict[str, dict[str, float]]) -> Table:
    rows = [[stage, *(short(parts[stage]) if stage in parts else "-" for parts in stages.values())] for stage in STAGES]
    rows.append(["in all", *(short(sum(parts.values())) for parts in stages.values())])
    return Table("CPU microseconds of one picture, on one thread", ["stage", *stages], rows)


def _transport_table(transport: dict[str, Any]) -> Table:
    columns = ["contestant", "ms a batch", "quartiles", "CPU ms here", "CPU ms of both processes", "us a picture"]
    rows = []
    for row in transport["rows"]:
        wall = row["milliseconds"]
        cells = [row["contestant"], short(wall["median"]), _quartiles(wall)]
        cells += [short(row[quantity]["median"]) for quantity in ("own_cpu_ms", "cpu_ms")]
        rows.append([*cells, short(wall["median"] / transport["pictures"] * 1e3)])
    size = f"{transport['pictures']} x 3 x {transport['side']} x {transport['side']} uint8"
    return Table(f"Transport to the training process, {size}, {transport['bytes'] / 1e6:.1f} MB", columns, rows)


def _index_table(index: list[dict[str, Any]]) -> Table:
    columns = ["shards", "hash", "samples", "bytes a sample", "samples/s a core"]
    rows = [
        [
            row["shards"],
            row["hash"],
            str(row["samples"]),
            short(row["bytes_per_sample"]),
            f"{row['samples_per_second']:.0f}",
        ]
        for row in index
    ]
    return Table("Index", columns, rows)


def _order_table(order: list[dict[str, Any]]) -> Table:
    columns = ["layout", "set-up ms", "slice ms, cold", "warm", "held MiB", "shards a batch", "a rank", "neighbours"]
    rows = []
    for row in order:
        cells = [row["layout"], *(short(row[f"{name}_ms"]) for name in ("setup", "slice_cold", "slice_warm"))]
        cells += [_mib(row["memory_bytes"]), str(row["batch_shards"]), str(row["rank_shards"])]
        rows.append([*cells, f"{row['neighbours_over_chance']:.2f}"])
    return Table(f"Order of 400 million samples, slices of {order[0]['slice']:,} positions", columns, rows)


def _soak_table(soak: dict[str, Any]) -> Table:
    processes = ("loader", "training process")
    columns = ["samples"]
    for process in processes:
        columns += [f"{process}: resident MiB", "by share", "private"]
    rows = []
    for point in soak["points"]:
        rows.append([f"{point['samples']:,}", *(_mib(size) for one in processes for size in point[one].values())])
    rows.append(["most above the first", *(_mib(size) for one in processes for size in soak["growth"][one].values())])
    verdict = "flat" if soak["flat"] else "not flat"
    title = f"Memory over {counted(soak['samples'], 'sample')} in {counted(soak['shards'], 'shard')}"
    return Table(f"{title}: {verdict} within {_mib(soak['bound_bytes'])} MiB", columns, rows)


def _bars_table(bars: list[dict[str, Any]]) -> Table:
    rows = [[bar["what"], bar["bound"], short(bar["value"]), "yes" if bar["met"] else "no"] for bar in bars]
    return Table("Bars", ["what", "wanted", "measured", "reached"], rows)


_TABLES = {
    "speed": _speed_table,
    "stages": _stages_table,
    "transport": _transport_table,
    "index": _index_table,
    "order": _order_table,
    "soak": _soak_table,
}


def _quartiles(spread: dict[str, Any]) -> str:
    return f"{short(spread['low'])}..{short(spread['high'])}"


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:.1f}"
