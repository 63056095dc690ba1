"""Why is my loss stuck? What a run's latest rows of metrics.jsonl show, what it means, what to try. No torch.

    for line in diagnose(rows, config):
        print(line)              # 'loss 8.3177 is ln(4096) = 8.3178, that of guessing: ...'

Every line holds the figure, what it means and what to try. No line: nothing conspicuous.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from clipscale.config import Config
from clipscale.guard.health import has_learned, is_chance, is_dead_gradient, is_dead_scale
from clipscale.schedule import learning_rate
from clipscale.upstream.open_clip_files import logit_scale_init
from clipscale.words import counted

_RECENT = 50  # rows that are looked at together
_NEAR_CHANCE = 0.02  # of ln(B): so little below it is next to nothing
_FLAT = 0.002  # of the loss: less change over the recent rows is none
_MUCH = 0.05  # share of skipped steps, of clipped ones' excess, or of repeated captions, that is worth a line


def diagnose(rows: Sequence[dict[str, Any]], config: Config) -> list[str]:
    """Args:
    rows: of metrics.jsonl, in order; the last ones count. A number that was not finite is None there.
    """
    recent = list(rows)[-_RECENT:]
    if not recent:
        return []
    found = [_skipped(recent, config)]
    made = [row for row in recent if row["loss"] is not None and row["grad_norm"] is not None]
    if made:
        pairs = config.train.global_batch
        checks = (_loss, _flat, _scale, _gradient, _accuracy, _rate, _repeats)
        found += [check(made, config, pairs) for check in checks]
    return [line for line in found if line]


def _skipped(rows: list[dict[str, Any]], config: Config) -> str:
    count = sum(row["loss"] is None or row["grad_norm"] is None for row in rows)
    if count < max(1, _MUCH * len(rows)):
        return ""
    return (
        f"{count} of the last {len(rows)} steps were skipped, their loss or gradient was not finite: the run is "
        "about to diverge, or some samples break it (faults.jsonl names them); lower optim.lr, lengthen "
        "optim.warmup_steps, or use train.precision=bf16"
    )


def _loss(rows: list[dict[str, Any]], config: Config, pairs: int) -> str:
    """Against that of guessing."""
    loss, chance = fmean(row["loss"] for row in rows), math.log(pairs)
    if pairs < 2 or loss < (1 - _NEAR_CHANCE) * chance:
        return ""
    against = f"loss {loss:.4f} against ln({pairs}) = {chance:.4f}, that of guessing"
    if rows[-1]["samples"] <= 2 * config.warmup_samples or rows[-1]["step"] <= _RECENT:
        return f"{against}: nothing is learned yet, as in every run that has only begun; wait for the warm-up to end"
    if is_chance(loss, pairs):
        return (
            f"{against}: the embeddings of a side are all alike (collapse); go back to a checkpoint from before by "
            "resume=<its path> and lower optim.lr, or lengthen optim.warmup_steps"
        )
    return (
        f"{against}: almost nothing is learned; look whether pictures and captions belong together (clipscale shards "
        "inspect), and try another optim.lr"
    )


def _flat(rows: list[dict[str, Any]], config: Config, pairs: int) -> str:
    half = len(rows) // 2
    before, after = (fmean(row["loss"] for row in part) for part in (rows[:half] or rows, rows[half:]))
    if len(rows) < _RECENT or not has_learned(after, pairs) or before - after > _FLAT * before:
        return ""
    return (
        f"loss {before:.4f} and then {after:.4f} over the last {len(rows)} steps: it goes down no more; within the "
        "noise of a large batch that may be patience (look at the curve), near the end it is the schedule; otherwise "
        "try another optim.lr, more data, or a larger train.global_batch"
    )


def _scale(rows: list[dict[str, Any]], config: Config, pairs: int) -> str:
    scale, model = rows[-1]["logit_scale"], config.model
    began = logit_scale_init(model)
    if is_dead_scale(scale, began):
        return (
            f"logit scale {scale:.3g}, near 0 (it began at {began:.3g}): no pair can be told from "
            "another; go back to a checkpoint from before and lower optim.lr"
        )
    if scale >= 0.999 * model.logit_scale_max:
        held = counted(rows[-1].get("logit_scale_clamped", 0), "step")
        return (
            f"logit scale {scale:.4g} is at its bound (model.logit_scale_max), where it was held in {held} so far: "
            "usual late in a long run; early on it tells of captions that repeat or of an optim.lr that is too high"
        )
    if scale < 0.5 * began:
        return (
            f"logit scale {scale:.3g}, down from {began:.3g}: the model gives up telling pairs apart; "
            "lower optim.lr, or look whether pictures and captions belong together"
        )
    return ""


def _gradient(rows: list[dict[str, Any]], config: Config, pairs: int) -> str:
    norms, limit = [row["grad_norm"] for row in rows], config.train.grad_clip_norm
    if is_dead_gradient(max(norms)):
        return (
            "gradient norm 0: nothing is learned any more; the embeddings have collapsed, or every tower is locked; go "
            "back to a checkpoint from before and lower optim.lr"
        )
    if limit is not None and min(norms) > 10 * limit:
        return (
            f"gradient norms of {min(norms):.3g} to {max(norms):.3g} are clipped to {limit:g} at every step "
            "(train.grad_clip_norm): the direction is kept, the length says that the run is not stable; lower optim.lr "
            "or lengthen optim.warmup_steps"
        )
    return ""


def _accuracy(rows: list[dict[str, Any]], config: Config, pairs: int) -> str:
    """Of a loss that is low where the pairs are not found."""
    images, texts = (fmean(row[f"{side}_accuracy"] for row in rows) for side in ("image", "text"))
    low, high = sorted((images, texts))
    if high > 0.05 and low < 0.3 * high:
        return (
            f"in-batch accuracy {images:.3f} of pictures and {texts:.3f} of captions: one side finds its pairs and the "
            "other does not; many samples that are alike on one side (the same picture, the same caption) do that"
        )
    return ""


def _rate(rows: list[dict[str, Any]], config: Config, pairs: int) -> str:
    row = rows[-1]
    if row["samples"] < config.warmup_samples:
        return (
            f"lr {row['lr']:.2e} is still rising to {config.peak_lr:g}: "
            f"{row['samples']:,} of {config.warmup_samples:,} samples of warm-up are seen; little is learned before"
        )
    if row["lr"] < 0.01 * config.peak_lr and row["samples"] < config.train.samples:
        return (
            f"lr {row['lr']:.2e} is next to nothing beside its highest, {config.peak_lr:g}: the schedule ends with "
            f"train.samples={config.train.samples:,}; what is not learned by now will not be"
        )
    rate = learning_rate(config, max(0, row["samples"] - config.train.global_batch))
    if config.warmup_samples == 0 and rate > 1e-4 and not has_learned(fmean(each["loss"] for each in rows), pairs):
        return f"lr began at {config.peak_lr:g} without a warm-up: set optim.warmup_steps (500 to 2000)"
    return ""


def _repeats(rows: list[dict[str, Any]], config: Config, pairs: int) -> str:
    """Rows of logged steps alone have them."""
    repeats = [row["repeated_captions"] / pairs for row in rows if "repeated_captions" in row]
    if not repeats or (share := fmean(repeats)) < _MUCH:
        return ""
    return (
        f"{share:.1%} of a batch's captions repeat: each makes pairs each other's false negatives, and the loss cannot "
        "go below what they cost; use captions that tell samples apart, more data, or a smaller train.global_batch"
    )
