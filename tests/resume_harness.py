"""Trainings in forked children that are SIGKILLed mid-step and resumed; run by test_resume.py as a process of its own.

    python resume_harness.py FOLDER 20 1 2 5    # a run of 20 steps, killed at these; prints one JSON object: what each
                                                # experiment found
    python resume_harness.py FOLDER 20 staged@4 # in the save of step 4, once it is staged and training has gone on
    python resume_harness.py FOLDER 20 3,7 9 --kills-only # one killed at 3, again at 7; another at 9; no more than that

Forking after the imports makes a training cost a second instead of eight; it is safe because this process never
computes anything itself.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import shutil
import signal
import socket
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from loading import keys_of
from shards import write_pairs

from clipscale.checkpoint.tree import read_tree
from clipscale.config.load import load_config
from clipscale.data.tokenize import build_tokenizer
from clipscale.training import trainer as trainer_module
from clipscale.training.learner import Learner
from clipscale.training.saver import Saver
from clipscale.training.trainer import Trainer, train

trainer_module._STEPS_OF_A_PICTURE = 1000  # drawing one takes a third of a training's time
KILLS_ONLY = "--kills-only"
LIMIT_BYTES = 1_000_000  # of a file
RUNNING: set[Trainer] = set()  # of this process
OF_THE_FOLDER = ("losses", "grad_norms", "steps", "skipped")  # what is lost with a run's folder
BATCH, EPOCHS, SHARDS = 8, 4, 5
CONFIG = """
run: {{dir: {run}, log_every_steps: 1}}
seed: 5
model:
  embed_dim: 16
  vision: {{image_size: 16, patch_size: 4, width: 32, layers: 1, head_width: 16, patch_dropout: {dropout}}}
  text: {{context_length: 12, width: 8, heads: 2, layers: 1}}
data: {{sources: {{s: {{urls: "{urls}"}}}}, threads: 3, loader: inline, max_bad_fraction: 0.5}}
train: {{global_batch: 8, samples: {samples}}}
optim: {{lr: 1.0e-2, warmup_steps: 3, kind: {kind}}}
ema: {{half_life_samples: 40}}
gradcache: {{image_chunk: 3, text_chunk: 5, keep_bytes: 240_000}}  # of the three chunks of pictures two are kept
checkpoint: {{every_steps: 2, mirror: {mirror}, on_error: {on_error}, background: {background}}}
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_save(moment: str, at: int) -> None:
    """The save of step `at` is to be the end of this process, once the step behind it has been trained."""
    publish, rename = Saver._publish, Path.rename

    def deadly_publish(self, snapshot):
        def deadly_rename(path, target):
            if moment == "written":
                die()
            rename(path, target)
            die()

        if snapshot.step == at:
            (trainer,) = RUNNING
            while trainer.steps_done == at < trainer.last_step:
                time.sleep(0.001)
            if moment == "staged":
                die()
            Path.rename = deadly_rename
        publish(self, snapshot)

    Saver._publish = deadly_publish


def train_rank(
    config_path: Path, rank: int, world: int, port: int, kill_at: int | str | None, full: tuple[int, int]
) -> None:
    """One rank's training; at step `kill_at`, with the gradients computed and not yet applied, it kills itself.

    kill_at: "staged@4": in the save of step 4 instead.
    full: from the one to the other step no file of rank 0 may grow beyond a size that no checkpoint fits.
    """
    if world > 1:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
        os.environ.update(address | {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)})
    step, update = Trainer.step, Learner.update
    seen = open(config_path.with_name(f"seen-{rank}.jsonl"), "a")  # noqa: SIM115

    def recorded_step(self, batch):
        RUNNING.add(self)
        if rank == 0 and self.steps_done + 1 in full:
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            limit = LIMIT_BYTES if self.steps_done + 1 == full[0] else hard
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        keys = keys_of(self.feed.pipeline, batch.positions)
        row = {
            "step": self.steps_done + 1,
            "slots": [list(pair) for pair in zip(batch.positions.tolist(), keys, strict=True)],
        }
        seen.write(json.dumps(row) + "\n")
        seen.flush()
        return step(self, batch)

    def deadly_update(self, *, step):
        if step == kill_at:
            while self.config.checkpoint.mirror and not any(config_path.parent.glob("mirror/*/manifest.json")):
                time.sleep(0.01)
            die()
        return update(self, step=step)

    if isinstance(kill_at, str):
        moment, at = kill_at.split("@")
        die_in_save(moment, int(at))
    Trainer.step, Learner.update = recorded_step, deadly_update
    train(load_config([str(config_path)]))


