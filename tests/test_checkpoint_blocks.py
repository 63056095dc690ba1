"""clipscale/towers/blocks.py: blocks whose input alone is kept give the same bits, in less memory."""

from __future__ import annotations

from functools import partial
from math import inf

import pytest
import torch
from test_gradcache import gradients, make_batch, make_plan
from test_planning import ALONE, captions, pictures
from tiny import tiny_config
from torch import nn
from torch.utils.checkpoint import CheckpointError, noop_context_fn

from clipscale.bench.common.memory import watched
from clipscale.config import Model, TowerSettings
from clipscale.data.load.replay import Held
from clipscale.errors import UserError
from clipscale.loss import contrastive_grads
from clipscale.step import gradcache_step
from clipscale.step.costs import graph_costs, saved_bytes
from clipscale.step.planning import plan_record, plan_step
from clipscale.towers import Towers, blocks, build_towers
from clipscale.towers.blocks import blocks_of, checkpoint_blocks, checkpointed, whole_blocks

ON = TowerSettings(checkpoint_blocks=True)
BF16 = torch.bfloat16
TEXT = {"context_length": 8, "width": 32, "heads": 2, "layers": 3}
VISIONS = {
    "open_clip": {"image_size": 16, "patch_size": 4, "width": 32, "layers": 3, "head_width": 16, "patch_dropout": 0.3},
    "timm": {"image_size": 16, "timm_model_name": "test_vit", "timm_drop_path": 0.4, "patch_dropout": 0.3},
    "convolutions": {"image_size": 32, "timm_model_name": "test_convnext", "timm_drop_path": 0.4},
}


def towers_of(settings: TowerSettings, kind: str = "open_clip", *, autocast=None, dropout=False) -> Towers:
    model = Model(embed_dim=16, vision=VISIONS[kind], text=TEXT)
    towers = build_towers(model, settings, seed=3, autocast=autocast)
    for block in towers.model.text.transformer.resblocks if dropout else ():
        block.mlp.add_module("drop", nn.Dropout(0.2))
    towers.model.train()
    return towers


def step_gradients(towers: Towers, *, by_chunk: bool = False, kept: float = 0, seed: int = 0):
    """Of a step of 12 pairs in chunks of 4 and 3, some of them masked."""
    images, tokens = make_batch(12, seed)
    if towers.image_size != 16:
        images = images.repeat_interleave(2, 2).repeat_interleave(2, 3)
    result = gradcache_step(
        towers,
        Held(images, 4),
        tokens,
        torch.arange(12) % 5 > 0,
        plan=make_plan(4, 3, kept=kept, by_chunk=by_chunk),
        loss_and_grads=partial(contrastive_grads, precision="auto", tile=5),
        key=77,
        positions=torch.arange(100, 112),
    )
    return result.loss, gradients(towers)


@pytest.mark.parametrize("kept", [0, 4, inf], ids=["none kept", "some kept", "all kept"])
@pytest.mark.parametrize(
    ("kind", "autocast", "dropout"),
    [*((kind, None, False) for kind in VISIONS), ("timm", BF16, False), ("open_clip", None, True)],
    ids=["open_clip", "timm", "convolutions", "timm in bf16", "dropout by chunk"],
)
def test_the_same_bits(kind, autocast, dropout, kept):
    make = partial(towers_of, kind=kind, autocast=autocast, dropout=dropout)
    (loss, found), (wanted_loss, wanted) = (
        step_gradients(make(way), by_chunk=dropout, kept=kept) for way in (ON, TowerSettings())
    )
    assert loss == wanted_loss
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_draws_that_are_not_opened_again_are_seen(monkeypatch):
    """Outside of `drawing` drop path draws from torch's generator: other paths, other gradients."""
    wanted = step_gradients(towers_of(TowerSettings(), "timm"))[1]
    monkeypatch.setattr(blocks, "redrawing", noop_context_fn)
    try:
        found = step_gradients(towers_of(ON, "timm"))[1]
    except CheckpointError:
        return  # other tensors were saved: torch itself has seen it
    assert not all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_graph_may_be_gone_through_twice():
    towers, inputs = towers_of(ON, "timm"), make_batch(6)[0]
    embeddings = towers.image(inputs, torch.arange(6))
    for _ in range(2):
        embeddings.sum().backward(retain_graph=True)
        found = gradients(towers)
        towers.model.zero_grad()
        towers.image(inputs[:2], torch.arange(2))  # another pass in between
    plain = towers_of(TowerSettings(), "timm")
    plain.image(inputs, torch.arange(6)).sum().backward()
    assert all(torch.equal(found[name], grad) for name, grad in gradients(plain).items())


