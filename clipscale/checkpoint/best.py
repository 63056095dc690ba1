"""The checkpoint with the best score so far, kept beside the newest ones: the run's folder `best`.

    if is_better("runs/a", "zeroshot/top1", 0.31, step=500):
        keep_best("runs/a", "zeroshot/top1", 0.31, step=500)    # runs/a/best: the files of step-000000500, score.json

It is a checkpoint like any other (`clipscale eval zeroshot runs/a/best`), of the same files under second names, so that
it costs room only once the run drops the first ones.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path

from clipscale.checkpoint.find import remember_whole
from clipscale.files import sync_file, sync_folder, write_file

_SCORE = "score.json"
_LOWER_IS_BETTER = ("loss",)


def is_better(run_dir: str, metric: str, value: float, *, step: int) -> bool:
    """Whether `value`, after `step` steps, beats the one that is kept.

    One of another metric, of this step or of a later one does not count: the run was told another, or has gone back.
    """
    if not math.isfinite(value):
        return False
    try:
        kept = json.loads(Path(run_dir, "best", _SCORE).read_text())
    except (OSError, ValueError):
        return True
    if kept["metric"] != metric or kept["step"] >= step:
        return True
    return value < kept["value"] if metric.rpartition("/")[2] in _LOWER_IS_BETTER else value > kept["value"]


def keep_best(run_dir: str, metric: str, value: float, *, step: int) -> None:
    """Put the checkpoint of `step`, which is whole, in the place of the one that is kept.

    A kill leaves the one or the other, or for a moment neither: the newest ones are not touched.

    Raises:
        OSError: there is no such checkpoint, or the disk does not take it.
    """
    source, target = Path(run_dir, "checkpoints", f"step-{step:09}"), Path(run_dir, "best")
    aside, old = Path(run_dir, "best.tmp"), Path(run_dir, "best.old")
    for leftover in (aside, old):
        shutil.rmtree(leftover, ignore_errors=True)
    aside.mkdir()
    for file in sorted(source.iterdir()):
        _link(file, aside / file.name)
    remember_whole(source)  # a second name changes what it looks like, and nothing else
    write_file(aside / _SCORE, json.dumps({"metric": metric, "value": value, "step": step}) + "\n")
    sync_folder(aside)
    if target.exists():
        target.rename(old)
    aside.rename(target)
    sync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _link(file: Path, name: Path) -> None:
    """A second name, or where the file system has none a copy."""
    try:
        os.link(file, name)
    except OSError:
        shutil.copyfile(file, name)
        sync_file(name)