def run(
    config_path: Path, world: int = 1, kill_at: int | str | None = None, full: tuple[int, int] = (0, 0), code: int = 0
) -> None:
    """Fork the ranks and wait; SIGKILL is what must end them if `kill_at` is set, else they leave with `code`."""
    port, children = free_port(), []
    assert len(os.listdir("/proc/self/task")) == 1, "a fork of several threads may hang"
    for rank in range(world):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.dup2(os.open(config_path.with_name("log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
                train_rank(config_path, rank, world, port, kill_at, full)
                code = 0
            except BaseException as error:
                print(f"rank {rank}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            finally:
                os._exit(code)
        children.append(child)
    wanted = code if kill_at is None else -signal.SIGKILL
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes == [wanted] * world, (codes, config_path.with_name("log").read_text())


def outcome(config_path: Path) -> dict:
    """Everything that must not depend on interruptions."""
    folder = config_path.parent / "run"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    checkpoint = folder / "checkpoints" / f"step-{rows[-1]['step']:09}"
    # Mapped: a copy would start torch's threads, and this process forks.
    tensors = read_tree(checkpoint / "model.safetensors", mapped=True)
    optimizer = read_tree(checkpoint / "optimizer.safetensors", mapped=True)
    averages = read_tree(checkpoint / "ema.safetensors", mapped=True)
    slots: dict[int, dict[int, str]] = {}  # step -> position -> key
    consistent = True
    for path in config_path.parent.glob("seen-*.jsonl"):
        for row in map(json.loads, path.read_text().splitlines()):
            for position, key in row["slots"]:
                known = slots.setdefault(row["step"], {}).setdefault(position, key)
                consistent &= known == key  # a step done again sees the same samples
    return {
        "tensors": tensors,
        "optimizer": optimizer["state"],
        "averages": averages,
        "losses": [row["loss"] for row in rows],
        "grad_norms": [row["grad_norm"] for row in rows],
        "steps": [row["step"] for row in rows],
        "masked": rows[-1]["masked_samples"],
        "skipped": (folder / "skipped.jsonl").read_text(),
        "checkpoints": sorted(path.name for path in checkpoint.parent.iterdir())[-2:],
        "slots": slots,
        "consistent": consistent,
    }


def bitwise_equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(bitwise_equal(a[key], b[key]) for key in a)
    return a == b


class Data(NamedTuple):
    urls: str
    steps: int


def setup(folder: Path, data: Data, **changes) -> Path:
    folder.mkdir()
    settings = {
        "dropout": 0.3,
        "kind": "adamw",
        "on_error": "stop",
        "background": "true",
        "run": folder / "run",
        "urls": data.urls,
        "samples": BATCH * data.steps,
        "mirror": "null",
    } | changes
    path = folder / "config.yaml"
    path.write_text(CONFIG.format(**settings))
    return path


def full_disk(folder: Path, data: Data, wanted: dict, settings: dict) -> dict:
    """Two ranks, of which the first cannot write the checkpoints of steps 4 and 6: told and gone on, or stopped."""
    found = {}
    for policy, code in (("report", 0), ("stop", 1)):
        config = setup(folder / f"full-{policy}", data, on_error=policy, background="false", **settings)
        run(config, world=2, full=(3, 8), code=code)
        log = config.with_name("log").read_text()
        faults = [json.loads(line) for line in (config.parent / "run" / "faults.jsonl").read_text().splitlines()]
        stubs = [*(config.parent / "run" / "checkpoints").glob("*.tmp-*")]
        if code:
            run(config, world=2)
        after = outcome(config)
        found[policy] = {
            "disk_faults": [fault["step"] for fault in faults if fault["kind"] == "disk"],
            "what": faults[0]["what"],
            "ranks_told": [rank for rank in (0, 1) if f"rank {rank}: SharedError: checkpoint " in log],
            "stubs": len(stubs),
            "steps": after["steps"],
            "same_samples": after["slots"] == wanted["slots"] and after["consistent"],
            "loss_error": max(abs(a - b) for a, b in zip(after["losses"], wanted["losses"], strict=True)),
        }
    return found


def main(folder: Path, steps: int, kills: list[int | str], *, kills_only: bool) -> None:
    build_tokenizer(None, 8)  # for all children, of any length
    gc.freeze()  # their collections leave alone what is here
    per_shard = BATCH * steps // EPOCHS // SHARDS
    data = Data(write_pairs(folder / "data", shards=SHARDS, per_shard=per_shard, size=20, broken={11}), steps)
    twin = setup(folder / "twin", data)
    run(twin)
    wanted = outcome(twin)
    assert wanted["steps"] == [*range(1, steps + 1)]
    report = {"same_world": {kill_at: killed(folder, data, wanted, kill_at) for kill_at in kills}}
    if not kills_only:
        report["masked"], report["steps"], report["keys"] = wanted["masked"], wanted["steps"], len(wanted["slots"])
        report["distinct_keys"] = len({key for step in wanted["slots"].values() for key in step.values()})
        report |= from_the_mirror(folder, data, wanted) | with_plain_sgd(folder, data)
    print(json.dumps(report))


def killed(folder: Path, data: Data, wanted: dict, kills: int | str) -> dict:
    """What is as in the run that was never interrupted; and whether each resume began with what the one before it had
    trained: if that were trained again from an older checkpoint, nobody would see what a resume had broken."""
    each = str(kills).split(",")
    config = setup(folder / f"kill-{'-'.join(each)}", data)
    for kill_at in each:
        run(config, kill_at=int(kill_at) if kill_at.isdigit() else kill_at)
    run(config)
    found = outcome(config)
    begun = [json.loads(line)["step"] for line in (config.parent / "run" / "attempts.jsonl").read_text().splitlines()]
    built_upon = all(one < its_next for one, its_next in pairwise(begun[1:]))
    return {key: bitwise_equal(found[key], wanted[key]) for key in wanted} | {"built_upon": built_upon}


def from_the_mirror(folder: Path, data: Data, wanted: dict) -> dict:
    mirrored = setup(folder / "mirrored", data, mirror=(folder / "mirrored" / "mirror").as_uri())
    run(mirrored, kill_at=7)
    shutil.rmtree(mirrored.parent / "run")
    run(mirrored)
    found = outcome(mirrored)
    return {
        "mirror": {key: bitwise_equal(found[key], wanted[key]) for key in wanted if key not in OF_THE_FOLDER},
        "fetched": "was fetched from file://" in mirrored.with_name("log").read_text(),
    }


def with_plain_sgd(folder: Path, data: Data) -> dict:
    """What is equal to rounding only: other numbers of ranks, a full disk; and a run that must not be equal."""
    plain = {"kind": "sgd"}  # patches are dropped by position, on any ranks
    steady = setup(folder / "steady", data, **plain)
    run(steady)
    wanted, other_world = outcome(steady), {}
    for name, before, after in (("1 to 2", 1, 2), ("2 to 1", 2, 1)):
        config = setup(folder / name.replace(" ", "-"), data, **plain)
        run(config, world=before, kill_at=7)
        run(config, world=after)
        found = outcome(config)
        other_world[name] = {
            "same_samples": found["slots"] == wanted["slots"] and found["consistent"],
            "loss_error": max(abs(a - b) for a, b in zip(found["losses"], wanted["losses"], strict=True)),
            "masked": found["masked"] == wanted["masked"],
        }
    other = setup(folder / "other-seed", data, **plain)
    other.write_text(other.read_text().replace("seed: 5", "seed: 6"))
    run(other)
    found = outcome(other)
    control = {
        "same_samples": found["slots"] == wanted["slots"],
        "same_tensors": bitwise_equal(found["tensors"], wanted["tensors"]),
    }
    disk = full_disk(folder, data, wanted, plain)
    return {"other_world": other_world, "control": control, "full_disk": disk}


if __name__ == "__main__":
    folder, steps, *words = sys.argv[1:]
    numbers = [int(word) if word.isdigit() else word for word in words if word != KILLS_ONLY]
    main(Path(folder), int(steps), numbers, kills_only=KILLS_ONLY in words)
