"""clipscale/train_report.py: the lines of a run, from the rows and configs that they tell of."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny import tiny_config

from clipscale.checkpoint import RunState, Snapshot
from clipscale.dist import World
from clipscale.train_report import start_lines, step_line, summary_lines

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
    "step 12/400  samples 49,152  loss 2.0801  scale 14.29  grad 0.123  lr 5.00e-04  1,234 samples/s  data wait 13%  "
    "memory 1.50 GiB  masked 3  eta 1:06:40"
)
VALIDATION = {"validation/loss": 1.5, "validation/bad_pictures": 0}
ZEROSHOT = {"zeroshot/top1": 0.61, "zeroshot/top5": 0.9}


def world(size: int) -> World:
    return World(0, size, 0, torch.device("cpu"))


def test_a_step():
    assert step_line(ROW, last_step=400, eta_seconds=4000) == STEP


def test_evaluations_stand_at_the_end_of_a_step():
    found = step_line(ROW | VALIDATION | ZEROSHOT, last_step=400, eta_seconds=4000)
    assert found == STEP + (
        "  validation/loss 1.5000  validation/bad_pictures 0.0000  zeroshot/top1 0.6100  zeroshot/top5 0.9000"
    )


def test_on_a_gpu_its_memory_is_told():
    assert "memory 40.00 GiB" in step_line(ROW | {"gpu_memory_bytes": 40 * 2**30}, last_step=400, eta_seconds=1)


def test_a_start(tmp_path):
    config = tiny_config(tmp_path, "a.tar")
    lines = start_lines(config, world(1), last_step=4, found=None, snapshot=None)
    assert lines == [f"{tmp_path}/run: 4 steps of 8 pairs on 1 cpu rank, from the start"]


def test_a_resume_tells_from_where_and_what_has_changed(tmp_path):
    before, config = tiny_config(tmp_path, "a.tar"), tiny_config(tmp_path, "a.tar", "train.samples=48", "seed=3")
    snapshot = Snapshot(2, 16, {}, {}, RunState(), before)
    assert start_lines(config, world(2), last_step=6, found=Path("kept/step-000000002"), snapshot=snapshot) == [
        f"{tmp_path}/run: 6 steps of 8 pairs on 2 cpu ranks, resuming after step 2 from kept/step-000000002",
        "changed since the checkpoint: seed: 0 -> 3",
        "changed since the checkpoint: train.samples: 32 -> 48",
    ]


def test_a_summary():
    assert summary_lines("trained 12 steps in 1:35", ROW, "runs/a") == [
        "trained 12 steps in 1:35; 49,152 samples seen, 3 masked",
        "learned: loss 2.0801, in-batch accuracy 0.250",
        "checkpoints in runs/a/checkpoints, metrics in runs/a/metrics.jsonl; "
        "curves: tensorboard --logdir runs/a/tensorboard",
    ]


def test_a_summary_has_the_evaluations_that_were_made():
    assert summary_lines("done", ROW | VALIDATION, "a")[1].endswith("accuracy 0.250, validation loss 1.5000")
    learned = summary_lines("done", ROW | VALIDATION | ZEROSHOT, "a")[1]
    assert learned.endswith(", validation loss 1.5000, zero-shot top-1 0.6100, top-5 0.9000")
