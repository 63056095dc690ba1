"""clipscale/checkpoint: a checkpoint is whole or not there, and a run never starts over in silence."""

import errno
import hashlib
import json
import os
import pickle
import shutil
from collections import OrderedDict
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny import tiny_config

from clipscale.checkpoint import (
    RunState,
    Snapshot,
    find_checkpoint,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
    verify,
)
from clipscale.config import Optim
from clipscale.errors import UserError
from clipscale.optim import build_optimizer
from clipscale.towers import build_towers


@pytest.fixture
def save(tmp_path):
    """save(step) writes a checkpoint of a run in tmp_path; its tensors tell the step."""

    def write(step: int, keep: int = 9) -> Path:
        snapshot = Snapshot(
            step=step,
            position=step * 8,
            model={"weight": torch.full((3,), float(step))},
            optimizer={"state": {}, "param_groups": []},
            state=RunState(order={"seed": 5}, skips={"broken picture": step}),
            config=tiny_config(tmp_path, "shards/*.tar"),
        )
        return save_checkpoint(str(tmp_path), snapshot, keep)

    return write


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.fixture
def optimized(tmp_path) -> Snapshot:
    """After two steps of AdamW."""
    config = tiny_config(tmp_path, "shards/{0..3}.tar", "optim.lr=0.1")
    towers = build_towers(config.model, seed=3)
    optimizer = build_optimizer(towers.model, Optim())
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    for _ in range(2):
        towers.image(images)[:, 0].sum().backward()
        optimizer.step()
    state = RunState(skips={"broken picture": 2}, order={"seed": 2**63 - 1, "crop": [0.1, 1 / 3]})
    model = towers.model.state_dict() | {"half": torch.tensor([1e-7, 3.0], dtype=torch.float16)}
    return Snapshot(7, 56, model, optimizer.state_dict(), state, config)


def check_equal(loaded: Snapshot, snapshot: Snapshot) -> None:
    for name in ("step", "position", "state", "config"):
        assert getattr(loaded, name) == getattr(snapshot, name)
    assert loaded.model.keys() == snapshot.model.keys()
    for name, tensor in snapshot.model.items():
        assert loaded.model[name].dtype == tensor.dtype
        assert torch.equal(loaded.model[name], tensor)
    ours, theirs = snapshot.optimizer, loaded.optimizer
    assert theirs["param_groups"] == ours["param_groups"]
    for key, slots in ours["state"].items():
        assert slots.keys() == theirs["state"][key].keys()
        assert all(torch.equal(value, theirs["state"][key][name]) for name, value in slots.items())


def test_a_round_trip_is_exact(tmp_path, optimized):
    path = save_checkpoint(str(tmp_path / "run"), optimized, keep=2)
    assert path == tmp_path / "run" / "checkpoints" / "step-000000007"
    assert newest_checkpoint(str(tmp_path / "run")) == path
    check_equal(load_checkpoint(path), optimized)


def test_the_newest_by_number_is_found_and_only_so_many_are_kept(save, tmp_path):
    for step in (9, 10, 100):
        save(step, keep=2)
    assert names(tmp_path) == ["step-000000010", "step-000000100"]
    found = newest_checkpoint(str(tmp_path))
    assert load_checkpoint(found).model["weight"][0] == 100
    assert find_checkpoint(str(tmp_path)) == found
    older = tmp_path / "checkpoints" / "step-000000010"
    os.utime(older)  # touched last: the number decides
    assert newest_checkpoint(str(tmp_path)) == found
    assert find_checkpoint(str(older)) == older


def test_a_run_without_checkpoints_has_none(tmp_path):
    assert newest_checkpoint(str(tmp_path / "nowhere")) is None
    (tmp_path / "checkpoints").mkdir()
    assert newest_checkpoint(str(tmp_path)) is None
    with pytest.raises(UserError, match="neither a checkpoint nor the folder of a run"):
        find_checkpoint(str(tmp_path))


# --- damage -----------------------------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def keep_one_file(path: Path) -> None:
    path.write_text(json.dumps({"model.safetensors": json.loads(path.read_text())["model.safetensors"]}))


