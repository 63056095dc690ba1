"""Checkpoints that are whole or not there: written aside, synced, hashed, then renamed.

    save_checkpoint("runs/a", Snapshot(step=500, ...), keep=2)
    found = newest_checkpoint("runs/a")                # the newest that verifies, or None where there is none
    snapshot = load_checkpoint(found)

A checkpoint is a folder `checkpoints/step-000000500` with model.pt (open_clip's CustomTextCLIP state dict),
optimizer.pt, state.json (step, position and the fields of RunState), config.yaml and manifest.json
(size and SHA-256 of each).
Randomness needs no state: it is keyed by the seed and by steps and positions (step/, data/), which are here.
Tensors are loaded with `weights_only=True`: nothing is unpickled.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipscale.config import Config
from clipscale.config.load import config_from_yaml, dump_config
from clipscale.errors import UserError, reason, require
from clipscale.files import hash_file, lock_file, sync_folder, synced_file
from clipscale.tell import tell

if TYPE_CHECKING:
    import torch  # only where tensors are written or read: checkpoints are found and verified without it

VERSION = 1
_NAME = re.compile(r"step-(\d{9})")
_FILES = ("model.pt", "optimizer.pt", "state.json", "config.yaml")  # of a checkpoint, beside its manifest


@dataclass
class RunState:
    """What a run keeps beside its tensors, as JSON can hold it. The names are those of state.json.

    A new one is that of a run which has not begun.
    """

    order: dict[str, Any] | None = None  # what a position means (Pipeline.identity); None: not laid out yet
    skips: dict[str, int] = field(default_factory=dict)  # masked samples by source and cause
    scaler: dict[str, Any] = field(default_factory=dict)  # of the loss scale; empty unless in fp16
    last_row: dict[str, Any] = field(default_factory=dict)  # of metrics
    kernels: dict[str, list] = field(default_factory=dict)  # the loss kernels' tuned shapes; oldest checkpoints: none
    plan: dict[str, Any] | None = None  # the plan of its steps (step/planning.py); older checkpoints: none


@dataclass
class Snapshot:
    """A run after `step` steps, on the CPU or not."""

    step: int
    position: int  # samples consumed: where the next batch begins
    model: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    state: RunState
    config: Config


class RunFolder:
    """A run's folder, made where there is none, and held for this process until `close` (or its end, however).

    What was made here and never kept is removed at `close`: a run that is refused leaves nothing behind.

    Raises:
        UserError: it cannot be made, or another process holds it.
    """

    def __init__(self, run_dir: str) -> None:
        self._path, self._keeps = Path(run_dir), False
        above = [self._path, *self._path.parents]
        self._made = above[: next(i for i, place in enumerate(above) if os.path.exists(place))]
        self._new = [path for name in (".lock", "run.log") if not os.path.exists(path := self._path / name)]
        try:
            self._path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self._path / ".lock", "w")  # noqa: SIM115
        except OSError as error:
            raise UserError(
                f"run.dir={run_dir!r} cannot be made: {reason(error)}; choose a folder that can be written"
            ) from error
        if not self._hold():
            self._lock.close()
            raise UserError(f"run.dir={run_dir!r} is in use by another process; end it, or set another run.dir")

    def keep(self) -> None:
        """The run begins: from here on the folder stays."""
        self._keeps = True

    def close(self) -> None:
        if not self._keeps:
            with suppress(OSError):  # somebody else has put something there
                for path in self._new:
                    path.unlink(missing_ok=True)
                for folder in self._made:
                    folder.rmdir()
        self._lock.close()

    def _hold(self) -> bool:
        try:
            return lock_file(self._lock.fileno(), self._path / ".lock")
        except OSError:  # a file system without locks
            return True


def save_checkpoint(run_dir: str, snapshot: Snapshot, keep: int) -> Path:
    """Write one checkpoint durably, then drop all but the `keep` newest up to it. Main rank only.

    Those of later steps stay: they are what a resume from an earlier one passed over, and do not count.

    Raises:
        UserError: it cannot be written (disk full, no permission); older checkpoints stay.
    """
    import torch

    folder = Path(run_dir, "checkpoints")
    target = folder / f"step-{snapshot.step:09}"
    aside = folder / f"{target.name}.tmp-{os.getpid()}"
    state = {"version": VERSION, "step": snapshot.step, "position": snapshot.position, **vars(snapshot.state)}
    try:
        for leftover in folder.glob("step-*.tmp-*"):
            shutil.rmtree(leftover)
        aside.mkdir(parents=True)
        _write(aside / "model.pt", lambda file: torch.save(snapshot.model, file))
        _write(aside / "optimizer.pt", lambda file: torch.save(snapshot.optimizer, file))
        _write(aside / "state.json", lambda file: file.write(json.dumps(state, indent=1).encode()))
        _write(aside / "config.yaml", lambda file: file.write(dump_config(snapshot.config).encode()))
        manifest = {name: _facts(aside / name) for name in _FILES}
        _write(aside / "manifest.json", lambda file: file.write(json.dumps(manifest, indent=1).encode()))
        sync_folder(aside)
        if target.exists():  # the same step again, after a resume from an earlier one
            shutil.rmtree(target)
        aside.rename(target)
        sync_folder(folder)
        sync_folder(folder.parent)
        older = [path for step, path in _candidates(folder) if step <= snapshot.step]
        for old in older[keep:]:
            shutil.rmtree(old)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError, and Ctrl-C too
        free = shutil.disk_usage(run_dir).free if Path(run_dir).exists() else 0
        shutil.rmtree(aside, ignore_errors=True)
        if (interrupt := _interrupt_behind(error)) is not None:
            raise interrupt from None
        raise UserError(f"checkpoint {target} cannot be written ({free >> 20} MiB free): {error}") from error
    return target


def newest_checkpoint(run_dir: str) -> Path | None:
    """The newest checkpoint of a run that verifies; None where the run has none at all. Tells of those it passes over.

    Raises:
        UserError: there are checkpoints and none of them verifies: a run never starts over in silence.
    """
    damage = []
    for _, path in _candidates(Path(run_dir, "checkpoints")):
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
        _is_checkpoint(path) or bool(_candidates(Path(path, "checkpoints"))),
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
    places = [path for _, path in _candidates(Path(run_dir, "checkpoints"))]
    if not places and resume not in ("auto", "fresh"):
        places = [Path(resume)] if _is_checkpoint(resume) else []
        places += [path for _, path in _candidates(Path(resume, "checkpoints"))]
    for path in places:
        with suppress(OSError, ValueError):
            state = json.loads((path / "state.json").read_text())
            if isinstance(state, dict) and isinstance(state.get("position"), int):
                return state
    return {}


def unverified_checkpoint(run_dir: str) -> Path | None:
    """The newest checkpoint of a run, whole or not; None where it has none."""
    return next((path for _, path in _candidates(Path(run_dir, "checkpoints"))), None)


def verify(path: Path) -> str:
    """'' if every file has the size and hash that the manifest says, else what is wrong."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        for name in _FILES:
            if _facts(path / name) != manifest[name]:
                return f"{name} is not what was written (size or SHA-256 differs)"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def load_config_of(path: Path) -> Config:
    """The resolved configuration that the checkpoint was written under."""
    return config_from_yaml((path / "config.yaml").read_text())


