"""Writing a checkpoint: aside, synced, hashed, then renamed.

save_checkpoint("runs/a", Snapshot(step=500, ...), keep=2)
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from clipscale.checkpoint.find import facts, remember_whole
from clipscale.checkpoint.retention import drop_old
from clipscale.checkpoint.room import free_bytes, why_unwritten
from clipscale.checkpoint.snapshot import AVERAGE, FILES, VERSION, Snapshot
from clipscale.config.load import dump_config
from clipscale.errors import UserError
from clipscale.files import sync_file, sync_folder, synced_file


def save_checkpoint(run_dir: str, snapshot: Snapshot, keep: int) -> Path:
    """Write one checkpoint durably, then drop those that are not to stay (retention.py). Main rank only.

    Raises:
        UserError: it cannot be written (disk full, no permission); older checkpoints stay.
    """
    from clipscale.checkpoint.staging import staged_bytes
    from clipscale.checkpoint.tree import write_tree

    folder = Path(run_dir, "checkpoints")
    target = folder / f"step-{snapshot.step:09}"
    aside = folder / f"{target.name}.tmp-{os.getpid()}"
    state = {"version": VERSION, "step": snapshot.step, "position": snapshot.position, **vars(snapshot.state)}
    try:
        for leftover in folder.glob("step-*.tmp-*"):
            shutil.rmtree(leftover)
        aside.mkdir(parents=True)
        for name, tree in snapshot.trees.items():
            write_tree(aside / f"{name}.safetensors", tree)
            sync_file(aside / f"{name}.safetensors")
        _write(aside / "state.json", lambda file: file.write(json.dumps(state, indent=1).encode()))
        _write(aside / "config.yaml", lambda file: file.write(dump_config(snapshot.config).encode()))
        manifest = {name: facts(aside / name) for name in (*FILES, AVERAGE) if (aside / name).exists()}
        _write(aside / "manifest.json", lambda file: file.write(json.dumps(manifest, indent=1).encode()))
        sync_folder(aside)
        replaced = folder / f"{target.name}.tmp-replaced"
        if target.exists():  # the same step again, after a resume from an earlier one
            target.rename(replaced)  # at once: a kill leaves no half of it under its name
        aside.rename(target)
        sync_folder(folder)
        sync_folder(folder.parent)
        shutil.rmtree(replaced, ignore_errors=True)
        remember_whole(target)
        drop_old(run_dir, snapshot.step, keep)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        why = why_unwritten(error, staged_bytes(snapshot.trees))
        free = free_bytes(run_dir) >> 20
        raise UserError(f"checkpoint {target} cannot be written ({free} MiB free): {why}") from error
    return target


def _write(path: Path, write: Callable) -> None:
    with synced_file(path, "wb") as file:
        write(file)
