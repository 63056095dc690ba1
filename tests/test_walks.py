"""Captions by length: cut at their end the text tower gives what it gives at full length, in every position."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.model import CLIPTextCfg, _build_text_tower
from test_gradcache import gradients, worst_error

from clipscale.config import Model
from clipscale.data.load.replay import Held
from clipscale.loss import contrastive_grads
from clipscale.step import GraphCost, StepPlan, TowerPlan, gradcache_step
from clipscale.step.walks import Captions
from clipscale.towers import build_towers
from clipscale.towers.captions import CaptionCut

CONTEXT, END = 77, 49407
VISION = {"image_size": 16, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16}
TEXT = {"context_length": CONTEXT, "width": 64, "heads": 4, "layers": 3}


def make_towers(dtype=torch.float32, **text):
    towers = build_towers(Model(embed_dim=16, vision=VISION, text=TEXT | text), seed=3)
    towers.model.to(dtype).train()
    return towers


def make_captions(n: int, seed: int = 0, longest: int = CONTEXT) -> torch.Tensor:
    """Token ids as CLIP's tokenizer pads them, of alt-text lengths: most are short, some fill the context."""
    generator = torch.Generator().manual_seed(seed)
    lengths = (torch.randn(n, generator=generator).mul(0.7).exp() * 12).long().clamp(3, longest)
    lengths[0] = longest
    tokens = torch.randint(1, 49000, (n, CONTEXT), generator=generator, dtype=torch.int32)
    places = torch.arange(CONTEXT)
    tokens[places >= lengths[:, None]] = 0
    tokens[torch.arange(n), lengths - 1] = END
    tokens[:, 0] = 49406
    return tokens


def embed(towers, walk: Captions) -> torch.Tensor:
    out = torch.full((len(walk), 16), torch.nan, dtype=next(towers.model.parameters()).dtype)
    with torch.no_grad():
        for chunk in walk.first(torch.device("cpu")):
            out[chunk.slots] = towers.text(chunk.inputs)[: chunk.size]
    return out


def full_length(towers, tokens: torch.Tensor, chunk: int) -> torch.Tensor:
    return embed(towers, Captions(tokens, TowerPlan(chunk), None))


def by_length(towers, tokens: torch.Tensor, chunk: int, **planned) -> Captions:
    return Captions(tokens, TowerPlan(chunk, **planned), towers.text.cut.lengths(tokens))


@pytest.mark.parametrize(("dtype", "bar"), [(torch.float32, 5e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize("pool", ["argmax", "eos"])
@pytest.mark.parametrize("chunk", [8, 5, 64])
def test_embeddings_are_those_of_the_full_length(dtype, bar, pool, chunk):
    towers = make_towers(dtype, pool_type=pool, eos_id=END)
    tokens = make_captions(150)
    found = embed(towers, by_length(towers, tokens, chunk))
    assert (found - full_length(towers, tokens, 8)).abs().max() <= bar


def test_with_the_rounding_they_are_the_same_bits():
    towers, tokens = make_towers(), make_captions(160)
    assert torch.equal(embed(towers, by_length(towers, tokens, 8)), full_length(towers, tokens, 8))


def test_a_cut_before_the_end_is_seen():
    towers, tokens = make_towers(torch.float64), make_captions(64)
    early = (towers.text.cut.lengths(tokens) // 16 * 16).clamp(min=16)
    found = embed(towers, Captions(tokens, TowerPlan(8), early))
    assert (found - full_length(towers, tokens, 8)).abs().max() > 1e-3


def test_a_causal_mask_is_needed():
    assert make_towers(no_causal_mask=True).text.cut is None


@pytest.mark.parametrize("kept", [0, 2000, 10**9])
@pytest.mark.parametrize("wide", [1, 3])
def test_every_caption_goes_through_once_in_each_pass(kept, wide):
    """And the chunks are of at most so many tokens, in few shapes."""
    tokens, chunk = make_captions(1000), 16
    lengths = make_towers().text.cut.lengths(tokens)
    cost = GraphCost(token=1.0)
    walk = Captions(tokens, TowerPlan(chunk, chunk * wide, keep_bytes=kept, cost=cost), lengths)
    first, again = list(walk.first(torch.device("cpu"))), list(walk.again(torch.device("cpu")))
    assert torch.equal(torch.cat([one.slots for one in first]).sort().values, torch.arange(1000))
    once = [one for one in first if one.kept]
    assert sum(one.size for one in once) == walk.kept
    slots = torch.cat([one.slots for one in [*once, *again]])
    assert torch.equal(slots.sort().values, torch.arange(1000))
    for one in first:
        rows, length = one.inputs.shape
        assert length % 16 == 0 or length == CONTEXT
        assert rows % 8 == 0 or length == CONTEXT
        assert rows * length <= chunk * CONTEXT * (1 if one.kept else wide)
        assert (lengths[one.slots] <= length).all()
        assert (lengths[one.slots] > length - 16).all()
        assert torch.equal(one.inputs[: one.size], tokens[one.slots, :length])
    held = sum(one.inputs.numel() for one in once)
    assert held <= kept
    assert kept < 10**9 or walk.kept == 1000
    assert len({tuple(one.inputs.shape) for one in [*once, *again]}) <= 2 * 5


def test_the_step_by_length_has_the_gradients_of_the_step_at_full_length():
    towers, tokens = make_towers(torch.float64), make_captions(40)
    images = torch.randint(0, 256, (40, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    valid = torch.ones(40, dtype=torch.bool)
    valid[[0, 3, 39]] = False
    results, found = [], []
    cost = GraphCost(sample=1.0)
    for kept, cut in ((0, None), (0, towers.text.cut), (10, towers.text.cut)):
        towers.text.cut = cut
        towers.model.zero_grad()
        plan = StepPlan(TowerPlan(7), TowerPlan(8, keep_bytes=kept, cost=cost))
        step = partial(contrastive_grads, tile=5)
        results.append(gradcache_step(towers, Held(images, 7), tokens, valid, plan=plan, loss_and_grads=step, key=1))
        found.append(gradients(towers))
    assert results[0].tokens_per_caption == CONTEXT
    assert results[1].tokens_per_caption < 40
    for result, grads in zip(results[1:], found[1:], strict=True):
        assert result.loss == pytest.approx(results[0].loss, rel=1e-12)
        assert worst_error(grads, found[0]) < 1e-10


def test_which_of_open_clips_towers_can_be_cut():
    """92 of 144: those of its own text transformer that are causal and pool at the end of the text. Each is built with
    its own settings, but small."""
    cut = {"argmax": 0, "eos": 0}
    for path in Path(open_clip.__file__).with_name("model_configs").glob("*.json"):  # other tests may add models
        settings = json.loads(path.read_text())["text_cfg"]
        if settings.get("hf_model_name"):
            continue
        small = CLIPTextCfg(**settings | {"width": 8, "heads": 2, "layers": 1, "vocab_size": 32})
        tower = _build_text_tower(8, small)
        if CaptionCut.of(tower) is not None:
            cut[tower.pool_type] += 1
    assert cut == {"argmax": 85, "eos": 7}
