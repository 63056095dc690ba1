"""clipscale/checkpoint/writer.py and staging.py: checkpoints that are written while training goes on."""

import threading
from collections.abc import Callable
from contextlib import closing
from types import SimpleNamespace

import pytest
import torch
from shards import write_pairs
from tiny import tiny_config
from torch import nn

from clipscale.checkpoint import RunState, Snapshot, load_checkpoint, newest_checkpoint, save_checkpoint
from clipscale.checkpoint import writer as writer_module
from clipscale.checkpoint.staging import Staging, staged_bytes, state_bytes
from clipscale.checkpoint.writer import CheckpointWriter
from clipscale.config import Optim
from clipscale.errors import UserError
from clipscale.optim import build_optimizer
from clipscale.telemetry.faults import recording
from clipscale.training.saver import Saver
from clipscale.training.trainer import train

CPU = torch.device("cpu")


def snapshot_of(step: int, config=None, **tensors: torch.Tensor) -> Snapshot:
    return Snapshot(step, 8 * step, tensors, {"state": {}, "param_groups": []}, RunState(skips={"a": step}), config)


class Disk:
    """A `publish` that takes as long as it is told to; `written` has the steps, and the sum of each one's weights."""

    def __init__(self) -> None:
        self.begun, self.go_on, self.problem = threading.Event(), threading.Event(), ""
        self.written: list[tuple[int, float]] = []
        self.go_on.set()

    def __call__(self, snapshot: Snapshot) -> None:
        self.begun.set()
        assert self.go_on.wait(60)
        if self.problem:
            raise UserError(f"step {snapshot.step}: {self.problem}")
        self.written.append((snapshot.step, float(snapshot.model["weight"].sum())))


@pytest.fixture
def disk() -> Disk:
    return Disk()


@pytest.fixture
def writer(disk):
    with closing(CheckpointWriter(disk)) as writer:
        model = nn.Linear(10, 10)
        writer.prepare(state_bytes(model, torch.optim.SGD(model.parameters())), CPU)
        yield writer
        disk.go_on.set()


def test_training_goes_on_while_a_checkpoint_is_written(writer, disk):
    weight = torch.ones(10)
    disk.go_on.clear()
    writer.save(snapshot_of(1, weight=weight))
    assert disk.begun.wait(60)
    weight.fill_(7)  # the next step
    assert not disk.written
    disk.go_on.set()
    writer.wait()
    assert disk.written == [(1, 10.0)]


def test_one_that_is_due_meanwhile_waits_and_is_counted(writer, disk, told, monkeypatch):
    monkeypatch.setattr(writer_module, "_LONG_WAIT_SECONDS", 0.0)
    for step in (1, 2):
        writer.save(snapshot_of(step, weight=torch.full((10,), float(step))))
        writer.wait()
    assert not told
    disk.go_on.clear()
    for step in (3, 4):
        threading.Timer(0.1, disk.go_on.set).start()
        writer.save(snapshot_of(step, weight=torch.full((10,), float(step))))
        disk.go_on.clear()
    disk.go_on.set()
    writer.wait()
    assert disk.written == [(step, 10.0 * step) for step in (1, 2, 3, 4)]
    (line,) = told
    assert line.startswith(
        "step 4: waited 0.1 s for the checkpoint before this one to be written (1 wait of 0.1 s in all)"
    )


def test_a_failure_is_raised_by_the_next_save_which_is_under_way_all_the_same(writer, disk):
    disk.problem = "no space left"
    writer.save(snapshot_of(1, weight=torch.ones(2)))
    writer.join()
    disk.problem = ""
    with pytest.raises(UserError, match="step 1: no space left"):
        writer.save(snapshot_of(2, weight=torch.ones(2)))
    writer.wait()
    assert disk.written == [(2, 2.0)]


def test_a_failure_of_the_last_is_raised_by_wait_once_and_reported_by_close(writer, disk):
    disk.problem = "no space left"
    writer.save(snapshot_of(1, weight=torch.ones(2)))
    with pytest.raises(UserError, match="step 1: no space left"):
        writer.wait()
    writer.wait()
    faults: list[dict] = []
    with recording(faults.append):
        writer.save(snapshot_of(2, weight=torch.ones(2)))
        writer.close()
    assert [(fault["kind"], fault["what"]) for fault in faults] == [("checkpoint", "step 2: no space left")]


def test_what_is_being_written_is_finished_before_the_run_leaves(disk):
    disk.go_on.clear()
    writer = CheckpointWriter(disk)
    writer._staging = Staging(1000, CPU)

    def interrupted() -> None:
        with closing(writer):
            writer.save(snapshot_of(1, weight=torch.ones(2)))
            threading.Timer(0.1, disk.go_on.set).start()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert disk.written == [(1, 2.0)]


def test_without_a_copy_the_step_waits(disk):
    with closing(CheckpointWriter(disk)) as writer:
        writer.save(snapshot_of(1, weight=torch.ones(2)))
        assert disk.written == [(1, 2.0)]
        disk.problem = "no space left"
        with pytest.raises(UserError, match="step 2: no space left"):
            writer.save(snapshot_of(2, weight=torch.ones(2)))


