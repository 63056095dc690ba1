"""Which checkpoint a run goes on from: the newest that verifies.

found = newest_checkpoint("runs/a")          # Path, or None where there is none at all
problem = verify(found)                      # '' if every file is what was written
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from clipscale.checkpoint.snapshot import FILES, FILES_OF_VERSION_1
from clipscale.errors import UserError, require
from clipscale.files import hash_file
from clipscale.tell import tell

_NAME = re.compile(r"step-(\d{9})")


def newest_checkpoint(run_dir: str) -> Path | None:
    """The newest checkpoint of a run that verifies; None where the run has none at all. Tells of those it passes over.

    Raises:
        UserError: there are checkpoints and none of them verifies: a run never starts over in silence.
    """
    damage = []
    for _, path in candidates(Path(run_dir, "checkpoints")):
        problem = verify(path)
        if not problem:
            for line in damage:
                tell(f"warning: passing over a damaged checkpoint: {line}")
            return path
        damage.append(f"{path}: {problem}")
    if damage:
        raise UserError(
            f"no checkpoint of {run_dir} verifies ({'; '.join(damage)}); restore one, or set another run.dir"
        )
    return None


def find_checkpoint(path: str) -> Path:
    """A checkpoint's own folder, or the newest of a run's folder, verified.

    Raises:
        UserError: neither, or damaged.
    """
    require_checkpoint(path)
    if _is_checkpoint(path):
        problem = verify(Path(path))
        if problem:
            raise UserError(f"checkpoint {path}: {problem}")
        return Path(path)
    return newest_checkpoint(path)


def require_checkpoint(path: str) -> None:
    """Raise UserError unless there is a checkpoint, or a run with one; whether it is whole is not looked at."""
    require(
        _is_checkpoint(path) or bool(candidates(Path(path, "checkpoints"))),
        f"{path!r} is neither a checkpoint nor the folder of a run with checkpoints",
    )


def refuse_fresh(resume: str, found: Path | None) -> None:
    """Raise UserError where a run is to start anew and there is a checkpoint of it."""
    require(
        resume != "fresh" or found is None,
        f"resume=fresh, but {found} exists; set another run.dir to start anew, or resume=auto to go on",
    )


def saved_state(run_dir: str, resume: str) -> dict[str, Any]:
    """What the newest checkpoint of the run that would go on here says of it (`position`, `order`, ...); empty: it
    begins anew. Whether the checkpoint is whole is not looked at."""
    places = [path for _, path in candidates(Path(run_dir, "checkpoints"))]
    if not places and resume not in ("auto", "fresh"):
        places = [Path(resume)] if _is_checkpoint(resume) else []
        places += [path for _, path in candidates(Path(resume, "checkpoints"))]
    for path in places:
        with suppress(OSError, ValueError):
            state = json.loads((path / "state.json").read_text())
            if isinstance(state, dict) and isinstance(state.get("position"), int):
                return state
    return {}


def unverified_checkpoint(run_dir: str) -> Path | None:
    """The newest checkpoint of a run, whole or not; None where it has none."""
    return next((path for _, path in candidates(Path(run_dir, "checkpoints"))), None)


def verify(path: Path) -> str:
    """'' if every file has the size and hash that the manifest says, else what is wrong."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        for name in FILES_OF_VERSION_1 if "model.pt" in manifest else FILES:
            if facts(path / name) != manifest[name]:
                return f"{name} is not what was written (size or SHA-256 differs)"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _is_checkpoint(path: str) -> bool:
    return Path(path, "manifest.json").is_file()


def candidates(folder: Path) -> list[tuple[int, Path]]:
    """(step, path), newest first."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return sorted(found, reverse=True)


def facts(path: Path) -> dict[str, Any]:
    found = hash_file(path, sha256=True)
    return {"bytes": found["bytes"], "sha256": found["sha256"]}