@pytest.mark.parametrize(
    "file", ["model.safetensors", "optimizer.safetensors", "state.json", "config.yaml", "manifest.json"]
)
@pytest.mark.parametrize("harm", [flip_a_byte, cut, Path.unlink])
def test_damage_is_found_and_the_previous_one_is_taken_with_a_warning(save, tmp_path, told, file, harm):
    good, bad = save(1), save(2)
    harm(bad / file)
    assert newest_checkpoint(str(tmp_path)) == good
    assert len(told) == 1
    assert told[0].startswith("warning: passing over a damaged checkpoint:")
    assert str(bad) in told[0]
    with pytest.raises(UserError):
        find_checkpoint(str(bad))


@pytest.mark.parametrize("content", ["{}", "[]", "null", '{"model.pt": 3}', '{"model.safetensors": 3}'])
def test_a_manifest_that_does_not_name_every_file_is_damage(save, content):
    path = save(1)
    (path / "manifest.json").write_text(content)
    assert verify(path)


def test_if_none_verifies_the_run_does_not_start_over(save, tmp_path):
    for step in (1, 2):
        flip_a_byte(save(step) / "model.safetensors")
    with pytest.raises(UserError, match=r"no checkpoint of .* verifies .*set another run\.dir") as error:
        newest_checkpoint(str(tmp_path))
    for step in (1, 2):
        assert f"step-{step:09}: model.safetensors is not what was written" in str(error.value)


def test_a_damaged_newer_one_does_not_push_out_what_is_written_after_it(save, tmp_path):
    save(1)
    flip_a_byte(save(9) / "model.safetensors")
    written = save(2, keep=1)
    assert newest_checkpoint(str(tmp_path)) == written
    assert names(tmp_path) == ["step-000000002", "step-000000009"]
    save(9, keep=1)  # the run comes by that step again
    assert names(tmp_path) == ["step-000000009"]
    assert load_checkpoint(newest_checkpoint(str(tmp_path))).step == 9


def test_what_an_interrupted_save_left_is_ignored_and_cleared_away(save, tmp_path):
    good = save(1)
    shutil.copytree(good, tmp_path / "checkpoints" / "step-000000002.tmp-123")
    assert newest_checkpoint(str(tmp_path)) == good
    save(3)
    assert names(tmp_path) == ["step-000000001", "step-000000003"]


def test_another_layout_version_is_named(save):
    path = save(1)
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(state | {"version": 99}))
    with pytest.raises(UserError, match="another layout version; this clipscale reads versions 1 to 2"):
        load_checkpoint(path)


# --- state.json -------------------------------------------------------------------------------------------------------

STATE = """{
 "version": 2,
 "step": 3,
 "position": 24,
 "order": {
  "seed": 5
 },
 "skips": {
  "mine: broken picture": 2
 },
 "scaler": {
  "scale": 65536.0
 },
 "last_row": {
  "loss": 2.5
 },
 "kernels": {
  "gradient": [
   128,
   true
  ]
 },
 "plan": null,
 "health": {
  "nonfinite_in_a_row": 2
 }
}"""
RUN_STATE = RunState(
    order={"seed": 5},
    skips={"mine: broken picture": 2},
    scaler={"scale": 65536.0},
    last_row={"loss": 2.5},
    kernels={"gradient": [128, True]},
    health={"nonfinite_in_a_row": 2},
)


def rewrite(path: Path, **changes: object) -> Path:
    """state.json with other values; None: without that name."""
    state = json.loads((path / "state.json").read_text()) | changes
    (path / "state.json").write_text(json.dumps({key: value for key, value in state.items() if value is not None}))
    return path


def test_state_json_is_written_so_to_the_byte(tmp_path):
    snapshot = Snapshot(3, 24, {}, {}, RUN_STATE, tiny_config(tmp_path, "shards/*.tar"))
    path = save_checkpoint(str(tmp_path), snapshot, keep=1)
    assert (path / "state.json").read_text() == STATE
    (path / "state.json").write_text(STATE)
    assert load_checkpoint(path).state == RUN_STATE


def test_older_checkpoints_have_no_health_and_no_plan_and_the_oldest_no_kernels(save, told):
    state = load_checkpoint(rewrite(save(1), kernels=None, plan=None, health=None)).state
    assert (state.kernels, state.order, state.skips) == ({}, {"seed": 5}, {"broken picture": 1})
    assert (state.plan, state.health) == (None, {})
    assert not told


