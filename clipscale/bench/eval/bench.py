"""`clipscale bench eval`: every model on the same pictures, written down as soon as it is measured.

status = bench_eval(options, "clipscale bench eval --models ViT-B-32,quickstart")
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from clipscale.bench.common.results import LAST_LINE, heading, write
from clipscale.bench.common.spread import Spread
from clipscale.bench.common.stamp import result_name, stamp
from clipscale.bench.common.tables import contestants_table, markdown_table, short
from clipscale.bench.eval.measure import HEIGHT, WIDTH, Case, Round, write_tree
from clipscale.bench.eval.options import EvalBench
from clipscale.bench.step.trainee import model_config
from clipscale.config import ZeroShot
from clipscale.dist import World, start_world
from clipscale.errors import SharedError
from clipscale.fit_tokenizer import fitting_tokenizer
from clipscale.towers import autocast_dtype, build_towers
from clipscale.upstream.open_clip_files import check_model
from clipscale.words import counted

COLUMNS = ("model", "pictures/s", "quartiles", "n", "in the tower", "of the tower alone", "decode ms", "tower ms")


def bench_eval(options: EvalBench, command: str) -> int:
    """Measure, print and write; returns the exit status. `command` is what was typed, for the record."""
    with start_world(options.device) as world, TemporaryDirectory(prefix="clipscale-bench-") as folder:
        if world.size > 1:
            raise SharedError("clipscale bench eval measures one process on one device; start it without torchrun")
        for model in options.models:
            check_model(model_config(model))  # before the first is measured
        options = replace(options, name=options.name or result_name("eval", world.device))
        document: dict[str, Any] = {
            "format": 1,
            "name": options.name,
            "command": command,
            "finished": False,
            "stamp": stamp(world.device),
            "arguments": asdict(options),
            "evals": [],
        }
        tree = write_tree(Path(folder), options.pictures)
        for model in options.models:
            document["evals"].append(_measured(model, tree, options, world))
            document["finished"] = len(document["evals"]) == len(options.models)
            files = write(document, Path(options.output), markdown(document))
        print("\n".join(contestants_table(COLUMNS, [("measured", cells(row)) for row in document["evals"]])))
        print("written: " + " ".join(map(str, files)))
    return 0


def _measured(model: str, tree: ZeroShot, options: EvalBench, world: World) -> dict[str, Any]:
    towers = build_towers(model_config(model), device=world.device, autocast=autocast_dtype("auto", world.device))
    case = Case(towers, fitting_tokenizer(towers), tree, world, batch=options.batch, threads=options.threads)
    case.round()  # untimed: memory and kernels are found
    rounds = []
    for number in range(options.rounds):
        rounds.append(case.round())
        rate = short(options.pictures / rounds[-1].loop_seconds)
        print(
            f"{model}, round {number + 1} of {options.rounds}: {rate} pictures a second, "
            f"{rounds[-1].share:.1%} of the time in the image tower, {rounds[-1].of_tower:.1%} of its rate alone",
            flush=True,
        )
    return {"model": model, **summary(rounds, options.pictures), "decode_seconds": case.decode_seconds()}


def summary(rounds: list[Round], pictures: int) -> dict[str, Any]:
    """Medians and quartiles over the rounds; ratios are made round by round."""
    return {
        "pictures_per_second": Spread.of([pictures / one.loop_seconds for one in rounds])._asdict(),
        "share_in_tower": Spread.of([one.share for one in rounds])._asdict(),
        "rate_to_tower_alone": Spread.of([one.of_tower for one in rounds])._asdict(),
        "tower_seconds_a_picture": Spread.of([one.alone_seconds / pictures for one in rounds])._asdict(),
        "rounds": [one._asdict() for one in rounds],
    }


def cells(row: dict[str, Any]) -> list[str]:
    """One row, by `COLUMNS`."""
    rate = row["pictures_per_second"]
    return [
        row["model"],
        short(rate["median"]),
        f"{short(rate['low'])}..{short(rate['high'])}",
        str(rate["repeats"]),
        f"{row['share_in_tower']['median']:.1%}",
        f"{row['rate_to_tower_alone']['median']:.1%}",
        short(1e3 * row["decode_seconds"]),
        short(1e3 * row["tower_seconds_a_picture"]["median"]),
    ]


def markdown(document: dict[str, Any]) -> str:
    """The whole of the results, with what made them."""
    settings = document["arguments"]
    what = (
        f"Zero-shot evaluation of {settings['pictures']:,} JPEGs of {WIDTH} x {HEIGHT}, {settings['batch']} at once, "
        f"{counted(settings['threads'], 'decoding thread')}."
    )
    table = markdown_table(COLUMNS, [cells(row) for row in document["evals"]])
    return "\n".join([*heading(document, "Evaluation"), what, "", *table, "", LAST_LINE, ""])
