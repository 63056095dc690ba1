"""What a training run says, at the start, after a step and at the end: pure functions of what they tell of.

    start_lines(config, world, last_step=400, found=None, snapshot=None)  # ['runs/a: 400 steps of 8 pairs on ...']
    step_row(7, 56, result, {"lr": 1e-3, ...}, masked=0)         # {'step': 7, 'samples': 56, 'loss': 2.0801, ...}
    step_line(row, last_step=400, eta_seconds=95)                # 'step   1/400  samples 8  loss 2.0801  ...'
    evaluation_lines(row, step=400, last_step=400)               # ['step 400/400  zero-shot: top-1 0.6100, ...']
    left_line("SIGTERM", step=7, refused="")                     # 'SIGTERM: left after step 7, which is saved; ...'
    summary_lines("trained 400 steps in 9:31", row, ...)         # three: what happened, was learned, lies where

A row is one of metrics.jsonl (trainer.py, `Trainer.step` and `Trainer.run`).
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from clipscale.checkpoint import Snapshot
from clipscale.config import AVERAGE_PREFIX, Config
from clipscale.config.load import changed_keys
from clipscale.dist import World
from clipscale.progress import time_left
from clipscale.schedule import schedule_lines
from clipscale.step import StepResult
from clipscale.telemetry.parts import from_row
from clipscale.words import counted, short

_COLUMNS, _GAP = 120, "  "  # of a step's line
_BETWEEN_STEPS = ("evaluation", "checkpoint")  # parts that have lines of their own, or none
_SHORT = {"communication": "comm", "optimizer": "optim"}
_MUCH_WAITING = 0.1  # share of a step's time: from here on, waiting for data comes before other figures


def start_lines(
    config: Config, world: World, *, last_step: int, found: Path | None, snapshot: Snapshot | None
) -> list[str]:
    """What will be trained, from where (the `snapshot` that lies at `found`), and under which changes of the config."""
    line = (
        f"{config.run.dir}: {counted(last_step, 'step')} of {counted(config.train.global_batch, 'pair')} on "
        f"{counted(world.size, f'{world.device.type} rank')}, "
    )
    promises = ["train.deterministic=true: the same steps give the same bits"] if config.train.deterministic else []
    if snapshot is None:
        weights = "" if config.model.init is None else f", with the weights of {config.model.init}"
        return [f"{line}from the start{weights}", *schedule_lines(config), *promises]
    changes = [f"changed since the checkpoint: {change}" for change in changed_keys(snapshot.config, config)]
    resuming = f"{line}resuming after step {snapshot.step} from {found}"
    return [resuming, *changes, *schedule_lines(config), *promises]


def step_row(
    step: int, samples: int, result: StepResult, learned: dict[str, float], *, masked: int
) -> dict[str, float]:
    """What a step's row of metrics begins with.

    Args:
        samples: positions of the run's order that are behind it.
        learned: what the optimizer says of it, by column.
        masked: samples of the run so far.
    """
    return {
        "step": step,
        "samples": samples,
        "loss": result.loss,
        **learned,
        "image_accuracy": result.image_accuracy,
        "text_accuracy": result.text_accuracy,
        "tokens_per_caption": result.tokens_per_caption,
        "kept_share": result.kept_share,
        "masked_samples": masked,
    }


def step_line(row: dict[str, Any], *, last_step: int, eta_seconds: float) -> str:
    """One step, in at most 120 columns: what does not fit beside the rest stays out, the least needed first.

    Samples seen and rate in thousands (k), millions (M) and billions (G); memory in GiB, the GPU's where there is one.
    """
    where, held = ("gpu", row["gpu_memory_bytes"]) if "gpu_memory_bytes" in row else ("host", row["memory_bytes"])
    masked, wait = row["masked_samples"], row["data_wait_share"]
    parts = [  # each with its rank among those that have to fit
        (0, _step(row["step"], last_step)),
        (0, f"samples {short(row['samples'], digits=4)}"),
        (0, f"loss {short(row['loss'], digits=5)}"),
        (0, f"scale {short(row['logit_scale'], digits=4)}"),
        (0, f"lr {row['lr']:.2e}"),
        (0, f"{short(row['samples_per_second'])}/s"),
        (1, f"{where} {short(held / 2**30)}G"),
        (0, f"eta {time_left(eta_seconds)}"),
        (2, f"masked {short(masked)}" if masked else ""),
        (3, f"clamped {short(clamped)}" if (clamped := row.get("logit_scale_clamped", 0)) else ""),
        (5, f"grad {row['grad_norm']:.3f}"),
        (3 if wait >= _MUCH_WAITING else 6, f"wait {wait:.0%}"),
        (4, _largest_parts(row)),
    ]
    taken, columns = set(), -len(_GAP)
    for place in sorted(range(len(parts)), key=lambda place: parts[place][0]):
        more = len(_GAP) + len(parts[place][1])
        if parts[place][1] and columns + more <= _COLUMNS:
            taken.add(place)
            columns += more
    return _GAP.join(text for place, (_, text) in enumerate(parts) if place in taken)


def _largest_parts(row: dict[str, Any]) -> str:
    """'image 61% text 22%': the two parts that took most of the steps' time, both passes of a tower as one.

    Without the waiting for data, which has a figure of its own. Empty for a row without parts.
    """
    shares: Counter[str] = Counter()
    for name, seconds in from_row(row).items():
        if name not in _BETWEEN_STEPS:
            shares[name.removesuffix(" forward").removesuffix(" backward")] += seconds
    total = shares.total()
    del shares["data wait"]
    largest = shares.most_common(2) if total else []
    return " ".join(f"{_SHORT.get(name, name)} {seconds / total:.0%}" for name, seconds in largest)


def evaluation_lines(row: dict[str, float], *, step: int, last_step: int) -> list[str]:
    """One for each evaluation in `row`, which are the metrics of all that were made at this step."""
    lines = []
    for name in _evaluated(row, "image_accuracy"):
        accuracy = in_batch_accuracy(row, f"{name}/", pairs=row[f"{name}/pairs"])
        lines.append(f"{name}: loss {row[f'{name}/loss']:.4f}, {accuracy}{_bad(row, f'{name}/')}")
    for name in _evaluated(row, "top1"):
        scores = f"top-1 {row[f'{name}/top1']:.4f}, top-5 {row[f'{name}/top5']:.4f}"
        lines.append(f"{_title(name)}: {scores}, {_seen(row, f'{name}/')}{_bad(row, f'{name}/')}")
    for name in _evaluated(row, "image_to_text_r1"):
        of = f"{counted(row[f'{name}/pictures'], 'picture')}, {counted(row[f'{name}/captions'], 'caption')}"
        lines.append(f"{name}: {_recalls(row, name)}, {of}{_bad(row, f'{name}/')}")
    return [f"{_step(step, last_step)}  {line}" for line in lines]


def in_batch_accuracy(row: dict[str, float], prefix: str = "", *, pairs: int) -> str:
    """The share of pictures whose own caption is the nearest of its batch; not where captions that repeat decide it.

    Equal captions tie, and a tie is a miss: with ten captions in all no picture could be right.
    """
    figure, repeats = f"in-batch accuracy {row[prefix + 'image_accuracy']:.3f}", row.get(f"{prefix}repeated_captions")
    if not repeats:
        return figure
    share = f"{repeats / pairs:.1%} of captions repeat"
    return f"no in-batch accuracy ({share}: ties)" if repeats >= pairs / 2 else f"{figure} ({share}: misses)"


def left_line(why: str, *, step: int, refused: str) -> str:
    """Of a run that is told to leave. `refused`: why the state after its last step is no checkpoint; "" where it is."""
    state = "which is saved; the same command goes on from there"
    if refused:
        state = f"whose state is not saved ({refused}): the same command goes on from the last good one"
    return f"{why}: left after step {step}, {state}"


def summary_lines(what: str, row: dict[str, Any], *, run_dir: str, pairs: int) -> list[str]:
    """`what` happened, what was learned by the last `row` (a step of so many pairs), and where things lie."""
    folder = Path(run_dir)
    scores = [f"loss {row['loss']:.4f}", in_batch_accuracy(row, pairs=pairs)]
    scores += [f"{name} loss {row[f'{name}/loss']:.4f}" for name in _evaluated(row, "image_accuracy")]
    scores += [f"{name} failed" for name in _evaluated(row, "failed")]
    for name in _evaluated(row, "top1"):
        scores.append(f"{_title(name)} top-1 {row[f'{name}/top1']:.4f}, top-5 {row[f'{name}/top5']:.4f}")
    scores += [f"{name} {_recalls(row, name)}" for name in _evaluated(row, "image_to_text_r1")]
    masked = f", {row['masked_samples']:,} masked" if row["masked_samples"] else ""
    return [
        f"{what}; {counted(row['samples'], 'sample')} seen{masked}",
        "learned: " + ", ".join(scores),
        f"checkpoints in {folder / 'checkpoints'}, metrics in {folder / 'metrics.jsonl'}; "
        f"curves: tensorboard --logdir {folder / 'tensorboard'}",
    ]


def _step(step: int, last_step: int) -> str:
    return f"step {step:>{len(str(last_step))}}/{last_step}"


def _evaluated(row: dict[str, float], column: str) -> list[str]:
    """Names of the evaluations that have this column in the row."""
    return [key.removesuffix(f"/{column}") for key in row if key.endswith(f"/{column}")]


def _title(name: str) -> str:
    average, name = name.startswith(AVERAGE_PREFIX), name.removeprefix(AVERAGE_PREFIX)
    return "ema " * average + ("zero-shot" if name == "zeroshot" else f"zero-shot {name}")


def _recalls(row: dict[str, float], name: str) -> str:
    """Recall at 1 and 5: 'image to text 0.583 0.812, text to image 0.421 0.702'"""
    ways = ("image_to_text", "text_to_image")
    return ", ".join(
        f"{way.replace('_', ' ')} {row[f'{name}/{way}_r1']:.3f} {row[f'{name}/{way}_r5']:.3f}" for way in ways
    )


def _seen(row: dict[str, float], prefix: str) -> str:
    """'10,000 pictures of 10 of 10 classes, 3 passed over'"""
    classes = f"{row[f'{prefix}classes_seen']:,} of {counted(row[f'{prefix}classes'], 'class', 'classes')}"
    passed = row[f"{prefix}passed_over"]
    return f"{counted(row[f'{prefix}pictures'], 'picture')} of {classes}{f', {passed:,} passed over' if passed else ''}"


def _bad(row: dict[str, float], prefix: str) -> str:
    bad = row[f"{prefix}bad_pictures"]
    return f", {counted(bad, 'bad picture')}" if bad else ""
