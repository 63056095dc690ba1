"""clipscale/training/report.py: the lines of a run, from the rows and configs that they tell of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import tiny_config

from clipscale.checkpoint import RunState, Snapshot
from clipscale.dist import World
from clipscale.progress import time_left
from clipscale.training.report import (
    evaluation_lines,
    in_batch_accuracy,
    left_line,
    start_lines,
    step_line,
    summary_lines,
)

ROW = {
    "step": 12,
    "samples": 49_152,
    "loss": 2.08014,
    "logit_scale": 14.2857,
    "grad_norm": 0.12345,
    "lr": 0.0005,
    "image_accuracy": 0.25,
    "text_accuracy": 0.5,
    "masked_samples": 3,
    "memory_bytes": 3 * 2**29,
    "samples_per_second": 1234.5,
    "data_wait_share": 0.126,
}
STEP = (
    "step  12/400  samples 49.15k  loss 2.0801  scale 14.29  lr 5.00e-04  1.23k/s  host 1.50G  eta 1h06m"
    "  masked 3  wait 13%"
)
VALIDATION = {
    "validation/loss": 1.5,
    "validation/image_accuracy": 0.75,
    "validation/text_accuracy": 0.5,
    "validation/pairs": 1024,
    "validation/batch": 256,
    "validation/repeated_captions": 0,
    "validation/bad_pictures": 0,
}
ZEROSHOT = {
    "zeroshot/top1": 0.61,
    "zeroshot/top5": 0.9,
    "zeroshot/pictures": 10_000,
    "zeroshot/classes": 1000,
    "zeroshot/classes_seen": 998,
    "zeroshot/passed_over": 0,
    "zeroshot/bad_pictures": 0,
}
HUGE = {
    "step": 987_654,
    "samples": 12_800_000_000,
    "loss": 13.8155,
    "logit_scale": 100.0,
    "lr": 5e-4,
    "samples_per_second": 1_234_567.0,
    "gpu_memory_bytes": 139 * 2**30,
    "masked_samples": 0,
}


def world(size: int) -> World:
    return World(0, size, 0, torch.device("cpu"))


def test_a_step_line_says_how_often_the_logit_scale_was_clamped():
    few = {"masked_samples": 0, "data_wait_share": 0.0}
    line = step_line(ROW | few | {"logit_scale_clamped": 1234}, last_step=400, eta_seconds=3960)
    assert "  clamped 1.23k" in line
    assert "clamped" not in step_line(ROW | {"logit_scale_clamped": 0}, last_step=400, eta_seconds=3960)


def test_a_step():
    assert step_line(ROW, last_step=400, eta_seconds=4000) == STEP


def test_what_is_zero_is_not_told():
    line = step_line(ROW | {"masked_samples": 0, "data_wait_share": 0.01}, last_step=400, eta_seconds=4000)
    assert line == STEP.replace("masked 3  wait 13%", "grad 0.123  wait 1%")


@pytest.mark.parametrize("eta", [95, 86_399, 86_400, 99.9 * 86_400])
@pytest.mark.parametrize("masked", [0, 3, 1_234_567])
@pytest.mark.parametrize("wait", [0.04, 0.87, 1.0])
@pytest.mark.parametrize("parts", [False, True])
def test_a_line_of_the_largest_run_has_120_columns_at_most(eta, masked, wait, parts):
    row = ROW | HUGE | (PARTS if parts else {}) | {"masked_samples": masked, "data_wait_share": wait}
    line = step_line(row, last_step=1_000_000, eta_seconds=eta)
    assert len(line) <= 120
    start = "step  987654/1000000  samples 12.80G  loss 13.816  scale 100.0  lr 5.00e-04  1.23M/s  "
    assert line.startswith(start)
    assert f"eta {time_left(eta)}" in line
    assert ("masked" in line) == (masked > 0)
    assert "gpu 139G" in line or masked


PARTS = {
    "seconds/data_wait": 0.5,
    "seconds/image_forward": 1.5,
    "seconds/text_forward": 0.6,
    "seconds/loss": 0.9,
    "seconds/image_backward": 4.6,
    "seconds/text_backward": 1.6,
    "seconds/communication": 0.0,
    "seconds/evaluation": 1000.0,
    "seconds/checkpoint": 1000.0,
    "seconds/other": 0.3,
}
SMALL = ROW | {"masked_samples": 0, "data_wait_share": 0.04, "samples_per_second": 522.0, "grad_norm": 16.172}


def test_the_two_largest_parts_are_told_where_they_fit():
    """Of the steps' own time, both passes of a tower as one; before the gradient's norm, and whole or not at all."""
    short = step_line(SMALL | PARTS, last_step=400, eta_seconds=543)
    assert short == (
        "step  12/400  samples 49.15k  loss 2.0801  scale 14.29  lr 5.00e-04  522/s  host 1.50G  eta 9:03"
        "  image 61% text 22%"
    )
    waits = step_line(SMALL | PARTS | {"data_wait_share": 0.3}, last_step=400, eta_seconds=543)
    assert waits.endswith("eta 9:03  grad 16.172  wait 30%")
    ranks = step_line(SMALL | PARTS | {"seconds/communication": 90.0}, last_step=400, eta_seconds=543)
    assert ranks.endswith("eta 9:03  comm 90% image 6%")


def test_the_largest_parts_of_odd_rows():
    for parts in ({"seconds/other": 0.0}, {"seconds/evaluation": 5.0, "seconds/other": 0.0}):
        assert step_line(SMALL | parts, last_step=400, eta_seconds=543).endswith("eta 9:03  grad 16.172  wait 4%")
    line = step_line(SMALL | {"seconds/other": 1.0}, last_step=400, eta_seconds=543)
    assert line.endswith("eta 9:03  wait 4%  other 100%")


@pytest.mark.parametrize("wait", [0.04, 0.5])
@pytest.mark.parametrize("parts", [False, True])
def test_a_line_of_400_million_samples_has_all_that_is_asked_for(wait, parts):
    big = {"step": 12_208, "samples": 400_031_744, "loss": 10.4, "logit_scale": 100.0, "data_wait_share": wait}
    row = ROW | big | (PARTS if parts else {}) | {"masked_samples": 0}
    line = step_line(row, last_step=12_208, eta_seconds=36_000)
    assert len(line) <= 120
    assert "step 12208/12208  samples 400.0M  loss 10.400  scale 100.0  lr 5.00e-04  1.23k/s  host 1.50G" in line
    assert ("wait 50%" if wait > 0.1 else "grad 0.123") in line


def test_a_line_keeps_its_columns_while_a_run_goes_on():
    rows = [ROW | {"step": 10**n, "samples": 4096 * 10**n} for n in range(5)]
    lines = [step_line(row, last_step=12_208, eta_seconds=60) for row in rows]
    assert len({line.index("  eta") for line in lines}) == 1


def test_on_a_gpu_its_memory_is_told():
    assert "gpu 40.0G" in step_line(ROW | {"gpu_memory_bytes": 40 * 2**30}, last_step=400, eta_seconds=1)


def test_evaluations_have_lines_of_their_own():
    assert evaluation_lines({}, step=12, last_step=400) == []
    assert evaluation_lines(VALIDATION | ZEROSHOT, step=12, last_step=400) == [
        "step  12/400  validation: loss 1.5000, in-batch accuracy 0.750",
        "step  12/400  zero-shot: top-1 0.6100, top-5 0.9000, 10,000 pictures of 998 of 1,000 classes",
    ]
    bad = {"validation/bad_pictures": 1, "zeroshot/passed_over": 3000, "zeroshot/bad_pictures": 1200}
    first, second = evaluation_lines(VALIDATION | ZEROSHOT | bad, step=12, last_step=400)
    assert first.endswith("0.750, 1 bad picture")
    assert second.endswith("1,000 classes, 3,000 passed over, 1,200 bad pictures")


@pytest.mark.parametrize("repeats", [80, 1000])
def test_an_evaluation_of_the_largest_run_has_120_columns_at_most(repeats):
    found = VALIDATION | ZEROSHOT | {"validation/repeated_captions": repeats, "validation/bad_pictures": 1200}
    found |= {"zeroshot/pictures": 50_000, "zeroshot/passed_over": 3}
    for line in evaluation_lines(found, step=12_208, last_step=12_208):
        assert len(line) <= 120


def test_sets_are_called_by_their_names():
    row = {key.replace("zeroshot", "imagenet_v2"): value for key, value in ZEROSHOT.items()}
    row |= {key.replace("validation", "flickr"): value for key, value in VALIDATION.items()} | {"a/failed": 1.0}
    assert [line.split("  ", 1)[1].split(",")[0] for line in evaluation_lines(row, step=1, last_step=4)] == [
        "flickr: loss 1.5000",
        "zero-shot imagenet_v2: top-1 0.6100",
    ]
    assert summary_lines("done", ROW | row | {"seconds/loss": 0.1}, run_dir="a", pairs=8)[1].endswith(
        "0.250, flickr loss 1.5000, a failed, zero-shot imagenet_v2 top-1 0.6100, top-5 0.9000"
    )


def test_ten_captions_in_all_have_no_in_batch_accuracy():
    """CIFAR-10: every pair ties with its class's others. The same in training and validation."""
    wanted = "no in-batch accuracy (96.1% of captions repeat: ties)"
    row = {"image_accuracy": 0.0, "repeated_captions": 246}
    assert in_batch_accuracy(row, pairs=256) == wanted
    validation = {f"validation/{name}": value for name, value in row.items()}
    assert in_batch_accuracy(validation, "validation/", pairs=256) == wanted
    few = in_batch_accuracy({"image_accuracy": 0.5, "repeated_captions": 2}, pairs=256)
    assert few == "in-batch accuracy 0.500 (0.8% of captions repeat: misses)"
    assert in_batch_accuracy({"image_accuracy": 0.5, "repeated_captions": 0}, pairs=256) == "in-batch accuracy 0.500"


