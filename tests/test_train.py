"""clipscale/training/trainer.py: what a run does when all is well, and when it is not."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from shards import write_pairs
from tiny import tiny_config, write_config

from clipscale.cli import main
from clipscale.dist import World
from clipscale.errors import UserError
from clipscale.loss import contrastive_grads
from clipscale.resilience.wishes import Wishes
from clipscale.towers import Tower
from clipscale.training.learner import Learner
from clipscale.training.trainer import Trainer, train


@pytest.fixture(scope="module")
def urls(tmp_path_factory) -> str:
    return write_pairs(tmp_path_factory.mktemp("data"), 4, 8, size=16)


def rows(folder: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (folder / "run" / name).read_text().splitlines()]


def newest_weights(folder: Path) -> dict[str, torch.Tensor]:
    path = max((folder / "run" / "checkpoints").iterdir()) / "model.safetensors"
    return load_file(path)


def test_a_run_tells_what_was_learned_in_three_lines(tmp_path, urls):
    summary = train(tiny_config(tmp_path, urls))
    assert len(summary) == 3
    assert summary[0].startswith("trained 4 steps in 0:0")
    assert f"loss {rows(tmp_path)[-1]['loss']:.4f}" in summary[1]
    assert str(tmp_path / "run" / "checkpoints") in summary[2]


def test_steps_are_the_ceiling_of_samples_over_batch(tmp_path, urls):
    train(tiny_config(tmp_path, urls, "train.samples=33"))
    assert [row["samples"] for row in rows(tmp_path)] == [8, 16, 24, 32, 40]


def test_two_runs_are_bitwise_equal_and_another_seed_is_not(tmp_path, urls):
    weights = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        train(tiny_config(tmp_path / name, urls, f"seed={seed}"))
        weights[name] = newest_weights(tmp_path / name)
    assert all(torch.equal(weights["a"][key], weights["b"][key]) for key in weights["a"])
    assert not all(torch.equal(weights["a"][key], weights["c"][key]) for key in weights["a"])


def test_the_loss_is_computed_as_the_config_says(tmp_path, urls, monkeypatch):
    """In training and in validation, which needs no gradient."""
    calls = []

    def recorded(*inputs, **options):
        calls.append(options)
        return contrastive_grads(*inputs, **options)

    for module in ("clipscale.training.learner", "clipscale.eval.validation"):
        monkeypatch.setattr(f"{module}.contrastive_grads", recorded)
    words = ["loss.precision=fp64", "loss.engine=torch", "loss.tile=3", "train.samples=8"]
    words += [f"eval.validation.urls={urls}", "eval.validation.batch=16"]
    train(tiny_config(tmp_path, urls, *words))
    settings = {"precision": "fp64", "engine": "torch", "tile": 3}
    trains, *validates = calls
    assert isinstance(trains.pop("group"), Wishes)
    assert trains == settings | {"image_grad": True, "text_grad": True}
    assert validates == [settings | {"image_grad": False, "text_grad": False, "scale_grad": False}] * 2


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_autocast_follows_fp32(tmp_path, urls, precision):
    losses = {}
    for name in ("fp32", precision):
        (tmp_path / name).mkdir()
        train(tiny_config(tmp_path / name, urls, f"train.precision={name}"))
        losses[name] = [row["loss"] for row in rows(tmp_path / name)]
        assert all(row["grad_norm"] > 0 for row in rows(tmp_path / name))
    assert losses[precision] != losses["fp32"]
    assert losses[precision] == pytest.approx(losses["fp32"], rel=2e-2)


def test_the_fp16_loss_scale_leaves_no_trace_in_the_gradient(tmp_path, urls):
    for name in ("fp32", "fp16"):
        (tmp_path / name).mkdir()
        train(tiny_config(tmp_path / name, urls, f"train.precision={name}", "train.samples=8"))
    found, wanted = (rows(tmp_path / name)[0]["grad_norm"] for name in ("fp16", "fp32"))
    assert found == pytest.approx(wanted, rel=2e-2)


def test_a_gradient_that_is_not_finite_is_skipped_then_ends_the_run(tmp_path, urls, monkeypatch):
    real = torch.nn.utils.get_total_norm
    norms = iter([None, math.nan, None, math.inf, math.inf])

    def total(gradients):
        norm = next(norms)
        return real(gradients) if norm is None else torch.tensor(norm)

    monkeypatch.setattr(torch.nn.utils, "get_total_norm", total)
    config = tiny_config(tmp_path, urls, "train.samples=80", "train.max_nonfinite_steps=2", "checkpoint.every_steps=1")
    with pytest.raises(UserError, match=r"step 5: 2 steps in a row without a finite gradient .*max_nonfinite_steps"):
        train(config)
    assert [row["grad_norm"] is None for row in rows(tmp_path)] == [False, True, False, True]
    log = (tmp_path / "run" / "run.log").read_text()
    assert "step 2: gradient norm is nan" in log


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"),
            "Tried to allocate 2.00 GiB",
        ),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 7"), "you tried 7"),
        (MemoryError(), "MemoryError"),
    ],
    ids=["torch", "torch on a cpu", "python"],
)
def test_a_shortage_of_memory_is_one_line_with_the_fix(tmp_path, urls, monkeypatch, error, said, capsys):
    """In a tower, at the second step."""
    embed, step, steps = Tower.__call__, Learner.gradients, []

    def short_of_memory(self, *inputs):
        if len(steps) == 2:
            raise error
        return embed(self, *inputs)

    monkeypatch.setattr(Tower, "__call__", short_of_memory)
    monkeypatch.setattr(
        Learner, "gradients", lambda self, batch, **rest: (steps.append(batch), step(self, batch, **rest))[1]
    )
    assert main(["train", write_config(tmp_path, urls), "gradcache.keep_bytes=auto"]) == 2
    line = next(line for line in capsys.readouterr().err.splitlines() if "error" in line)
    assert line.startswith("clipscale: error: step 2: out of memory (")
    assert said in line
    assert re.search(r"; lower gradcache\.keep_bytes \(auto: [\d,]+\), gradcache\.image_chunk \(3\) or ", line)
    assert line.endswith("gradcache.text_chunk (5)")


def test_other_errors_of_a_step_are_not_taken_for_a_shortage(tmp_path, urls, monkeypatch):
    def fail(self, batch, **rest):
        raise RuntimeError("something else")

    monkeypatch.setattr(Learner, "gradients", fail)
    with pytest.raises(RuntimeError, match="something else"):
        train(tiny_config(tmp_path, urls))


def test_a_resume_goes_by_the_chunks_that_were_found(tmp_path, urls, monkeypatch):
    """Bit for bit, where another search would find others; once a setting changes, there is one."""
    chunks = {"image": 5, "text": 6}

    def found(self, tower, cost):
        return chunks[tower.name]

    monkeypatch.setattr("clipscale.step.search.Search._chunk", found)
    words = ("gradcache.image_chunk=auto", "gradcache.text_chunk=auto", "checkpoint.every_steps=2")
    train(tiny_config(tmp_path, urls, *words))
    wanted = newest_weights(tmp_path)
    shutil.rmtree(max((tmp_path / "run" / "checkpoints").iterdir()))  # as if killed after step 3, saved at 2
    chunks |= {"image": 2, "text": 3}
    train(tiny_config(tmp_path, urls, *words))
    weights, log = newest_weights(tmp_path), tmp_path / "run" / "run.log"
    assert all(torch.equal(weights[key], wanted[key]) for key in wanted)
    assert log.read_text().count("gradcache: auto is chunks of 5 pictures and 6 captions, in pass 1 of 5 and 6") == 1
    assert log.read_text().count("step: chunks of 5 pictures and 6 captions of full length") == 2
    train(tiny_config(tmp_path, urls, *words, "gradcache.keep_bytes=7", "train.samples=48"))
    assert log.read_text().count("gradcache: auto is chunks of 2 pictures and 3 captions") == 1


def test_a_step_without_a_valid_pair_changes_nothing(tmp_path):
    broken = set(range(8, 40))
    urls = write_pairs(tmp_path / "data", 5, 8, size=16, broken=broken)
    words = ("data.max_bad_fraction=1", "train.samples=40", "data.streams=1", "optim.weight_decay=0")
    trainer = Trainer(tiny_config(tmp_path, urls, *words), World(0, 1, 0, torch.device("cpu")))
    trainer.towers.model.train()
    empty = 0
    loader = trainer.feed.loader
    for batch in (next(loader) for _ in range(5)):
        before = {key: value.clone() for key, value in trainer.towers.model.state_dict().items()}
        try:
            row = trainer.step(batch)
        except UserError:  # nothing but broken pictures from the start
            assert trainer.skips.counts.total() == trainer.position
            continue
        same = all(torch.equal(before[key], value) for key, value in trainer.towers.model.state_dict().items())
        assert same == (not batch.valid.any())
        empty += int(same and row["loss"] == 0)
    trainer.close()
    assert trainer.skips.counts == {"mine: broken picture": 32}
    skipped = rows(tmp_path, "skipped.jsonl")
    assert len(skipped) == 32
    assert {row["cause"] for row in skipped} == {"broken picture"}
    assert {int(row["key"]) for row in skipped} == broken


def test_too_many_masked_samples_end_the_run_with_the_counts(tmp_path):
    urls = write_pairs(tmp_path / "data", 4, 8, size=16, broken={3, 9, 21})
    with pytest.raises(
        UserError, match=r"3 of 32 samples could not be used \(mine: broken picture: 3\).*max_bad_fraction=0.05"
    ):
        train(tiny_config(tmp_path, urls))
    train(tiny_config(tmp_path, urls, f"run.dir={tmp_path}/other", "data.max_bad_fraction=0.1"))


def test_sources_are_mixed_by_weight(tmp_path, urls):
    more = write_pairs(tmp_path / "more", 4, 8, size=16, seed=100)
    words = (
        f"data.sources.more.urls={more}",
        "data.sources.more.weight=3",
        "train.samples=64",
        "data.allow_repeats=true",
    )
    trainer = Trainer(tiny_config(tmp_path, urls, *words), World(0, 1, 0, torch.device("cpu")))
    summary = trainer.run()
    trainer.close()
    assert "64 samples seen" in summary[0]
    assert trainer.feed.pipeline.mixture.quota == {"mine": 2500, "more": 7500}


def test_starting_from_a_path_then_from_ones_own(tmp_path, urls):
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    train(tiny_config(tmp_path / "first", urls, "checkpoint.every_steps=2"))
    elsewhere = f"resume={tmp_path}/first/run/checkpoints/step-000000002"
    shutil.copytree(tmp_path / "first", tmp_path / "kept")
    train(tiny_config(tmp_path / "second", urls, elsewhere))
    assert [row["step"] for row in rows(tmp_path / "second")] == [3, 4]
    found, wanted = newest_weights(tmp_path / "second"), newest_weights(tmp_path / "kept")
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    summary = train(tiny_config(tmp_path / "second", urls, elsewhere))
    assert summary[0].startswith("already complete")


def test_more_samples_go_on_from_the_end(tmp_path, urls):
    train(tiny_config(tmp_path, urls))
    train(tiny_config(tmp_path, urls, "train.samples=48"))
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert "changed since the checkpoint: train.samples: 32 -> 48" in (tmp_path / "run" / "run.log").read_text()


def test_a_shard_that_changed_is_named(tmp_path):
    urls, changed = write_pairs(tmp_path / "pairs", 2, 16), tmp_path / "pairs" / "0001.tar"
    train(tiny_config(tmp_path, urls))
    changed.write_bytes(changed.read_bytes().replace(b"number 1 of", b"number 7 of"))
    with pytest.raises(UserError, match=r"content of mine: .* positions would mean other samples"):
        train(tiny_config(tmp_path, urls, "train.samples=48"))
    told = (tmp_path / "run" / "run.log").read_text()
    assert told.count(f"source 'mine': {changed} changed since it was indexed last: ") == 1


def test_a_checkpoint_of_another_model_is_refused(tmp_path, urls):
    train(tiny_config(tmp_path, urls))
    with pytest.raises(UserError, match="does not fit the model of this config"):
        train(tiny_config(tmp_path, urls, "model.vision.width=48", "train.samples=48"))


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, urls):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"run\.dir='.*file/run' cannot be made: '.*/file' is not a folder;"):
        train(tiny_config(tmp_path, urls, f"run.dir={tmp_path}/file/run"))


def test_a_folder_of_another_user_is_one_line_with_its_path(tmp_path, urls, monkeypatch):
    def refuse(run_dir: str, resume: str, samples: int) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), f"{run_dir}/inside")

    monkeypatch.setattr("clipscale.training.trainer.find_start", refuse)
    with pytest.raises(UserError, match="/run/inside: Permission denied"):
        train(tiny_config(tmp_path, urls))


def test_changed_optimizer_settings_hold_after_a_resume(tmp_path, urls):
    train(tiny_config(tmp_path, urls))
    changes = ("optim.weight_decay=0.05", "optim.betas=[0.5,0.6]", "optim.eps=1e-4", "train.samples=48")
    trainer = Trainer(tiny_config(tmp_path, urls, *changes), World(0, 1, 0, torch.device("cpu")))
    decayed, plain = trainer.learner.optimizer.param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.05, 0.0)
    assert all((group["betas"], group["eps"]) == ((0.5, 0.6), 1e-4) for group in (decayed, plain))
    assert all(
        state["step"] == 4 for state in trainer.learner.optimizer.state.values()
    )  # the moments are the checkpoint's
    trainer.run()
    trainer.close()
    with pytest.raises(UserError, match=r"optim\.kind=sgd, but the checkpoint was written under adamw"):
        train(tiny_config(tmp_path, urls, "optim.kind=sgd", "train.samples=64"))


def test_a_resume_takes_over_the_tuned_kernels(tmp_path, urls, monkeypatch):
    """They are the main rank's; none on a CPU, unless the test says so."""
    shapes, adopted = {"gradient fp16 on some GPU": [128, 128, 64, 8, 3, 8, True, 128]}, []
    monkeypatch.setattr("clipscale.training.trainer.tuned_shapes", lambda: shapes)
    monkeypatch.setattr("clipscale.training.trainer.adopt_shapes", adopted.append)
    train(tiny_config(tmp_path, urls))
    train(tiny_config(tmp_path, urls, "train.samples=48"))
    assert adopted == [{}, shapes]


