"""Where a run begins: `resume` is obeyed or refused, and nothing bad gets a checkpoint's name."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from shards import write_pairs
from tiny import YAML, tiny_config

from clipscale.checkpoint import (
    RunState,
    Snapshot,
    find_start,
    first_bad,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
    saved_state,
)
from clipscale.checkpoint.start import Start, load_start
from clipscale.config.load import config_from_yaml
from clipscale.dist import World
from clipscale.errors import SharedError, UserError
from clipscale.files import hash_file, sync_folder
from clipscale.telemetry.faults import recording
from clipscale.training.saver import Saver
from clipscale.training.trainer import Trainer, train

ALONE = World(0, 1, 0, torch.device("cpu"))
CONFIG = config_from_yaml(YAML.format(run="run", urls="x.tar"))
EVERY = ("checkpoint.every_steps=1", "checkpoint.keep=9")


@pytest.fixture(scope="module")
def urls(tmp_path_factory) -> str:
    return write_pairs(tmp_path_factory.mktemp("data"), 4, 8, size=16)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, urls) -> Path:
    """The folder of a run of four steps, each with its checkpoint."""
    folder = tmp_path_factory.mktemp("trained")
    train(tiny_config(folder, urls, *EVERY))
    return folder / "run"


@pytest.fixture
def run(tmp_path, urls, trained):
    """run(words) goes on with a copy of `trained` in tmp_path/run."""
    shutil.copytree(trained, tmp_path / "run")
    return lambda *words: train(tiny_config(tmp_path, urls, *EVERY, "train.samples=48", *words))


def rows(folder: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in folder.glob("step-*"))


def checkpoint(folder: Path, step: int) -> str:
    return str(folder / "checkpoints" / f"step-{step:09}")


def save(folder: Path, step: int, keep: int = 9, model: dict | None = None, optimizer: dict | None = None) -> Path:
    """A checkpoint with next to nothing in it."""
    model = {"weight": torch.full((3,), float(step))} if model is None else model
    snapshot = Snapshot(step, step * 8, model, optimizer or {"state": {}}, RunState(), CONFIG)
    return save_checkpoint(str(folder), snapshot, keep)


def log(folder: Path) -> str:
    return (folder / "run.log").read_text()


# --- back to an earlier one -------------------------------------------------------------------------------------------


def test_a_path_of_the_runs_own_goes_back_there_once(tmp_path, run):
    folder, back = tmp_path / "run", f"resume={checkpoint(tmp_path / 'run', 2)}"
    before = rows(folder)
    run(back, "optim.lr=1e-3")
    assert f"going back to step 2: later checkpoints are in {folder}/checkpoints/superseded-1 now" in log(folder)
    assert steps(folder / "checkpoints" / "superseded-1") == [3, 4]
    assert steps(folder / "checkpoints") == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows(folder)] == [1, 2, 3, 4, 5, 6]
    assert rows(folder)[:2] == before[:2]
    marker, *moved = rows(folder, "metrics.superseded.jsonl")
    assert (marker["superseded"], marker["resumed_after_step"]) == (2, 2)
    assert moved == before[2:]
    assert [row["lr"] for row in rows(folder)[2:4]] != [row["lr"] for row in moved]

    summary = run(back, "train.samples=64")  # the same command again, as a requeued job has it
    assert summary[0].startswith("trained 2 steps")
    assert [row["step"] for row in rows(folder)] == [*range(1, 9)]
    assert "this run went back there on" in log(folder)
    assert not (folder / "checkpoints" / "superseded-2").exists()
    shutil.rmtree(checkpoint(folder, 2))  # as retention does in time
    assert run(back, "train.samples=64")[0].startswith("already complete")

    (folder / "resumed.json").unlink()  # as the line says
    with pytest.raises(UserError, match=r"neither a checkpoint nor .*; set resume=auto to go on from .*step-000000008"):
        run(back)
    run(f"resume={checkpoint(folder, 3)}", "train.samples=32")
    assert steps(folder / "checkpoints" / "superseded-2") == [4, 5, 6, 7, 8]


def test_it_is_the_same_however_the_path_is_written(tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("run")
    run("resume=link/checkpoints/step-000000003", "train.samples=32")
    assert steps(tmp_path / "run" / "checkpoints" / "superseded-1") == [4]
    start = find_start("run", "run/checkpoints/step-000000003/", samples=99)
    assert (start.kind, start.places[0].name) == ("own", "step-000000004")


def test_the_newest_by_its_path_is_going_on_and_stays_so(tmp_path, run):
    run(f"resume={checkpoint(tmp_path / 'run', 4)}")
    assert not (tmp_path / "run" / "metrics.superseded.jsonl").exists()
    assert "going back" not in log(tmp_path / "run")
    assert run(f"resume={checkpoint(tmp_path / 'run', 4)}")[0].startswith("already complete")


def test_going_back_that_was_cut_short_is_taken_up(tmp_path, run, monkeypatch):
    """Killed before it was written down: the same command does the rest."""
    folder, back = tmp_path / "run", f"resume={checkpoint(tmp_path / 'run', 1)}"
    rename = Path.rename

    def killed(path, target):
        if path.name == "step-000000002":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        run(back)
    assert steps(folder / "checkpoints") == [1, 2]
    monkeypatch.undo()
    run(back, "train.samples=24")
    assert steps(folder / "checkpoints" / "superseded-1") == [3, 4]
    assert steps(folder / "checkpoints" / "superseded-2") == [2]
    assert [row["step"] for row in rows(folder)] == [1, 2, 3]


def test_a_refused_way_back_changes_nothing(tmp_path, run, urls):
    folder = tmp_path / "run"
    (Path(checkpoint(folder, 2)) / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"step-000000002: model\.safetensors is not what was written"):
        run(f"resume={checkpoint(folder, 2)}")
    with pytest.raises(UserError, match="does not fit the model"):
        run(f"resume={checkpoint(folder, 3)}", "model.vision.width=48")
    assert steps(folder / "checkpoints") == [1, 2, 3, 4]
    assert not (folder / "resumed.json").exists()
    assert len(rows(folder)) == 4


def test_what_was_set_aside_needs_a_run_of_its_own(tmp_path, run, urls):
    folder = tmp_path / "run"
    run(f"resume={checkpoint(folder, 2)}", "train.samples=24")
    aside = f"resume={folder}/checkpoints/superseded-1/step-000000004"
    with pytest.raises(UserError, match=r"was set aside in run\.dir=.*; set another run.dir to start from it"):
        run(aside)
    run(aside, f"run.dir={tmp_path}/other")
    assert [row["step"] for row in rows(tmp_path / "other")] == [5, 6]


# --- another run's ----------------------------------------------------------------------------------------------------


def test_another_runs_path_is_a_question_where_the_run_did_not_begin_there(tmp_path, run, trained):
    with pytest.raises(UserError) as error:
        run(f"resume={trained}")
    assert "has checkpoints of its own, up to step-000000004, and did not begin there" in str(error.value)
    assert f"set resume=auto to go on from them, or another run.dir to start from {trained}" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_run_that_began_elsewhere_goes_on_from_its_own(tmp_path, urls, trained):
    shutil.copytree(trained, tmp_path / "first")
    words = (f"resume={tmp_path}/first", "train.samples=48", *EVERY)
    train(tiny_config(tmp_path, urls, *words))
    shutil.rmtree(checkpoint(tmp_path / "run", 6))
    summary = train(tiny_config(tmp_path, urls, *words))
    assert summary[0].startswith("trained 1 step ")
    assert "this run began there on" in log(tmp_path / "run")
    shutil.rmtree(tmp_path / "first")
    assert train(tiny_config(tmp_path, urls, *words))[0].startswith("already complete")
    with pytest.raises(UserError, match="has checkpoints of its own, up to step-000000006"):
        train(tiny_config(tmp_path, urls, f"resume={trained}", *words[1:]))


def test_another_runs_end_is_not_this_runs(tmp_path, urls, trained):
    with pytest.raises(UserError, match=r"resume='.*' has seen 32 samples, and train\.samples=32 ends there"):
        train(tiny_config(tmp_path, urls, f"resume={trained}"))
    assert not (tmp_path / "run").exists()


def test_going_back_to_where_nothing_is_left_to_train_is_refused(tmp_path, run):
    with pytest.raises(UserError, match=r"has seen 16 samples, and train\.samples=16 ends there"):
        run(f"resume={checkpoint(tmp_path / 'run', 2)}", "train.samples=16")
    assert run("train.samples=32")[0].startswith("already complete")


def test_a_path_that_does_not_exist_is_an_error_always(tmp_path, run, urls):
    for place in (tmp_path / "nowhere", checkpoint(tmp_path / "run", 99)):
        with pytest.raises(UserError, match=r"neither a checkpoint nor .*; set resume=auto"):
            run(f"resume={place}")
    with pytest.raises(UserError, match="neither a checkpoint nor"):
        train(tiny_config(tmp_path, urls, f"run.dir={tmp_path}/new", f"resume={tmp_path}/nowhere"))
    assert not (tmp_path / "new").exists()


def test_the_state_is_that_of_the_checkpoint_the_run_would_begin_from(tmp_path, trained):
    assert saved_state(str(trained), "auto")["position"] == 32
    assert saved_state(str(trained), checkpoint(trained, 2))["position"] == 16
    assert saved_state(str(tmp_path / "new"), str(trained))["position"] == 32
    assert saved_state(str(tmp_path / "new"), "auto") == {}
    assert saved_state(str(trained), str(tmp_path / "nowhere")) == {}


# --- checkpoints that are gone ----------------------------------------------------------------------------------------


def test_a_run_that_lost_its_checkpoints_does_not_begin_at_0(tmp_path, run, urls, trained):
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    for words in ((), (f"resume={trained}",)):
        with pytest.raises(UserError, match=r"metrics\.jsonl tells of a checkpoint after step 3, but .*; put it"):
            run(*words)
    assert len(rows(tmp_path / "run")) == 4
    run("resume=fresh", "train.samples=8")
    assert len(rows(tmp_path / "run", "metrics.superseded.jsonl")) == 5


@pytest.mark.parametrize(
    "faults", ["", '{"kind": "disk", "step": 2}\n'], ids=["in flight", "one failed, one in flight"]
)
def test_a_run_killed_before_its_first_checkpoint_begins_again(tmp_path, run, faults):
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    kept = [{key: row[key] for key in row if key != "seconds/checkpoint"} for row in rows(tmp_path / "run")]
    kept[-1] |= {"seconds/checkpoint": 0.1}
    if faults:
        kept[1] |= {"seconds/checkpoint": 0.1}
        (tmp_path / "run" / "faults.jsonl").write_text(faults)
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    assert run("train.samples=8")[0].startswith("trained 1 step ")
    assert [row["step"] for row in rows(tmp_path / "run")] == [1]


def test_a_node_that_does_not_see_the_runs_folder_is_named(tmp_path, trained):
    """On a rank of another node: the main rank has found a checkpoint, and what any rank raises is everyone's."""
    elsewhere, errors = tmp_path / "not-mounted" / "step-000000004", []

    def each(work):
        try:
            return work()
        except UserError as error:
            errors.append(str(error))
            raise

    world = SimpleNamespace(lead=lambda work: elsewhere, each=each, is_main=False)
    with pytest.raises(UserError, match=r"does not see .*step-000000004; let run\.dir lie on a file system that every"):
        load_start(Start("own", (elsewhere,), str(tmp_path)), world)
    assert len(errors) == 1


