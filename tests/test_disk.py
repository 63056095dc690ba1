"""Disks that are full: refused before the first step, and what a save that fails leaves, costs and says."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from shards import write_pairs
from test_growing import in_a_child
from tiny import YAML, tiny_config

from clipscale.checkpoint import RunState, Snapshot, newest_checkpoint, save_checkpoint, verify
from clipscale.checkpoint.room import require_room
from clipscale.config.load import config_from_yaml
from clipscale.dist import World
from clipscale.errors import SharedError, UserError
from clipscale.telemetry.faults import recording
from clipscale.training.saver import Saver
from clipscale.training.trainer import train

CONFIG = config_from_yaml(YAML.format(run="run", urls="x.tar"))
ALONE = World(0, 1, 0, torch.device("cpu"))


@pytest.fixture(scope="module")
def urls(tmp_path_factory) -> str:
    return write_pairs(tmp_path_factory.mktemp("data"), 4, 8, size=16)


def rows(folder: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def snapshot(step: int) -> Snapshot:
    """100,000 floats."""
    model, optimizer = {"weight": torch.full((100_000,), float(step))}, {"state": {}, "param_groups": []}
    return Snapshot(step, step * 8, model, optimizer, RunState(), CONFIG)


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


# --- before the first step --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("there", "keep", "saves", "needed"),
    [
        (0, 2, 9, 3),  # two that stay, and the one being written
        (1, 2, 9, 2),
        (2, 2, 9, 1),
        (5, 2, 9, 1),  # another keep before
        (0, 2, 1, 1),  # no more than are to come
        (0, 2, 0, 0),
    ],
)
def test_room_is_wanted_for_what_the_next_saves_add(tmp_path, monkeypatch, there, keep, saves, needed):
    for step in (*range(1, there + 1), 900):  # one that a resume from before it passes over
        (tmp_path / "checkpoints" / f"step-{step:09}").mkdir(parents=True)
    free = [needed * 1000]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free[0]))
    require_room(str(tmp_path / "runs" / "new"), 0, step=0, keep=keep, saves=saves)
    require_room(str(tmp_path), 1000, step=there, keep=keep, saves=saves)
    if needed:
        free[0] -= 1
        with pytest.raises(UserError) as error:
            require_room(str(tmp_path), 1000, step=there, keep=keep, saves=saves)
        assert f"({needed * 1000:,} bytes)" in str(error.value)
        assert f"({needed * 1000 - 1:,} bytes); make room, lower checkpoint.keep, or set" in str(error.value)
        left = tmp_path / "checkpoints" / "step-000000901.tmp-7"
        left.mkdir()
        (left / "model.safetensors").write_bytes(b"x")  # the next save clears it away
        require_room(str(tmp_path), 1000, step=there, keep=keep, saves=saves)


def test_a_run_whose_checkpoints_cannot_fit_is_refused_before_its_first_step(tmp_path, urls, monkeypatch):
    monkeypatch.setattr("clipscale.checkpoint.room.free_bytes", lambda run_dir: 30_000_000)
    with pytest.raises(UserError, match=r"2 checkpoints of .*B will come to the 0 there .*make room"):
        train(tiny_config(tmp_path, urls, "checkpoint.every_steps=2"))
    assert not (tmp_path / "run").exists()


# --- a save that fails ------------------------------------------------------------------------------------------------


def test_a_real_limit_is_told_in_words_and_leaves_no_stub(tmp_path):
    """No file of this process may grow beyond 200,000 bytes; the weights are 400,000."""
    good = save_checkpoint(str(tmp_path), snapshot(1), keep=1)

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        try:
            save_checkpoint(str(tmp_path), snapshot(2), keep=1)
        except UserError as error:
            (tmp_path / "said").write_text(str(error))

    in_a_child(work)
    said = (tmp_path / "said").read_text()
    assert f"checkpoint {tmp_path}/checkpoints/step-000000002 cannot be written (" in said
    assert " MiB free): File too large (" in said
    assert "model.safetensors); 400kB (400,000 bytes) needed" in said
    assert "\n" not in said
    assert checkpoints(tmp_path) == ["step-000000001"]
    assert verify(good) == ""


@pytest.mark.parametrize("place", ["sync_file", "synced_file", "sync_folder"])
def test_a_full_disk_says_what_is_needed_wherever_it_shows(tmp_path, monkeypatch, place):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(f"clipscale.checkpoint.save.{place}", full)
    with pytest.raises(UserError, match=r"MiB free\): No space left on device; 400kB \(400,000 bytes\) needed$"):
        save_checkpoint(str(tmp_path), snapshot(2), keep=1)
    assert checkpoints(tmp_path) == []


class FullAt:
    """save_checkpoint on a disk that is full at some steps."""

    def __init__(self, monkeypatch, *steps: int) -> None:
        self._steps, self.cause = steps, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        monkeypatch.setattr("clipscale.training.saver.save_checkpoint", self)

    def __call__(self, run_dir: str, snapshot: Snapshot, keep: int) -> Path:
        if snapshot.step in self._steps:
            what = f"checkpoint step-{snapshot.step} cannot be written (0 MiB free): No space left on device"
            raise UserError(what) from self.cause
        return save_checkpoint(run_dir, snapshot, keep)


@pytest.mark.parametrize("background", ["true", "false"])
def test_a_run_may_go_on_without_the_checkpoints_that_failed(tmp_path, urls, monkeypatch, background):
    words = ("checkpoint.every_steps=1", "checkpoint.on_error=report", f"checkpoint.background={background}")
    FullAt(monkeypatch, 2, 3)
    assert train(tiny_config(tmp_path, urls, *words))[0].startswith("trained 4 steps")
    faults = rows(tmp_path / "run", "faults.jsonl")
    assert [(fault["kind"], fault["step"], fault["lost_steps"]) for fault in faults] == [("disk", 2, 0), ("disk", 3, 0)]
    assert faults[0]["action"] == "the run goes on (checkpoint.on_error), the older ones stay"
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3, 4]
    assert checkpoints(tmp_path / "run") == ["step-000000001", "step-000000004"]


@pytest.mark.parametrize("background", ["true", "false"])
@pytest.mark.parametrize("policy", ["stop", "report"])
def test_the_last_checkpoint_of_a_run_must_be_written(tmp_path, urls, monkeypatch, policy, background):
    words = (f"checkpoint.on_error={policy}", f"checkpoint.background={background}", "checkpoint.every_steps=3")
    FullAt(monkeypatch, 4)
    with pytest.raises(
        UserError, match=r"cannot be written .*No space left|last checkpoint could not be written; make"
    ):
        train(tiny_config(tmp_path, urls, *words))
    assert "No space left on device" in rows(tmp_path / "run", "faults.jsonl")[0]["what"]
    assert newest_checkpoint(str(tmp_path / "run")).name == "step-000000003"
    monkeypatch.undo()
    assert train(tiny_config(tmp_path, urls, *words))[0].startswith("trained 1 step ")


def test_a_run_that_is_to_stop_does_not_wait_for_its_next_checkpoint(tmp_path, urls, monkeypatch):
    """It tries once more at the end of the step in which the failure shows."""
    FullAt(monkeypatch, 10)
    with pytest.raises(UserError, match="step-10 cannot be written"):
        train(tiny_config(tmp_path, urls, "train.samples=320", "checkpoint.every_steps=30"))
    tried = int(checkpoints(tmp_path / "run")[-1][5:])
    assert 10 < tried < 30
    assert rows(tmp_path / "run")[-1]["step"] == tried - 1


def test_a_saver_that_failed_is_well_again_with_the_next(tmp_path, monkeypatch):
    disk, found, config = FullAt(monkeypatch, 1), [], tiny_config(tmp_path, "shards/*.tar")
    saver = Saver(config, ALONE)
    with recording(found.append):
        with pytest.raises(SharedError, match="No space left"):
            saver.save(snapshot(1))
        assert saver.failing
        saver.save(snapshot(2))
        assert not saver.failing
        saver.finish()
        disk.cause = PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        with pytest.raises(SharedError):
            saver.save(snapshot(1))
    assert [fault["kind"] for fault in found] == ["disk", "checkpoint"]


def test_a_disk_without_room_for_the_runs_first_files_is_one_line_on_every_rank(tmp_path, urls, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("clipscale.training.trainer.write_file", full)
    with pytest.raises(SharedError, match=r"^No space left on device$"):
        train(tiny_config(tmp_path, urls))