def load_checkpoint(path: Path) -> Snapshot:
    """A verified checkpoint's content, tensors on the CPU. Tells of what state.json holds and this version cannot keep.

    Raises:
        UserError: written by another layout version, a state.json that lacks something, or tensors that are not plain
            tensors.
    """
    state = json.loads((path / "state.json").read_text())
    if state.pop("version") != VERSION:
        raise UserError(f"checkpoint {path} has another layout version; this clipscale reads version {VERSION}")
    return Snapshot(
        step=state.pop("step"),
        position=state.pop("position"),
        model=_load_tensors(path / "model.pt"),
        optimizer=_load_tensors(path / "optimizer.pt"),
        state=_run_state(path, state),
        config=load_config_of(path),
    )


def _run_state(path: Path, found: dict[str, Any]) -> RunState:
    names = {each.name for each in fields(RunState)}
    if missing := sorted(names - {"kernels", "plan"} - found.keys()):
        raise UserError(f"checkpoint {path}: state.json has no {', '.join(missing)}; use another checkpoint")
    if unknown := sorted(found.keys() - names):
        tell(
            f"warning: checkpoint {path}: state.json holds {', '.join(unknown)}, which this clipscale does not know; "
            "its own checkpoints will be without"
        )
    return RunState(**{name: value for name, value in found.items() if name in names})


def _load_tensors(path: Path) -> dict[str, Any]:
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise UserError(f"{path} holds more than tensors, or is no torch file; use another checkpoint") from error


def _interrupt_behind(error: BaseException | None) -> BaseException | None:
    """The KeyboardInterrupt during whose handling `error` arose, if any."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error


def _is_checkpoint(path: str) -> bool:
    return Path(path, "manifest.json").is_file()


def _candidates(folder: Path) -> list[tuple[int, Path]]:
    """(step, path), newest first."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return sorted(found, reverse=True)


def _write(path: Path, write: Callable) -> None:
    with synced_file(path, "wb") as file:
        write(file)


def _facts(path: Path) -> dict[str, Any]:
    found = hash_file(path, sha256=True)
    return {"bytes": found["bytes"], "sha256": found["sha256"]}