# --- good ones --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "optimizer", "wanted"),
    [
        ({"a": torch.ones(3), "b": torch.tensor([1.0, math.nan])}, {}, "weight b is not finite"),
        ({"a": torch.tensor(-math.inf, dtype=torch.float16)}, {}, "weight a is not finite"),
        ({"a": torch.full((2, 3), 3e38), "n": torch.tensor([2**62]), "empty": torch.ones(0)}, {}, ""),
        (
            {"a": torch.ones(1)},
            {"state": {0: {"step": torch.tensor(1.0)}, 7: {"exp_avg": torch.tensor([0, math.inf]), "flag": True}}},
            "exp_avg of the optimizer's parameter 7 is not finite",
        ),
    ],
)
def test_what_is_not_finite_is_named(model, optimizer, wanted):
    assert first_bad(model, optimizer) == wanted


@pytest.mark.parametrize("at", [2, 4])
@pytest.mark.parametrize("background", ["true", "false"])
def test_weights_that_are_not_finite_get_no_checkpoint(tmp_path, urls, at, background):
    trainer = Trainer(tiny_config(tmp_path, urls, *EVERY, f"checkpoint.background={background}"), ALONE)
    weight, save = trainer.towers.model.text.text_projection, trainer.saver.save

    def poisoned(snapshot: Snapshot, **more: str) -> None:
        good = weight.data[0, 0].clone()
        if snapshot.step == at:
            weight.data[0, 0] = math.nan
        save(snapshot, **more)
        weight.data[0, 0] = good

    trainer.saver.save = poisoned
    what = f"step {at}: no checkpoint is written: weight text.text_projection is not finite"
    if at == 4:
        with pytest.raises(UserError, match=f"{what}; the run has ended badly"):
            trainer.run()
    else:
        trainer.run()
    (fault,) = rows(tmp_path / "run", "faults.jsonl")
    assert (fault["kind"], fault["step"], fault["what"]) == ("checkpoint", at, what)
    trainer.close()
    assert steps(tmp_path / "run" / "checkpoints") == [step for step in (1, 2, 3, 4) if step != at]