@pytest.mark.parametrize("kind", VISIONS)
def test_modules_and_evaluations_are_the_same(kind):
    ours, theirs = towers_of(ON, kind), towers_of(TowerSettings(), kind)
    assert [*ours.model.state_dict()] == [*theirs.model.state_dict()]
    assert len(checkpointed(ours.model.visual)) == len(blocks_of(theirs.model.visual)) > 1
    assert checkpointed(theirs.model.visual) == []
    for towers in (ours, theirs):
        towers.model.eval()
    side = VISIONS[kind]["image_size"]
    images = torch.randint(0, 256, (3, 3, side, side), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(ours.image(images), theirs.image(images))


def test_blocks_that_are_not_known():
    with pytest.raises(UserError, match=r"^towers\.checkpoint_blocks=true: the blocks of Linear are not known; set it"):
        checkpoint_blocks(nn.Linear(2, 2))


# --- memory -----------------------------------------------------------------------------------------------------------


def large(settings: TowerSettings, autocast=None) -> Towers:
    vision = {"image_size": 32, "patch_size": 4, "width": 32, "layers": 6, "head_width": 16}
    text = {"context_length": 77, "width": 32, "heads": 2, "layers": 6}
    towers = build_towers(Model(embed_dim=16, vision=vision, text=text), settings, autocast=autocast)
    towers.model.train()
    return towers


@pytest.mark.parametrize("autocast", [None, BF16], ids=["fp32", "bf16"])
def test_bytes_of_a_graph(autocast):
    """Of twelve and more tensors of a block one is left; what is counted is what a pass takes at its peak."""
    on, off = large(ON, autocast), large(TowerSettings(), autocast)
    for towers, other, inputs in ((on.image, off.image, pictures(8)), (on.text, off.text, captions(8, 77))):
        assert saved_bytes(towers, inputs) < saved_bytes(other, inputs) / 6
        with whole_blocks(towers.encoder):
            assert saved_bytes(towers, inputs) == saved_bytes(other, inputs)

    def both(tower, inputs):
        with tower.shared_casts():
            tower(inputs).sum().backward()

    peaks = {}
    for towers in (on, off):
        cost, _ = graph_costs(towers)
        gradients_bytes = sum(4 * parameter.numel() for parameter in towers.model.visual.parameters())
        casts = gradients_bytes / 2 if autocast else 0
        known = (*towers.model.parameters(), *towers.model.buffers())
        peak = watched(partial(both, towers.image, pictures(24)), known=known)[1] - gradients_bytes - casts
        assert 0.6 * peak < cost.peak(24) < 1.3 * peak
        peaks[towers is on] = peak
    assert peaks[True] < peaks[False] / 2


def test_a_plan_keeps_more_and_is_made_anew(tmp_path):
    words = "train.global_batch=4096", "gradcache.image_chunk=8", "gradcache.keep_bytes=50000000"
    plans, records = [], []
    for settings, word in ((TowerSettings(), "false"), (ON, "true")):
        config = tiny_config(tmp_path, "x.tar", *words, f"towers.checkpoint_blocks={word}")
        for record in (None, *records):
            plans.append(plan_step(config, large(settings), ALONE, record))
        records.append(plan_record(plans[-1], config, ALONE))
    off, on, again = (plan.image for plan in plans)
    assert on.kept_samples(4096) > 4 * off.kept_samples(4096) > 0
    assert again == on
    assert off.cost.block == 0 < on.cost.block
