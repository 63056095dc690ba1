"""Where a run begins, by `resume` and by what lies in its folder: obeyed or refused, never passed over in silence.

    start = find_start("runs/a", "auto", samples=12_800_000)   # nothing is hashed, nothing changes
    start.kind, start.places                                   # 'own', [step-000000500, step-000000450]
    found, snapshot = load_start(start, world)                 # the newest of them that is whole and good
    begin_start(start, "runs/a", step=500)                     # the run begins: later checkpoints are set aside

| resume | the run has checkpoints | it has none |
| --- | --- | --- |
| auto | goes on from the newest good one | begins at 0; refused where metrics.jsonl tells of checkpoints |
| fresh | refused | begins at 0 |
| one of run.dir's | goes back to it, once | - |
| another run's | refused, unless this run began there: then as auto | begins there |

What has been obeyed is written into `resumed.json` of the run's folder, so that the same command, given again, does not
go back a second time.
"""

from __future__ import annotations

import json
import os
import socket
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from clipscale.checkpoint.find import candidates, checkpoints_at, newest_of, report_damage, whole_of
from clipscale.checkpoint.judge import first_bad
from clipscale.checkpoint.load import load_checkpoint
from clipscale.checkpoint.retention import set_aside
from clipscale.checkpoint.snapshot import Snapshot
from clipscale.errors import UserError, require
from clipscale.files import read_rows, write_file
from clipscale.tell import tell

if TYPE_CHECKING:
    from clipscale.dist import World

