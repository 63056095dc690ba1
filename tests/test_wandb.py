"""clipscale/telemetry/wandb_board.py, offline, read back by W&B's own records; and a config on TensorBoard."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest
from processes import wait_until
from shards import write_pairs
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tiny import tiny_config
from wandb.proto.wandb_internal_pb2 import Record

from clipscale.config.load import config_from_yaml
from clipscale.errors import UserError
from clipscale.preflight import checks
from clipscale.training.trainer import train

BLOCK, HEAD = 1 << 15, 7  # LevelDB's log: blocks of chunks; W&B's file has a head as long as a chunk's before them


def records(folder: Path) -> Iterator[Record]:
    """What lies in the offline runs in folder/run/wandb, oldest first."""
    for file in sorted(folder.glob("run/wandb/offline-run-*/run-*.wandb")):
        raw, place, whole = file.read_bytes(), HEAD, b""
        while place + HEAD <= len(raw):
            if BLOCK - place % BLOCK < HEAD:
                place += BLOCK - place % BLOCK
                continue
            length, kind = struct.unpack_from("<HB", raw, place + 4)
            whole += raw[place + HEAD : place + HEAD + length]
            place += HEAD + length
            if kind in (1, 4):  # whole, or the last part
                yield Record.FromString(whole)
                whole = b""


def kind(record: Record) -> str:
    return record.WhichOneof("record_type")


def whole(folder: Path, runs: int) -> list[Record]:
    """Once so many offline runs are written: W&B's process does that, a little behind."""
    wait_until(lambda: [kind(record) for record in records(folder)].count("exit") == runs)
    return [*records(folder)]


def items(found: Iterable) -> dict:
    return {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in found}


def curve(found: list[Record], name: str) -> list[tuple[int, float]]:
    history = [items(record.history.item) for record in found if kind(record) == "history"]
    return [(row["step"], row[name]) for row in history]


@pytest.fixture(scope="module")
def urls(tmp_path_factory) -> str:
    return write_pairs(tmp_path_factory.mktemp("data"), 4, 8, size=16)


def rows(folder: Path) -> list[tuple[int, float]]:
    lines = (folder / "run/metrics.jsonl").read_text().splitlines()
    return [(row["step"], row["loss"]) for row in map(json.loads, lines)]


def test_a_run_and_its_resume_are_one_run_there_and_one_that_went_back_is_another(tmp_path, urls):
    words = ["wandb.project=towers", "wandb.mode=offline", "checkpoint.every_steps=1", "checkpoint.keep=9"]
    train(tiny_config(tmp_path, urls, *words, "train.samples=16"))
    train(tiny_config(tmp_path, urls, *words, "train.samples=24"))
    found = whole(tmp_path, runs=2)
    assert curve(found, "train/loss") == rows(tmp_path)
    begun = [record.run for record in found if kind(record) == "run"]
    mine = begun[0].run_id
    assert {(run.project, run.display_name, run.run_id) for run in begun} == {("towers", "run", mine)}
    (text, *_) = tmp_path.glob("run/wandb/offline-run-*/files/clipscale.yaml")
    assert config_from_yaml(text.read_text()).wandb.project == "towers"
    told = {}
    for record in found:
        told |= items(record.config.update) if kind(record) == "config" else {}
    assert (told["train.global_batch"], told["optim.lr"], told["train.samples"]) == (8, 5e-4, 24)
    back = f"resume={tmp_path}/run/checkpoints/step-000000001"
    train(tiny_config(tmp_path, urls, *words, "train.samples=24", back))
    groups = {run.run.run_id: run.run.run_group for run in whole(tmp_path, runs=3) if kind(run) == "run"}
    assert len(groups) == 2
    assert {*groups.values()} == {mine}


@pytest.mark.parametrize("failing", ["init", "log", "finish"])
def test_what_fails_there_costs_the_run_nothing(tmp_path, urls, monkeypatch, failing):
    theirs = Mock(dir=str(tmp_path))

    def fails(*_, **__):
        raise RuntimeError("no such host")

    if failing != "init":
        setattr(theirs, failing, fails)
    monkeypatch.setattr("wandb.init", fails if failing == "init" else lambda **_: theirs)
    train(tiny_config(tmp_path, urls, "wandb.project=towers"))
    assert [step for step, _ in rows(tmp_path)] == [1, 2, 3, 4]
    faults = [json.loads(line) for line in (tmp_path / "run/faults.jsonl").read_text().splitlines()]
    assert [fault["what"] for fault in faults] == ["Weights & Biases: RuntimeError: no such host"]


def test_a_project_without_the_package_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"wandb.project='x' needs Weights & Biases: pip install 'clipscale\[wandb\]'"):
        checks.check_training(tiny_config(tmp_path, "x.tar", "wandb.project=x"))


def test_tensorboard_has_the_config_as_text_and_as_hyperparameters(tmp_path, urls):
    train(tiny_config(tmp_path, urls, f"eval.validation.urls={urls}", "train.samples=8"))
    board = EventAccumulator(str(tmp_path / "run/tensorboard"))
    board.Reload()
    (text,) = board.Tensors("config/text_summary")
    assert config_from_yaml(text.tensor_proto.string_val[0].decode().strip("`\n")).train.samples == 8
    content = board.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    start = HParamsPluginData.FromString(content).session_start_info
    assert start.hparams["train.global_batch"].number_value == 8
    content = board.summary_metadata["_hparams_/experiment"].plugin_data.content
    metrics = {info.name.tag for info in HParamsPluginData.FromString(content).experiment.metric_infos}
    assert {"train/loss", "validation/loss"} <= metrics
    assert metrics <= {*board.Tags()["scalars"]}
