"""Which checkpoints stay: so many of the newest that are whole.

drop_old("runs/a", step=500, keep=2)
set_aside("runs/a", step=500)                 # those of later steps -> runs/a/checkpoints/superseded-1
"""

from __future__ import annotations

import os
import shutil
from itertools import count
from pathlib import Path

from clipscale.checkpoint.find import candidates, is_whole
from clipscale.files import sync_folder


def drop_old(run_dir: str, step: int, keep: int) -> None:
    """Remove the checkpoints behind the `keep` newest whole ones up to `step`.

    Damaged ones do not count, and stay as long as they are newer than those. Later ones stay: they are what a resume
    from an earlier one passed over. What this process wrote or verified already is not hashed again (find.py).
    """
    whole = 0
    for found, path in candidates(Path(run_dir, "checkpoints")):
        if found > step:
            continue
        if whole >= keep:
            shutil.rmtree(path)
        elif is_whole(path):
            whole += 1


def set_aside(run_dir: str, step: int) -> Path | None:
    """Move the checkpoints of steps after `step` into a new folder `superseded-<n>` beside them; None: there are none.

    Nothing takes or drops them there. A second call, after one that was cut short, moves the rest into one of its own.
    """
    folder = Path(run_dir, "checkpoints")
    later = [path for found, path in candidates(folder) if found > step]
    if not later:
        return None
    aside = next(path for n in count(1) if not os.path.lexists(path := folder / f"superseded-{n}"))
    aside.mkdir()
    for path in later:
        path.rename(aside / path.name)
    sync_folder(aside)
    sync_folder(folder)
    return aside