def test_what_a_later_version_keeps_is_not_lost_in_silence(save, told):
    assert load_checkpoint(rewrite(save(1), averages=[3], another=1)).state.skips == {"broken picture": 1}
    (line,) = told
    assert "step-000000001: state.json holds another, averages, which this clipscale does not know" in line


def test_state_that_lacks_something_is_not_taken_for_a_new_run(save):
    with pytest.raises(UserError, match=r"step-000000001: state\.json has no order, scaler; use another checkpoint"):
        load_checkpoint(rewrite(save(1), scaler=None, order=None))


# --- hostile and full -------------------------------------------------------------------------------------------------


class Payload:
    """What a hostile pickle does when it is loaded."""

    def __reduce__(self):
        return os.mkdir, ("pwned",)


def rewrite_manifest(path: Path) -> None:
    """Whoever can write files can write the manifest too."""
    files = [file for file in path.iterdir() if file.name != "manifest.json"]
    facts = {
        file.name: {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        for file in files
    }
    (path / "manifest.json").write_text(json.dumps(facts))
    assert not verify(path)


@pytest.mark.parametrize("name", ["model", "optimizer"])
@pytest.mark.parametrize("dump", [partial(pickle.dump, protocol=2), torch.save], ids=["pickle", "torch"])
@pytest.mark.parametrize("version", [1, 2])
def test_nothing_is_unpickled(save, tmp_path, monkeypatch, name, dump, version):
    monkeypatch.chdir(tmp_path)
    path = save(1)
    if version == 1:
        as_version_1(path)
    file = f"{name}.{'pt' if version == 1 else 'safetensors'}"
    with open(path / file, "wb") as out:
        dump(Payload(), out)
    rewrite_manifest(path)
    with pytest.raises(UserError, match=rf"{file} holds more than tensors"):
        load_checkpoint(path)
    assert not Path("pwned").exists()


def as_version_1(path: Path) -> None:
    """A checkpoint as it was written before: by torch.save."""
    snapshot = load_checkpoint(path)
    torch.save(OrderedDict(snapshot.model), path / "model.pt")
    torch.save(snapshot.optimizer, path / "optimizer.pt")
    for name in ("model", "optimizer"):
        (path / f"{name}.safetensors").unlink()
    rewrite(path, version=1)
    rewrite_manifest(path)


def test_a_checkpoint_of_version_1_is_read(tmp_path, optimized):
    path = save_checkpoint(str(tmp_path / "run"), optimized, keep=2)
    as_version_1(path)
    assert newest_checkpoint(str(tmp_path / "run")) == path
    check_equal(load_checkpoint(path), optimized)
    flip_a_byte(path / "optimizer.pt")
    assert verify(path).startswith("optimizer.pt is not what was written (size or SHA-256 differs): ")


def full(*_) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("target", ["os.fsync", "clipscale.checkpoint.tree.write_tree", "os.rename"])
def test_a_full_disk_is_told_in_a_line_and_leaves_the_older_ones(save, tmp_path, monkeypatch, target):
    good = save(1)
    with monkeypatch.context() as patch:
        patch.setattr(target, full)
        with pytest.raises(UserError, match=r"step-000000002 cannot be written \(\d+ MiB free\)") as error:
            save(2, keep=1)
    assert "\n" not in str(error.value)
    assert names(tmp_path) == ["step-000000001"]
    assert newest_checkpoint(str(tmp_path)) == good


def test_a_folder_that_cannot_be_made_is_told_in_a_line(save, tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(UserError, match="cannot be written"):
        save(1)


def test_ctrl_c_in_the_middle_of_a_save_is_no_failure_of_the_disk(save, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    save(1)
    with monkeypatch.context() as patch:
        patch.setattr("clipscale.checkpoint.tree.save_file", interrupted)
        with pytest.raises(KeyboardInterrupt):
            save(2)
    assert verify(newest_checkpoint(str(tmp_path))) == ""
    save(3)
    assert names(tmp_path) == ["step-000000001", "step-000000003"]