def test_a_start(tmp_path):
    config = tiny_config(tmp_path, "a.tar")
    lines = start_lines(config, world(1), last_step=4, found=None, snapshot=None)
    assert lines == [
        f"{tmp_path}/run: 4 steps of 8 pairs on 1 cpu rank, from the start",
        "learning rate: 0.0005, falls by a cosine to 0 at step 4",
    ]


def test_a_resume_tells_from_where_and_what_has_changed(tmp_path):
    before, config = tiny_config(tmp_path, "a.tar"), tiny_config(tmp_path, "a.tar", "train.samples=48", "seed=3")
    snapshot = Snapshot(2, 16, {}, {}, RunState(), before)
    assert start_lines(config, world(2), last_step=6, found=Path("kept/step-000000002"), snapshot=snapshot) == [
        f"{tmp_path}/run: 6 steps of 8 pairs on 2 cpu ranks, resuming after step 2 from kept/step-000000002",
        "changed since the checkpoint: seed: 0 -> 3",
        "changed since the checkpoint: train.samples: 32 -> 48",
        "learning rate: 0.0005, falls by a cosine to 0 at step 6",
    ]


def test_what_is_left_before_its_end():
    saved = "SIGTERM: left after step 7, which is saved; the same command goes on from there"
    assert left_line("SIGTERM", step=7, refused="") == saved
    refused = (
        "SIGTERM: left after step 7, whose state is not saved (why): the same command goes on from the last good one"
    )
    assert left_line("SIGTERM", step=7, refused="why") == refused