def test_steps_that_held_the_logit_scale_are_counted_over_a_resume(tmp_path, urls, monkeypatch):
    update = Learner.update

    def jump(self, *, step):
        norm = update(self, step=step)
        with torch.no_grad():
            self.towers.model.logit_scale.fill_(9.0 if step in (2, 5, 6) else 2.0)
        return norm

    monkeypatch.setattr(Learner, "update", jump)
    for samples in (24, 56):
        train(tiny_config(tmp_path, urls, f"train.samples={samples}"))
    found = rows(tmp_path)
    assert [row["logit_scale_clamped"] for row in found] == [0, 1, 1, 1, 2, 3, 3]
    assert [row["step"] for row in found if row["logit_scale"] == pytest.approx(100.0)] == [2, 5, 6]


def test_fp16_may_begin_at_a_resume(tmp_path, urls):
    train(tiny_config(tmp_path, urls))
    train(tiny_config(tmp_path, urls, "train.precision=fp16", "train.samples=48"))
    assert rows(tmp_path)[-1]["step"] == 6


def test_a_refused_resume_leaves_the_folder_as_it_was(tmp_path, urls):
    train(tiny_config(tmp_path, urls, "checkpoint.every_steps=3", "train.samples=40"))
    shutil.rmtree(max((tmp_path / "run" / "checkpoints").iterdir()))  # as if killed after step 5, saved at 3
    kept = ("metrics.jsonl", "config.yaml")
    before = {name: (tmp_path / "run" / name).read_bytes() for name in kept}
    other = write_pairs(tmp_path / "other", 4, 8, size=16, seed=9)
    with pytest.raises(UserError, match="the data are not those of the checkpoint"):
        train(tiny_config(tmp_path, other, "train.samples=40"))
    assert {name: (tmp_path / "run" / name).read_bytes() for name in kept} == before