def test_who_knows_more_can_refuse_a_checkpoint(tmp_path):
    config, found = tiny_config(tmp_path, "shards/*.tar"), []
    saver = Saver(config, ALONE)
    with recording(found.append):
        saver.save(Snapshot(3, 24, {}, {}, RunState(), config), problem="the loss has collapsed")
        with pytest.raises(SharedError, match="the loss has collapsed; the run has ended badly"):
            saver.finish()
        assert saver.finish(leaving=True) == "step 3: no checkpoint is written: the loss has collapsed"
        saver.save(Snapshot(4, 32, {}, {}, RunState(), config))
        assert saver.finish() == saver.finish(leaving=True) == ""
    assert [fault["what"] for fault in found] == ["step 3: no checkpoint is written: the loss has collapsed"]
    assert steps(tmp_path / "run" / "checkpoints") == [4]


def test_auto_takes_the_newest_good_one(tmp_path, run, urls, trained):
    """An earlier version has published weights that are not finite; its hashes are right."""
    for step in (4, 3):
        snapshot = load_checkpoint(Path(checkpoint(tmp_path / "run", step)))
        snapshot.model = {name: tensor.clone() for name, tensor in snapshot.model.items()}  # they lie in the file
        snapshot.model["logit_scale"].fill_(math.nan)
        save_checkpoint(str(tmp_path / "run"), snapshot, 9)
    with pytest.raises(UserError, match="step-000000003: weight logit_scale is not finite"):
        run(f"resume={checkpoint(tmp_path / 'run', 3)}")
    Path(checkpoint(tmp_path / "run", 2), "model.safetensors").unlink()
    run("train.samples=32")
    whole = log(tmp_path / "run")
    for step in (4, 3):
        where = checkpoint(tmp_path / "run", step)
        assert whole.count(f"passing over a damaged checkpoint: {where}: weight logit_scale is not finite") == 1
    assert whole.count("step-000000002: FileNotFoundError") == 1
    faults = [fault for fault in rows(tmp_path / "run", "faults.jsonl") if fault["kind"] == "damage"]
    assert [fault["lost_steps"] for fault in faults] == [1, 1, 1]
    again = [row["loss"] for row in rows(tmp_path / "run")]
    assert again == [row["loss"] for row in rows(trained)]


