"""clipscale/checkpoint/mirror.py: checkpoints go to remote storage, here fsspec's memory, and come back from there."""

import json
import shutil
import threading
from contextlib import closing
from itertools import count
from pathlib import Path

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from tiny import tiny_config
from torch import nn

from clipscale.checkpoint import RunState, Snapshot, find_checkpoint, save_checkpoint
from clipscale.checkpoint import mirror as mirror_module
from clipscale.checkpoint.mirror import Mirror, fetch_from_mirror, upload
from clipscale.checkpoint.staging import state_bytes
from clipscale.dist import World
from clipscale.errors import UserError
from clipscale.telemetry.faults import recording
from clipscale.training.saver import Saver

FOLDERS = count()


@pytest.fixture
def url() -> str:
    return f"memory://bucket-{next(FOLDERS)}/runs/a"


@pytest.fixture
def save(tmp_path):
    """save(step): a checkpoint of a run in tmp_path/run."""

    def write(step: int) -> Path:
        tensors, optimizer = {"weight": torch.full((3,), float(step))}, {"state": {}, "param_groups": []}
        config = tiny_config(tmp_path, "shards/*.tar")
        return save_checkpoint(
            str(tmp_path / "run"), Snapshot(step, 8, tensors, optimizer, RunState(), config), keep=99
        )

    return write


def remote(url: str) -> dict[str, bytes]:
    """By place below the URL."""
    files, root = fsspec.core.url_to_fs(url)
    return {path.removeprefix(f"{root}/"): files.cat_file(path) for path in files.find(root)}


def local(path: Path) -> dict[str, bytes]:
    return {f"{path.name}/{file.name}": file.read_bytes() for file in path.iterdir()}


@pytest.fixture
def faults():
    rows: list[dict] = []
    with recording(rows.append):
        yield rows


def test_what_is_fetched_is_what_was_published(save, url, tmp_path):
    path = save(7)
    upload(url, path, keep=2)
    assert remote(url) == local(path)
    note = fetch_from_mirror(url, str(tmp_path / "other"), "auto")
    assert note == f"{tmp_path}/other has no checkpoint: step-000000007 was fetched from {url}"
    found = find_checkpoint(str(tmp_path / "other"))
    assert local(found) == local(path)
    assert [each.name for each in found.parent.iterdir()] == ["step-000000007"]


def test_as_many_stay_as_in_the_folder_and_none_of_later_steps(save, url):
    later = save(9)
    upload(url, later, keep=2)
    steps = [save(step) for step in (1, 2, 3)]
    for path in steps:
        upload(url, path, keep=2)
    assert remote(url) == local(steps[1]) | local(steps[2])
    files, root = fsspec.core.url_to_fs(url)
    files.rm_file(f"{root}/step-000000002/manifest.json")  # whole no more: it does not count, and goes
    upload(url, save(4), keep=2)
    assert {name.split("/")[0] for name in remote(url)} == {"step-000000003", "step-000000004"}


def test_what_is_there_already_is_not_copied_again(save, url, monkeypatch):
    path = save(1)
    upload(url, path, keep=1)
    monkeypatch.setattr(mirror_module, "_pass_on", None)
    upload(url, path, keep=1)


def cut_short(url: str, name: str) -> None:
    files, root = fsspec.core.url_to_fs(url)
    files.pipe_file(f"{root}/{name}", files.cat_file(f"{root}/{name}")[:-1])


def test_what_was_cut_short_is_not_found_and_is_replaced(save, url, tmp_path):
    old, new = save(1), save(2)
    upload(url, old, keep=2)
    upload(url, new, keep=2)
    files, root = fsspec.core.url_to_fs(url)
    files.rm_file(f"{root}/step-000000002/manifest.json")
    cut_short(url, "step-000000002/model.safetensors")
    assert "step-000000001 was fetched" in fetch_from_mirror(url, str(tmp_path / "other"), "auto")
    upload(url, new, keep=2)
    assert remote(url) == local(old) | local(new)


def test_damage_in_the_mirror_is_passed_over_and_never_a_new_beginning(save, url, tmp_path, faults):
    for step in (1, 2):
        upload(url, save(step), keep=2)
    cut_short(url, "step-000000002/optimizer.safetensors")
    assert "step-000000001 was fetched" in fetch_from_mirror(url, str(tmp_path / "other"), "auto")
    (fault,) = faults
    assert fault["kind"] == "damage"
    assert "step-000000002: optimizer.safetensors is not what was written" in fault["what"]
    cut_short(url, "step-000000001/config.yaml")
    with pytest.raises(UserError, match=r"no checkpoint of checkpoint.mirror=memory://.* verifies \(.*config\.yaml"):
        fetch_from_mirror(url, str(tmp_path / "third"), "auto")
    assert not [*tmp_path.glob("third/checkpoints/*")]


def test_a_manifest_that_leaves_the_folder_is_damage(save, url, tmp_path):
    upload(url, save(1), keep=1)
    files, root = fsspec.core.url_to_fs(url)
    files.pipe_file(f"{root}/step-000000001/manifest.json", json.dumps({"../../x": {}}).encode())
    with pytest.raises(UserError, match=r"names '\.\./\.\./x'"):
        fetch_from_mirror(url, str(tmp_path / "other"), "auto")