def test_a_folder_in_use_is_refused(tmp_path, urls):
    config = tiny_config(tmp_path, urls)
    trainer = Trainer(config, World(0, 1, 0, torch.device("cpu")))
    with pytest.raises(UserError, match="is in use by another process"):
        train(config)
    trainer.close()
    train(config)


def test_metrics_are_json_even_where_a_number_is_not_finite(tmp_path, urls, monkeypatch):
    norms = iter([math.nan, 1.0, 1.0, 1.0])
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", lambda gradients: torch.tensor(next(norms)))
    train(tiny_config(tmp_path, urls))
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert [row["grad_norm"] for row in rows(tmp_path)] == [None, 1.0, 1.0, 1.0]


STEP_PARTS = [
    *("data_wait", "copies", "image_forward", "text_forward", "loss", "image_backward", "text_backward"),
    *("communication", "optimizer"),
]


def test_every_row_says_where_the_time_went_and_the_end_shows_it(tmp_path, urls, monkeypatch):
    """What follows a step (its evaluation, its checkpoint) is counted too: the rows add up to the whole run."""
    monkeypatch.setattr("clipscale.training.trainer._STEPS_OF_A_PICTURE", 4)
    words = ["checkpoint.every_steps=2", f"eval.validation.urls={urls}", "eval.validation.batch=16"]
    trainer = Trainer(tiny_config(tmp_path, urls, *words), World(0, 1, 0, torch.device("cpu")))
    workers, write, written = trainer.feed.loader.workers, trainer.log.metrics, []
    wait = workers.wait
    monkeypatch.setattr(workers, "wait", lambda number: (time.sleep(0.01), wait(number))[1])
    monkeypatch.setattr(trainer.log, "metrics", lambda row: (written.append(time.perf_counter()), write(row)))
    begin = time.perf_counter()
    trainer.run()
    trainer.close()
    found = rows(tmp_path)
    for row, more in zip(found, ([], ["checkpoint"], [], ["evaluation", "checkpoint"]), strict=True):
        wanted = [f"seconds/{name}" for name in (*STEP_PARTS, *more, "other")]
        assert [key for key in row if key.startswith("seconds/")] == wanted
        assert row["seconds/data_wait"] > 3 * 0.01  # a wait for each of three chunks, inside of "image forward"
        assert (row["tokens_per_caption"], row["kept_share"]) == (8.0, 0.0)
    whole = written[-1] - begin
    total = sum(value for row in found for key, value in row.items() if key.startswith("seconds/"))
    assert 0.8 * whole < total < whole
    assert (tmp_path / "run" / "parts.png").stat().st_size > 5000
    assert f"where the time went: {tmp_path}/run/parts.png" in (tmp_path / "run" / "run.log").read_text()