class Killed(BaseException):
    """As SIGKILL leaves the disk: nothing is cleared away."""


def test_a_step_that_is_saved_again_never_mixes_with_the_one_before(tmp_path, monkeypatch):
    """Killed at each of the calls that change names: the newest is whole, of the one save or of the other."""
    monkeypatch.setattr("os.fsync", lambda file: None)
    for kill_at in range(9):
        folder = tmp_path / str(kill_at)
        folder.mkdir()
        save(folder, 1)
        save(folder, 2)
        calls = [0]

        def deadly(real, calls=calls, kill_at=kill_at):
            def call(*words, **more):
                calls[0] += 1
                if calls[0] > kill_at:
                    raise Killed
                return real(*words, **more)

            return call

        with monkeypatch.context() as patch, suppress(Killed):
            patch.setattr(Path, "rename", deadly(Path.rename))
            patch.setattr("clipscale.checkpoint.save.shutil.rmtree", deadly(shutil.rmtree))
            patch.setattr("clipscale.checkpoint.save.sync_folder", deadly(sync_folder))
            save(folder, 2, model={"weight": torch.full((3,), 20.0)})
        found = newest_checkpoint(str(folder))
        weight = load_checkpoint(found).model["weight"]
        assert weight.tolist() in ([1.0] * 3, [2.0] * 3, [20.0] * 3)
        assert (weight[0] == 1) == (found.name == "step-000000001")
        save(folder, 2, model={"weight": torch.full((3,), 200.0)})
        assert load_checkpoint(newest_checkpoint(str(folder))).model["weight"][0] == 200
        assert len([*(folder / "checkpoints").iterdir()]) == 2
    assert calls[0] < kill_at  # the last one was not killed