def test_a_summary():
    assert summary_lines("trained 12 steps in 1:35", ROW, run_dir="runs/a", pairs=4096) == [
        "trained 12 steps in 1:35; 49,152 samples seen, 3 masked",
        "learned: loss 2.0801, in-batch accuracy 0.250",
        "checkpoints in runs/a/checkpoints, metrics in runs/a/metrics.jsonl; "
        "curves: tensorboard --logdir runs/a/tensorboard",
    ]


def test_a_summary_counts_one_as_one(tmp_path):
    config = tiny_config(tmp_path, "a.tar", "train.global_batch=1")
    assert (
        ": 1 step of 1 pair on 1 cpu rank," in start_lines(config, world(1), last_step=1, found=None, snapshot=None)[0]
    )
    row = ROW | {"samples": 1, "masked_samples": 0}
    assert summary_lines("done", row, run_dir="a", pairs=1)[0] == "done; 1 sample seen"


def test_a_summary_has_the_evaluations_that_were_made():
    assert summary_lines("done", ROW | VALIDATION, run_dir="a", pairs=8)[1].endswith(
        "accuracy 0.250, validation loss 1.5000"
    )
    learned = summary_lines("done", ROW | VALIDATION | ZEROSHOT, run_dir="a", pairs=8)[1]
    assert learned.endswith(", validation loss 1.5000, zero-shot top-1 0.6100, top-5 0.9000")