RECORD = "resumed.json"


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    kind: new (at 0), own (its newest), rewind (an earlier one of its own), other (another run's).
    places: the checkpoints that may be taken, the newest first, not verified.
    source: the folder they were asked for by, as the messages name it.
    note: what to tell of the choice; '' for nothing.
    """

    kind: Literal["new", "own", "rewind", "other"]
    places: tuple[Path, ...] = ()
    source: str = ""
    note: str = ""

    @property
    def why(self) -> str:
        """Why rows of later steps than it begins after are set aside."""
        return f"went back to {self.source}" if self.kind == "rewind" else "started again"

    def newest(self, bad: dict[Path, str]) -> Path:
        """The newest of the places that verifies and is not among the `bad` (find.newest_of). UserError: none."""
        choose = newest_of if self.kind == "own" else whole_of
        return choose(self.places, self.source, bad)


def find_start(run_dir: str, resume: str, *, samples: int) -> Start:
    """Where a run of `samples` samples in run_dir begins.

    Raises:
        UserError: `resume` cannot be obeyed, or would begin at 0 what has lost its checkpoints.
    """
    places = tuple(path for _, path in candidates(Path(run_dir, "checkpoints")))
    own = Start("own", places, run_dir)
    if resume == "fresh":
        require(
            not places,
            f"resume=fresh, but {(*places, '')[0]} exists; set another run.dir to start anew, or resume=auto to go on",
        )
        return Start("new")
    where, home = os.path.realpath(resume), os.path.realpath(run_dir)
    if resume == "auto" or where == home:
        if not places:
            _refuse_lost(run_dir)
        return own if places else Start("new")
    note = _obeyed_already(run_dir, resume, where) if places else ""
    if note:
        return replace(own, note=note)
    start = _by_path(run_dir, resume, where, home, places)
    position = saved_position(start).get("position", 0)
    require(
        position < samples or start.places == places[:1],
        f"resume={resume!r} has seen {position:,} samples, and train.samples={samples:,} ends there: nothing is left; "
        "raise train.samples, which counts from that run's beginning",
    )
    return start


def _by_path(run_dir: str, resume: str, where: str, home: str, places: tuple[Path, ...]) -> Start:
    """A path that has not been obeyed yet."""
    try:
        found = checkpoints_at(resume)
    except UserError as error:
        hint = f"; set resume=auto to go on from {places[0]}" if places else ""
        raise UserError(f"resume: {error}{hint}") from error
    if Path(where).is_relative_to(Path(home, "checkpoints")):
        mine = Path(run_dir, "checkpoints", Path(where).name)
        require(
            mine in places and os.path.realpath(mine) == where,
            f"resume={resume!r} was set aside in run.dir={run_dir!r}, which went on without it; set another run.dir to "
            "start from it",
        )
        return Start("rewind", (mine,), str(mine))
    require(
        not places,
        f"resume={resume!r}, but run.dir={run_dir!r} has checkpoints of its own, up to {(*places, Path())[0].name}, "
        f"and did not begin there: set resume=auto to go on from them, or another run.dir to start from {resume}",
    )
    _refuse_lost(run_dir)
    return Start("other", tuple(found), resume)


def saved_state(run_dir: str, resume: str) -> dict[str, Any]:
    """What the newest checkpoint that a run would begin from says of it (`position`, `order`, ...); empty: it begins
    anew, or not at all. Whether the checkpoint is whole is not looked at."""
    try:
        return saved_position(find_start(run_dir, resume, samples=2**63))
    except UserError:
        return {}


def saved_position(start: Start) -> dict[str, Any]:
    """The state.json of the newest place that has one; empty: none has."""
    for path in start.places:
        with suppress(OSError, ValueError):
            state = json.loads((path / "state.json").read_text())
            if isinstance(state, dict) and isinstance(state.get("position"), int):
                return state
    return {}


def load_start(start: Start, world: World) -> tuple[Path | None, Snapshot | None]:
    """The newest checkpoint that verifies and whose tensors are finite, and what it holds; collective.

    Raises:
        UserError: there are some and none is both, or a rank's node does not see the one that is taken.
    """
    bad: dict[Path, str] = {}
    while start.places:
        found = world.lead(partial(start.newest, bad))
        snapshot = world.each(partial(_load, found))
        problem = first_bad(**snapshot.trees)
        if not problem:
            if world.is_main:
                report_damage(bad, found)
            return found, snapshot
        bad[found] = problem
    return None, None


def _load(found: Path) -> Snapshot:
    """The main rank has found it, and this one may run elsewhere."""
    require(
        found.is_dir(),
        f"{socket.gethostname()} does not see {found}; let run.dir lie on a file system that every node sees",
    )
    return load_checkpoint(found)


def begin_start(start: Start, run_dir: str, *, step: int, resume: str) -> None:
    """The run begins after `step` steps: what `resume` asked for is carried out and written down. Main rank only."""
    if start.kind == "rewind" and (aside := set_aside(run_dir, step)):
        tell(f"going back to step {step}: later checkpoints are in {aside} now, rows in metrics.superseded.jsonl")
    if start.kind in ("rewind", "other"):
        entry = {"resume": os.path.realpath(resume), "step": step, "time": time.strftime("%Y-%m-%d %H:%M:%S")}
        write_file(Path(run_dir, RECORD), json.dumps(_record(run_dir) | {start.kind: entry}, indent=1) + "\n")


def _obeyed_already(run_dir: str, resume: str, where: str) -> str:
    """What to tell where this run has gone back to, or began at, that path before; '' where it has not."""
    record = _record(run_dir)
    for kind, what in (("rewind", "this run went back there"), ("other", "this run began there")):
        if record.get(kind, {}).get("resume") == where:
            again = f"; to go back there again, remove {Path(run_dir, RECORD)}" if kind == "rewind" else ""
            return f"resume={resume}: {what} on {record[kind]['time']}, it goes on from its own checkpoints{again}"
    return ""


def _record(run_dir: str) -> dict[str, Any]:
    try:
        found = json.loads(Path(run_dir, RECORD).read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{Path(run_dir, RECORD)} is no JSON: {error}; remove it") from error
    return found if isinstance(found, dict) else {}


def _refuse_lost(run_dir: str) -> None:
    """Raise UserError where the run's rows tell of a checkpoint, and there is none.

    The last may have been on its way to the disk when the run was killed; those before it were there when it began.
    """
    rows, faults = Path(run_dir, "metrics.jsonl"), read_rows(Path(run_dir, "faults.jsonl"))
    unwritten = {fault.get("step") for fault in faults if fault.get("kind") in ("checkpoint", "disk")}
    begun = sorted({row["step"] for row in read_rows(rows) if "seconds/checkpoint" in row})
    saved = {*begun[:-1]} - unwritten
    if saved:
        raise UserError(
            f"{rows} tells of a checkpoint after step {max(saved)}, but there is none in "
            f"{Path(run_dir, 'checkpoints')}; put it back, set another run.dir, or resume=fresh to begin at step 0"
        )