def test_nobody_finds_a_checkpoint_before_it_is_durable(tmp_path, monkeypatch):
    config, reached, go_on = tiny_config(tmp_path, "x.tar"), threading.Event(), threading.Event()
    sync = save_checkpoint.__globals__["sync_folder"]

    def slow_sync(folder) -> None:
        reached.set()
        assert go_on.wait(60)
        sync(folder)

    run = str(tmp_path / "run")
    with closing(CheckpointWriter(lambda snapshot: save_checkpoint(run, snapshot, keep=2))) as writer:
        writer._staging = Staging(1000, CPU)
        writer.save(snapshot_of(1, config, weight=torch.ones(2)))
        writer.wait()
        monkeypatch.setitem(save_checkpoint.__globals__, "sync_folder", slow_sync)
        writer.save(snapshot_of(2, config, weight=torch.ones(2)))
        assert reached.wait(60)
        assert newest_checkpoint(run).name == "step-000000001"
        go_on.set()
        writer.wait()
        assert load_checkpoint(newest_checkpoint(run)).step == 2


# --- the memory -------------------------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, Callable] = {
    "adamw": lambda model: build_optimizer(model, Optim(kind="adamw")),
    "sgd": lambda model: build_optimizer(model, Optim(kind="sgd")),
    "amsgrad": lambda model: torch.optim.AdamW(model.parameters(), amsgrad=True),
    "momentum": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_memory_of_the_first_save_is_known_before_the_first_step(kind, told):
    model = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Flatten(), nn.Linear(4, 4), nn.Linear(4, 4)).to(
        memory_format=torch.channels_last
    )
    optimizer = OPTIMIZERS[kind](model)
    staging = Staging(state_bytes(model, optimizer), CPU)
    assert not optimizer.state
    model(torch.rand(5, 3, 2, 2)).sum().backward()
    optimizer.step()
    snapshot = Snapshot(1, 8, model.state_dict(), optimizer.state_dict(), RunState(), None)
    assert staged_bytes([snapshot.model, snapshot.optimizer]) == staging.nbytes
    assert state_bytes(model, optimizer) == staging.nbytes  # after a resume
    taken = staging.take(snapshot)
    assert not told
    weight = taken.model["0.weight"]
    assert torch.equal(weight, model[0].weight)
    assert weight.stride() == model[0].weight.stride() == (12, 1, 6, 3)
    inside = staging._memory.untyped_storage().data_ptr()
    assert all(each.untyped_storage().data_ptr() == inside for each in taken.model.values())


def test_a_state_that_is_larger_than_foreseen_is_told_and_taken(told):
    staging = Staging(64, CPU)
    taken = staging.take(snapshot_of(1, weight=torch.arange(100.0)))
    assert torch.equal(taken.model["weight"], torch.arange(100.0))
    (line,) = told
    assert line == "the copy of the state grows from 64B to 448B: this save takes longer"


def test_ties_and_plain_values_are_those_of_the_snapshot():
    weight = torch.rand(3, 4)
    snapshot = snapshot_of(1, a=weight, b=weight, c=weight.T, rows=torch.rand(4, 3)[::2], none=torch.zeros(0, 3))
    taken = Staging(1000, CPU).take(snapshot)
    snapshot.state.skips["a"] = 5
    assert taken.state.skips == {"a": 1}
    assert all(torch.equal(taken.model[name], each) for name, each in snapshot.model.items())
    assert (
        taken.model["a"].data_ptr() == taken.model["b"].data_ptr() == taken.model["c"].data_ptr() != weight.data_ptr()
    )


def test_memory_that_is_not_there_is_refused_before_the_first_step(writer, monkeypatch):
    monkeypatch.setattr(writer_module, "host_memory", lambda: SimpleNamespace(left=300))
    model = nn.Linear(10, 10)
    with pytest.raises(UserError, match=r"needs 512B of host memory .* 300B are left; .*checkpoint\.background=false"):
        writer.prepare(state_bytes(model, torch.optim.SGD(model.parameters())), CPU)


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def urls(tmp_path_factory) -> str:
    return write_pairs(tmp_path_factory.mktemp("data"), 4, 8, size=16)


def test_a_run_writes_the_same_in_the_background_and_not(tmp_path, urls, capsys):
    found = {}
    for background in ("true", "false"):
        folder = tmp_path / background
        folder.mkdir()
        words = ("checkpoint.every_steps=1", "checkpoint.keep=9", f"checkpoint.background={background}")
        train(tiny_config(folder, urls, *words))
        places = sorted((folder / "run/checkpoints").iterdir())
        found[background] = [
            [(each / name).read_bytes() for name in ("model.safetensors", "optimizer.safetensors")] for each in places
        ]
    assert len(found["true"]) == 4
    assert found["true"] == found["false"]
    err = capsys.readouterr().err.splitlines()
    lines = [
        line for line in err if line.startswith("checkpoints are written in the background, from a copy in 19.4MB")
    ]
    assert len(lines) == 1


@pytest.mark.parametrize("failing", [2, 4])
def test_a_checkpoint_that_fails_in_the_background_ends_the_run_with_its_reason(tmp_path, urls, monkeypatch, failing):
    publish = Saver._publish

    def fail(self, snapshot: Snapshot) -> None:
        if snapshot.step == failing:
            raise UserError(f"checkpoint step-{failing} cannot be written")
        publish(self, snapshot)

    monkeypatch.setattr(Saver, "_publish", fail)
    with pytest.raises(UserError, match=f"checkpoint step-{failing} cannot be written"):
        train(tiny_config(tmp_path, urls, "checkpoint.every_steps=1"))
    last = newest_checkpoint(str(tmp_path / "run"))
    assert (
        load_checkpoint(last).step == 3
    )  # the one under way when the failure of step 2 was heard of, or the one before
