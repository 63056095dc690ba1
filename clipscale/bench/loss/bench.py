"""`clipscale bench loss`: every case, written down as soon as it is measured.

status = bench_loss(options, "clipscale bench loss --peers")
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from clipscale import __version__
from clipscale.bench.common.results import finish, write
from clipscale.bench.common.stamp import package_version, result_name, stamp
from clipscale.bench.loss.case import Budget, Case, CaseRun
from clipscale.bench.loss.contestants import Contestant, own_contestants
from clipscale.bench.loss.options import LossBench
from clipscale.bench.loss.peers import peer_contestants
from clipscale.bench.loss.plots import draw
from clipscale.bench.loss.report import markdown, text_table
from clipscale.bench.loss.team import Team
from clipscale.device import is_out_of_memory
from clipscale.dist import start_world
from clipscale.errors import SharedError, UserError, require
from clipscale.loss.precision import resolve_precision
from clipscale.words import counted

_BATCHES = {"cuda": tuple(4096 * 4**i for i in range(5)), "cpu": (1024, 2048, 4096)}
_ERROR_LIMIT = {"cuda": 2**18, "cpu": 2**14}
_PILOT = {"cuda": 2**14, "cpu": 2**11}


def bench_loss(options: LossBench, command: str) -> int:
    """Measure, print and write; returns the exit status: 1 when one of clipscale's own contestants failed.

    `command` is what was typed, for the record.

    UserError for options that do not fit this machine, or a batch that does not fit into its memory; the cases before
    it are written.
    """
    with start_world(options.device) as world:
        if world.size > 1 and options.ranks > 1:
            raise SharedError(f"--ranks={options.ranks} simulates ranks in one process; under torchrun leave it out")
        team = Team(world, options.ranks)
        options = _for_device(options, team)
        contestants = own_contestants(team, engines=options.engines, tile=options.tile)
        contestants += peer_contestants(team) if options.peers else []
        document = _document(options, team, contestants, command)
        budget = Budget(options.seconds, options.limit_seconds)
        for case in _cases(options):
            if case.batch == options.batches[0]:
                _pilot(team, options, budget, case, contestants)
            measured = _measure(team, options, budget, case, contestants)
            document["cases"].append(measured)
            if world.is_main:
                print(text_table(measured) + "\n", flush=True)
                write(document, Path(options.output), markdown(document, []))
        document["finished"] = True
        if world.is_main:
            _finish(document, Path(options.output))
    own = {one.name for one in contestants if one.package == "clipscale"}
    rows = [row for case in document["cases"] for row in case["rows"] if row["contestant"] in own]
    return int(any(row["status"].startswith("failed") for row in rows))


def _for_device(options: LossBench, team: Team) -> LossBench:
    """With the device's defaults in the place of None and auto."""
    kind = team.device.type
    try:
        resolved = [resolve_precision(name, team.device, torch.float32) for name in options.precisions]
    except ValueError as error:
        raise SharedError(f"--precisions={','.join(options.precisions)}: {error}") from error
    batches = options.batches or _BATCHES[kind]
    require(
        min(batches) >= team.ranks,
        f"--batches: {counted(min(batches), 'pair')} for {counted(team.ranks, 'rank')}; give at least one a rank",
    )
    return replace(
        options,
        batches=batches,
        precisions=tuple(dict.fromkeys(resolved)),
        error_limit=_ERROR_LIMIT[kind] if options.error_limit is None else options.error_limit,
        name=options.name or result_name("loss", team.device),
    )


def _cases(options: LossBench) -> list[Case]:
    """Batches from small to large, so that each tells how long the next will take."""
    return [
        Case(batch, width, precision)
        for width in options.widths
        for precision in options.precisions
        for batch in options.batches
    ]


def _pilot(team: Team, options: LossBench, budget: Budget, case: Case, contestants: list[Contestant]) -> None:
    """Before a large first batch a small one, not reported, which tells how long the large one will take."""
    batch = max(_PILOT[team.device.type], team.ranks)
    if case.batch > 2 * batch:
        small, brief = case._replace(batch=batch), replace(budget, seconds=1e-3)
        _measure(team, replace(options, error_limit=0), brief, small, contestants)


def _measure(
    team: Team, options: LossBench, budget: Budget, case: Case, contestants: list[Contestant]
) -> dict[str, Any]:
    try:
        return CaseRun(team, options, budget, case).run(contestants)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"--batches: {case} does not fit into memory, its embeddings alone; leave it out") from error


def _document(options: LossBench, team: Team, contestants: list[Contestant], command: str) -> dict[str, Any]:
    notes = [
        f"Embeddings: seed {options.seed}, normalised, a common offset, cosine 0.72 within a pair and 0.14 without; "
        f"logit scale {options.scale:g}."
    ]
    if team.simulated > 1:
        notes.append(
            f"{team.simulated} simulated ranks on one device: time and memory are those of all ranks together; "
            "peers run as one rank."
        )
    if team.world.size > 1:
        notes.append(f"{team.world.size} ranks: time and memory are those of the rank that needs most.")
    if team.device.type == "cpu":
        notes.append(
            "On a CPU: engine torch, which is plain torch (`clipscale/loss/tiles.py`), not the Triton kernels."
        )
    return {
        "format": 1,
        "name": options.name,
        "command": command,
        "finished": False,
        "stamp": stamp(team.device),
        "arguments": asdict(options),
        "device": team.device.type,
        "ranks": {"real": team.world.size, "simulated": team.simulated},
        "notes": notes,
        "contestants": [
            {
                "name": one.name,
                "package": one.package,
                "version": __version__ if one.package == "clipscale" else package_version(one.package),
                "how": one.how,
                "loss": one.kind,
                "operations": f"{one.operations} B^2 D",
                "problem": one.problem,
            }
            for one in contestants
        ],
        "cases": [],
    }


def _finish(document: dict[str, Any], folder: Path) -> None:
    """Notes, pictures, and where everything lies."""
    print("\n".join(document["notes"]))
    for one in document["contestants"]:
        print(f"{one['name']}: {one['problem'] or one['how']}")
    finish(document, folder, draw=draw, markdown=markdown)