def test_a_flipped_bit_is_told_with_the_file_and_both_hashes(tmp_path, told):
    good, bad = save(tmp_path, 1), save(tmp_path, 2) / "model.safetensors"
    wanted = hash_file(bad, sha256=True)["sha256"]
    data = bytearray(bad.read_bytes())
    data[-1] ^= 1
    bad.write_bytes(data)
    assert newest_checkpoint(str(tmp_path)) == good
    (line,) = told
    assert line.startswith(
        f"warning: passing over a damaged checkpoint: {bad.parent}: model.safetensors is not what was"
    )
    assert f"{len(data)} bytes, {hashlib.sha256(data).hexdigest()}, not {len(data)} bytes, {wanted}" in line


# --- how many stay ----------------------------------------------------------------------------------------------------


def test_only_whole_ones_count_among_those_that_stay(tmp_path, monkeypatch):
    hashed = []
    real = __import__("clipscale.checkpoint.find", fromlist=["verify"]).verify
    monkeypatch.setattr("clipscale.checkpoint.find.verify", lambda path: (hashed.append(path.name), real(path))[1])
    for step in (1, 2, 3):
        save(tmp_path, step, keep=3)
    assert hashed == []  # this process wrote them
    damaged = tmp_path / "checkpoints" / "step-000000003" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    save(tmp_path, 4, keep=2)
    assert hashed == ["step-000000003"]  # it does not look as it was written
    assert steps(tmp_path / "checkpoints") == [2, 3, 4]
    save(tmp_path, 5, keep=2)
    assert steps(tmp_path / "checkpoints") == [4, 5]
    monkeypatch.setattr("clipscale.checkpoint.find._WHOLE", {})  # a new process
    hashed.clear()
    save(tmp_path, 6, keep=2)
    save(tmp_path, 7, keep=3)
    assert hashed == ["step-000000005"]  # and that once
    assert steps(tmp_path / "checkpoints") == [5, 6, 7]
