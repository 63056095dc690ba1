"""What a training run says, at the start, after a step and at the end: pure functions of what they tell of.

    start_lines(config, world, last_step=400, found=None, snapshot=None)  # ['runs/a: 400 steps of 8 pairs on ...']
    step_line(row, last_step=400, eta_seconds=95)                # 'step 1/400  samples 8  loss 2.0801  ...'
    summary_lines("trained 400 steps in 9:31", row, "runs/a")    # three: what happened, was learned, lies where

A row is one of metrics.jsonl (train.py, `Trainer.step` and `Trainer.run`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clipscale.checkpoint import Snapshot
from clipscale.config import Config
from clipscale.config_load import changed_keys
from clipscale.dist import World
from clipscale.progress import duration


def start_lines(
    config: Config, world: World, *, last_step: int, found: Path | None, snapshot: Snapshot | None
) -> list[str]:
    """What will be trained, from where (the `snapshot` that lies at `found`), and under which changes of the config."""
    line = (
        f"{config.run.dir}: {last_step} steps of {config.train.global_batch} pairs on {world.size} "
        f"{world.device.type} rank{'s' * (world.size > 1)}, "
    )
    if snapshot is None:
        return [line + "from the start"]
    changes = [f"changed since the checkpoint: {change}" for change in changed_keys(snapshot.config, config)]
    return [f"{line}resuming after step {snapshot.step} from {found}", *changes]


def step_line(row: dict[str, Any], *, last_step: int, eta_seconds: float) -> str:
    """One step; evaluations stand at its end."""
    memory_gib = row.get("gpu_memory_bytes", row["memory_bytes"]) / 2**30
    return (
        f"step {row['step']}/{last_step}  samples {row['samples']:,}  loss {row['loss']:.4f}  "
        f"scale {row['logit_scale']:.2f}  grad {row['grad_norm']:.3f}  lr {row['lr']:.2e}  "
        f"{row['samples_per_second']:,.0f} samples/s  data wait {row['data_wait_share']:.0%}  "
        f"memory {memory_gib:.2f} GiB  masked {row['masked_samples']}  eta {duration(eta_seconds)}"
        + "".join(f"  {name} {value:.4f}" for name, value in row.items() if "/" in name)
    )


def summary_lines(what: str, row: dict[str, Any], run_dir: str) -> list[str]:
    """`what` happened, what was learned by the last `row`, and where things lie."""
    folder = Path(run_dir)
    scores = [f"loss {row['loss']:.4f}", f"in-batch accuracy {row['image_accuracy']:.3f}"]
    if "validation/loss" in row:
        scores.append(f"validation loss {row['validation/loss']:.4f}")
    if "zeroshot/top1" in row:
        scores.append(f"zero-shot top-1 {row['zeroshot/top1']:.4f}, top-5 {row['zeroshot/top5']:.4f}")
    return [
        f"{what}; {row['samples']:,} samples seen, {row['masked_samples']} masked",
        "learned: " + ", ".join(scores),
        f"checkpoints in {folder / 'checkpoints'}, metrics in {folder / 'metrics.jsonl'}; "
        f"curves: tensorboard --logdir {folder / 'tensorboard'}",
    ]
