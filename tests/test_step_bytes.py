"""What a step holds beside its chunks: bytes a number of one tower's embeddings, counted by part of the step.

Both towers' float32 embeddings are 8 N D bytes. During the loss their operands come on top (4 N D in halves, 8 N D in
float32), during the second pass nothing: the gradients lie in the memory of the embeddings. Held with 1 % of the slots
masked, so that what leaves these out may not be a copy.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from clipscale.bench.common.memory import begin_part, watched_parts
from clipscale.data.load.replay import Held
from clipscale.loss import contrastive_grads, contrastive_grads_in_place
from clipscale.step import StepPlan, TowerPlan, gradcache, gradcache_step
from clipscale.telemetry.parts import Parts
from clipscale.towers import Tower

SLOTS, WIDTH, CHUNK, TILE = 2000, 1024, 20, 100
CPU = torch.device("cpu")


class Seen(Parts):
    def enter(self, name: str) -> None:
        super().enter(name)
        begin_part(name)


def small_towers():
    """One matrix each: what their chunks hold is next to nothing beside N D."""
    torch.manual_seed(0)
    image = nn.Sequential(nn.Flatten(), nn.Linear(12, WIDTH))
    text = nn.EmbeddingBag(10, WIDTH)
    scale = nn.Parameter(torch.tensor(2.0))
    return SimpleNamespace(
        model=SimpleNamespace(logit_scale=scale),
        logit_scale=lambda: scale.exp().item(),
        image=Tower("image", image, lambda pixels, dtype: pixels.to(dtype) / 255),
        text=Tower("text", text, lambda tokens, dtype: tokens.long()),
    )


def bytes_by_part(precision: str, grads=contrastive_grads_in_place) -> Counter:
    """Most bytes at a time in each part of a step, by N D."""
    towers, generator = small_towers(), torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (SLOTS, 3, 2, 2), dtype=torch.uint8, generator=generator)
    tokens = torch.randint(0, 10, (SLOTS, 4), dtype=torch.int32, generator=generator)
    valid = torch.ones(SLOTS, dtype=torch.bool)
    valid[::100] = False
    step = partial(
        gradcache_step,
        towers,
        Held(images, CHUNK),
        tokens,
        valid,
        plan=StepPlan(TowerPlan(CHUNK), TowerPlan(CHUNK)),
        loss_and_grads=partial(grads, precision=precision, tile=TILE),
        key=1,
        parts=Seen(CPU),
    )
    known = [images, tokens, valid, *towers.image.encoder.parameters(), *towers.text.encoder.parameters()]
    result, peaks = watched_parts(step, CPU, known=known)
    assert result.pairs == SLOTS * 99 // 100
    return Counter({name: peak / (SLOTS * WIDTH) for name, peak in peaks.items()})


SLACK = 0.7  # bytes by N D: statistics, a tile, a chunk


@pytest.mark.parametrize(("precision", "bar"), [("fp32", 16), ("bf16", 12)])
def test_the_loss_and_the_second_pass_hold_what_is_promised(precision, bar):
    found = bytes_by_part(precision)
    assert found["image forward"] <= 4 + SLACK
    assert found["text forward"] <= 8 + SLACK
    assert bar - 1 < found["loss"] <= bar + SLACK
    for name in ("image backward", "text backward"):
        assert 3 < found[name] <= 8 + SLACK


def test_gradients_of_their_own_are_seen():
    found = bytes_by_part("bf16", contrastive_grads)
    assert found["loss"] > 19
    assert found["image backward"] <= 8 + SLACK


def test_copies_of_the_valid_rows_are_seen(monkeypatch):
    monkeypatch.setattr(gradcache, "compact_", lambda values_ND, valid: values_ND[valid])
    assert bytes_by_part("bf16")["loss"] > 15