def test_a_run_that_has_checkpoints_or_a_mirror_that_has_none_fetches_nothing(save, url, tmp_path):
    assert fetch_from_mirror(None, str(tmp_path / "run"), "auto") == ""
    assert fetch_from_mirror(url, str(tmp_path / "run"), "fresh") == ""
    upload(url, save(1), keep=1)
    assert fetch_from_mirror(url, str(tmp_path / "run"), "auto") == ""
    for resume in ("fresh", "runs/b"):
        with pytest.raises(UserError, match=rf"resume={resume}, but checkpoint.mirror=.* holds step-000000001"):
            fetch_from_mirror(url, str(tmp_path / "other"), resume)


def broken(*_, **__):
    raise ConnectionError("no route to https://me:word@host")


def test_a_mirror_that_cannot_be_read_is_no_empty_one(url, tmp_path, monkeypatch):
    monkeypatch.setattr(MemoryFileSystem, "ls", broken)
    with pytest.raises(UserError, match=r"cannot be read \(no route to https://\*\*\*@host\).*checkpoint\.mirror=null"):
        fetch_from_mirror(url, str(tmp_path / "run"), "auto")
    with pytest.raises(UserError, match=r"checkpoint\.mirror=nosuch://a cannot be read"):
        fetch_from_mirror("nosuch://a", str(tmp_path / "run"), "auto")


# --- the thread -------------------------------------------------------------------------------------------------------


class Line:
    """Stands before `upload`: holds it up, or breaks it, as often as told. `begun` has the steps in order."""

    def __init__(self, monkeypatch) -> None:
        self.begun: list[str] = []
        self.open, self.entered, self.failures = threading.Event(), threading.Event(), 0
        self.open.set()

        def slow_upload(url, path, keep, stopped) -> None:
            self.begun.append(path.name)
            self.entered.set()
            assert self.open.wait(60)
            if self.failures:
                self.failures -= 1
                broken()
            upload(url, path, keep, stopped)

        monkeypatch.setattr(mirror_module, "upload", slow_upload)


@pytest.fixture
def line(monkeypatch) -> Line:
    return Line(monkeypatch)


@pytest.fixture
def mirror(url, tmp_path, line):
    with closing(Mirror(url, str(tmp_path / "run"), keep=9, tries=3, pause_seconds=0.001)) as mirror:
        yield mirror
        line.open.set()


def test_nobody_waits_the_newest_wins_and_what_is_dropped_meanwhile_is_copied(mirror, line, save, url, tmp_path):
    line.open.clear()
    paths = [save(step) for step in (1, 2, 3)]
    wanted = [local(path) for path in paths]
    mirror.offer(paths[0])
    assert line.entered.wait(60)
    for path in paths[1:]:
        mirror.offer(path)
    for path in paths:
        shutil.rmtree(path)
    assert remote(url) == {}
    line.open.set()
    mirror.wait()
    assert remote(url) == wanted[0] | wanted[2]
    assert line.begun == ["step-000000001", "step-000000003"]
    assert [*Path(tmp_path, "run/checkpoints").iterdir()] == []


def test_what_fails_is_tried_again_and_given_up_with_a_fault(mirror, line, save, url, faults):
    path = save(1)
    line.failures = 2
    mirror.offer(path)
    mirror.wait()
    assert remote(url) == local(path)
    assert not faults
    line.failures = 3
    mirror.offer(save(2))
    mirror.wait()
    (fault,) = faults
    assert fault["kind"] == "checkpoint"
    assert fault["what"].startswith(f"step-000000002 was not copied to {url}: no route to https://***@host")
    mirror.offer(save(3))
    mirror.wait()
    assert len(remote(url)) == 10


def test_what_arrives_as_something_else_is_sent_again(mirror, save, url, monkeypatch):
    passes, real = count(), mirror_module._pass_on

    def leaky(source, take, stopped=lambda: False) -> None:
        real(source, (lambda block: take(block[:-1])) if next(passes) == 0 else take, stopped)

    monkeypatch.setattr(mirror_module, "_pass_on", leaky)
    path = save(1)
    mirror.offer(path)
    mirror.wait()
    assert remote(url) == local(path)


def test_a_run_that_ends_leaves_a_copy_that_is_not_found(line, save, url, tmp_path, monkeypatch, faults):
    mirror = Mirror(url, str(tmp_path / "run"), keep=9)
    real = mirror_module._pass_on

    def stopped_after_a_file(source, take, stopped) -> None:
        real(source, take, stopped)
        mirror._stop.set()

    monkeypatch.setattr(mirror_module, "_pass_on", stopped_after_a_file)
    mirror.offer(save(1))
    mirror.wait()
    mirror.close()
    assert [*remote(url)] == ["step-000000001/model.safetensors"]
    assert not faults
    assert fetch_from_mirror(url, str(tmp_path / "other"), "auto") == ""


def test_a_run_that_is_told_to_leave_does_not_wait_for_its_mirror(line, url, tmp_path):
    model = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(model.parameters())
    config = tiny_config(tmp_path, "x.tar", f"checkpoint.mirror={url}")
    with closing(Saver(config, World(0, 1, 0, torch.device("cpu")))) as saver:
        saver.prepare(state_bytes(model, optimizer), None, step=0, saves=1)
        line.open.clear()
        saver.save(Snapshot(1, 8, model.state_dict(), optimizer.state_dict(), RunState(), config))
        saver.finish(leaving=True)
        assert line.entered.wait(60)
        assert remote(url) == {}
        line.open.set()
        saver.finish()
        assert remote(url) == local(find_checkpoint(config.run.dir))


def test_what_a_killed_run_held_is_cleared_away(save, url, tmp_path):
    held = mirror_module._hold(save(1))
    assert held.is_dir()
    Mirror(url, str(tmp_path / "run"), keep=1)
    assert not held.parent.exists()
