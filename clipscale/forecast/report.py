"""The answer of `clipscale plan` as text.

lines = report_lines(answer)           # of answer.plan_run
lines += scale_lines(rows)             # of answer.scale_rows
"""

from __future__ import annotations

from typing import Any

from clipscale.forecast.hardware import CORE_FLOPS
from clipscale.forecast.measured import DECODE
from clipscale.forecast.seconds import CPU_LOSS, CPU_TOWERS, LOSS, PRODUCTS, TRAFFIC
from clipscale.progress import duration
from clipscale.words import counted, short

_CORE = f"{CORE_FLOPS / 1e9:.0f} GFLOP/s a core"
_STATED = {
    "towers": f"towers: the datasheet's rate of products at {100 * PRODUCTS:.0f} % and its bandwidth at "
    f"{100 * TRAFFIC:.0f} %, the shares of one H100",
    "loss": f"loss: {100 * LOSS:.0f} % of the datasheet's rate of products",
}
_STATED_CPU = {
    "towers": f"towers: {100 * CPU_TOWERS:.0f} % of {_CORE}",
    "loss": f"loss: {100 * CPU_LOSS:.0f} % of {_CORE}",
}
_DECODING = {"decoding": f"decoding: {DECODE:,.0f} pictures/s a core, JPEGs of short side 256 cut to 224 (an AMD EPYC)"}


def report_lines(answer: dict[str, Any]) -> list[str]:
    """What runs, its memory, its time, what limits it, and what to change."""
    lines = [*_run(answer), "", *_memory(answer)]
    if "seconds" in answer:
        lines += ["", *_seconds(answer)]
    advice = [*answer["advice"], *answer.get("timing_advice", [])]
    return [*lines, *(f"to change: {line}" for line in advice)]


def _run(answer: dict[str, Any]) -> list[str]:
    run, device = answer["run"], answer["device"]
    return [
        f"{run['model']}, {short(run['parameters'])} parameters (by {run['by']}); "
        f"{counted(run['global_batch'], 'pair')} a step, {run['pairs_per_rank']:,} on each of "
        f"{counted(run['ranks'], 'rank')} of {device['name']}; {counted(run['steps'], 'step')}",
        f"chunks of {counted(run['image_chunk'], 'picture')} and {counted(run['text_chunk'], 'caption')}; captions of "
        f"{run['tokens_per_caption']:g} tokens; {run['kept_share']:.0%} go through their tower once; pictures wait on "
        f"the {run['replay']}",
    ]


def _memory(answer: dict[str, Any]) -> list[str]:
    memory, cores = answer["memory"], answer["device"]["cores"]
    title = "memory of a rank" if cores else "memory of a GPU"
    lines = [title, *_table({name: _size(size) for name, size in memory["parts"].items() if size})]
    verdict = "fits" if memory["fits"] else "does not fit"
    where = "this machine" if cores else "a GPU"
    total, there = (_size(memory[name]).strip() for name in ("total", "device"))
    lines.append(f"  at the peak, in {memory['peak']}, {total} of the {there} of {where}: {verdict}")
    if memory["host"]:
        lines += ["memory of the host, a rank", *_table({name: _size(size) for name, size in memory["host"].items()})]
        node, copy = memory["ranks_per_node"], memory["host"].get("copy for checkpoints", 0)
        of_node = node * (memory["host_total"] - copy) + copy
        lines.append(
            f"  of {counted(node, 'rank')} of a node {_size(of_node).strip()}; the copy is the first rank's alone"
        )
    return lines


def _seconds(answer: dict[str, Any]) -> list[str]:
    seconds, decode, device = answer["seconds"], answer["decode"], answer["device"]
    of_run = answer["run"]["steps"]
    rows = {
        name: f"{part:10.3f} s a step {duration(part * of_run):>12} in all"
        for name, part in seconds["parts"].items()
        if part
    }
    rate = seconds["pairs_per_second"]
    assumed = (_STATED_CPU if device["cores"] else _STATED) | _DECODING
    sources = [f"{part}: measured, {path}" for part, path in answer["from"].items()]
    sources += [words for part, words in assumed.items() if part not in answer["from"]]
    return [
        "time",
        *_table(rows),
        f"  {seconds['step']:.3f} s a step, {short(rate)} pairs/s; {duration(seconds['run'])} in all",
        *(f"  {line}" for line in sources),
        f"data: a rank decodes with {decode['cores_per_rank']:.1f} cores as fast as it computes, at "
        f"{decode['pictures_per_core']:,.0f} pictures/s a core; data.threads={decode['threads']}",
        f"limit: {answer['limit']}",
    ]


def scale_lines(rows: list[dict[str, Any]]) -> list[str]:
    """A table of ranks with the pairs of each kept as they are."""
    head = (
        f"{'ranks':>5} {'batch':>13} {'hop 1':>9} {'hop 2':>9} {'ms':>8} {'tiles ms':>9} {'exposed s':>9} "
        f"{'hidden from':>13} {'sum s':>7} {'loss s':>8} {'step s':>8}"
    )
    lines = ["the same pairs on each rank; of a hop of pass 2, its wire's and its tiles' milliseconds", head]
    for row in rows:
        hidden = f"{row['hidden_from_batch']:,}" if row["ranks"] > 1 else "-"
        lines.append(
            f"{row['ranks']:>5} {row['global_batch']:>13,} {short(row['hop_bytes'][0]):>8}B "
            f"{short(row['hop_bytes'][1]):>8}B {1e3 * row['hop_seconds'][1]:>8.2f} "
            f"{1e3 * row['tile_seconds'][1]:>9.2f} {row['exposed_seconds']:>9.3f} {hidden:>13} "
            f"{row['sum_seconds']:>7.3f} {row['loss_seconds']:>8.3f} {row['step_seconds']:>8.2f}"
        )
    return lines


def _table(rows: dict[str, str]) -> list[str]:
    width = max(map(len, rows))
    return [f"  {name:{width}} {value}" for name, value in rows.items()]


def _size(nbytes: float) -> str:
    return f"{short(nbytes):>6}B"