@pytest.mark.parametrize("missing", ["matplotlib", "room"])
def test_a_picture_that_cannot_be_drawn_ends_no_run(tmp_path, urls, monkeypatch, missing):
    monkeypatch.setattr("clipscale.training.trainer._STEPS_OF_A_PICTURE", 1)
    if missing == "matplotlib":
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        wanted = "no parts.png: matplotlib draws it, which is not installed: pip install matplotlib, then python "
    else:
        (tmp_path / "run" / "parts.png").mkdir(parents=True)
        wanted = f"no parts.png: {tmp_path}/run/parts.png: Is a directory"
    assert train(tiny_config(tmp_path, urls, "train.samples=8"))[0].startswith("trained 1 step ")
    assert wanted in (tmp_path / "run" / "run.log").read_text()


def test_a_run_goes_on_from_rows_without_parts(tmp_path, urls):
    """As a run of before they were measured has them. Four steps are too few for a picture."""
    train(tiny_config(tmp_path, urls, "train.samples=16"))
    old = [{key: value for key, value in row.items() if "/" not in key} for row in rows(tmp_path)]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in old))
    train(tiny_config(tmp_path, urls))
    assert ["seconds/loss" in row for row in rows(tmp_path)] == [False, False, True, True]
    assert not (tmp_path / "run" / "parts.png").exists()
