"""Which checkpoint is taken: the newest that verifies.

found = newest_checkpoint("runs/a")          # Path, or None where there is none at all
problem = verify(found)                      # '' if every file is what was written
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clipscale.checkpoint.snapshot import AVERAGE, FILES, FILES_OF_VERSION_1
from clipscale.errors import UserError, require
from clipscale.files import hash_file
from clipscale.telemetry.faults import report_fault

_NAME = re.compile(r"step-(\d{9})")
_WHOLE: dict[Path, tuple] = {}
"""What this process wrote or verified, with what `_looks` saw then."""


def newest_checkpoint(run_dir: str) -> Path | None:
    """The newest checkpoint of a run that verifies; None where the run has none at all. Tells of those it passes over.

    Raises:
        UserError: there are checkpoints and none of them verifies: a run never starts over in silence.
    """
    places, bad = [path for _, path in candidates(Path(run_dir, "checkpoints"))], {}
    found = newest_of(places, run_dir, bad) if places else None
    report_damage(bad, found)
    return found


def newest_of(places: Sequence[Path], run_dir: str, bad: dict[Path, str]) -> Path:
    """The first of the checkpoints `places` of a run that verifies and is not among the `bad`.

    Args:
        bad: those that must not be taken, and what is wrong with them; what is found out here is added.

    Raises:
        UserError: none does.
    """
    for path in places:
        if problem := bad.get(path) or verify(path):
            bad[path] = problem
        else:
            return path
    why = "; ".join(f"{path}: {bad[path]}" for path in places)
    raise UserError(f"no checkpoint of {run_dir} verifies ({why}); restore one, or set another run.dir")


def report_damage(bad: dict[Path, str], taken: Path | None) -> None:
    """Report the checkpoints that were passed over for `taken`."""
    for path, better in zip(bad, [*bad, taken][1:], strict=True):
        report_fault(
            "damage",
            f"passing over a damaged checkpoint: {path}: {bad[path]}",
            action="the one before it counts",
            lost_steps=_step_of(path) - _step_of(better),
        )


def find_checkpoint(path: str) -> Path:
    """A checkpoint's own folder, or the newest of a run's folder, verified.

    Raises:
        UserError: neither, or damaged.
    """
    bad: dict[Path, str] = {}
    found = whole_of(checkpoints_at(path), path, bad)
    report_damage(bad, found)
    return found


def checkpoints_at(path: str) -> list[Path]:
    """The checkpoint that lies at `path`, or those of the run whose folder it is, the newest first; not verified.

    Raises:
        UserError: there is none.
    """
    places = [Path(path)] if Path(path, "manifest.json").is_file() else []
    places = places or [found for _, found in candidates(Path(path, "checkpoints"))]
    require(bool(places), f"{path!r} is neither a checkpoint nor the folder of a run with checkpoints")
    return places


def whole_of(places: Sequence[Path], path: str, bad: dict[Path, str]) -> Path:
    """Of `checkpoints_at(path)` the one to take: the newest of a run (as `newest_of`), or the one that was asked for.

    Raises:
        UserError: damaged, or in `bad`.
    """
    if list(places) != [Path(path)]:
        return newest_of(places, path, bad)
    problem = bad.get(places[0]) or verify(places[0])
    require(not problem, f"checkpoint {path}: {problem}")
    return places[0]


def verify(path: Path) -> str:
    """'' if every file has the size and hash that the manifest says, else what is wrong."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        wanted = FILES_OF_VERSION_1 if "model.pt" in manifest else FILES
        for name in (*wanted, AVERAGE) if AVERAGE in manifest else wanted:
            found, written = facts(path / name), manifest[name]
            if found != written:
                return (
                    f"{name} is not what was written (size or SHA-256 differs): {found['bytes']} bytes, "
                    f"{found['sha256']}, not {written['bytes']} bytes, {written['sha256']}"
                )
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    remember_whole(path)
    return ""


def is_whole(path: Path) -> bool:
    """Whether it verifies; one that this process wrote or verified before, and that looks the same, is not read."""
    return _WHOLE.get(path.absolute()) == _looks(path) or not verify(path)


def remember_whole(path: Path) -> None:
    """This process has just written or verified it."""
    _WHOLE[path.absolute()] = _looks(path)


def _looks(path: Path) -> tuple:
    """Size and times of each file: what a change of it would not leave as it was."""
    try:
        found = [(file.name, file.stat()) for file in sorted(path.iterdir())]
    except OSError as error:
        return (str(error),)
    return tuple((name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino) for name, stat in found)


def _step_of(path: Path) -> int:
    return int(_NAME.fullmatch(path.name)[1])


def candidates(folder: Path) -> list[tuple[int, Path]]:
    """(step, path), newest first."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return sorted(found, reverse=True)


def facts(path: Path) -> dict[str, Any]:
    found = hash_file(path, sha256=True)
    return {"bytes": found["bytes"], "sha256": found["sha256"]}
