"""The plan of a run's steps: what graphs hold, counted; what is kept; the same on every rank, and at a resume."""

from __future__ import annotations

import dataclasses
import json
import threading
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from test_walks import VISION, make_captions
from tiny import tiny_config

from clipscale.bench.common.memory import watched
from clipscale.config import Model
from clipscale.dist import World
from clipscale.step import GraphCost, StepPlan, TowerPlan, planning
from clipscale.step.costs import graph_costs, saved_bytes
from clipscale.step.planning import chunks_of, plan_line, plan_record, plan_step
from clipscale.towers import Towers, build_towers

CONTEXT = 77
ALONE = World(0, 1, 0, torch.device("cpu"))
MODEL = Model(
    embed_dim=16,
    vision=VISION | {"image_size": 32, "layers": 2},
    text={"context_length": CONTEXT, "width": 32, "heads": 2, "layers": 2},
)
BF16 = torch.bfloat16


@cache
def towers_of(autocast=None):
    towers = build_towers(MODEL, autocast=autocast, seed=3)
    towers.model.train()
    return towers


def pictures(samples: int) -> torch.Tensor:
    return torch.randint(0, 256, (samples, 3, 32, 32), dtype=torch.uint8)


def captions(samples: int, length: int) -> torch.Tensor:
    return torch.randint(1, 1000, (samples, length))


def live_bytes(tower, inputs) -> float:
    """What one more chunk that is kept costs: one is kept, then two, and the peaks are apart by it."""

    def keep(count: int) -> int:
        def embed() -> list[torch.Tensor]:
            with tower.shared_casts():
                return [tower(inputs) for _ in range(count)]

        return watched(embed, known=(inputs, *tower.encoder.state_dict().values()))[1]

    keep(1)  # masks and constants are made once
    return keep(2) - keep(1)


CASES = {
    "pictures": lambda towers: (towers.image, pictures(24)),
    "captions": lambda towers: (towers.text, captions(12, CONTEXT)),
    "short captions": lambda towers: (towers.text, captions(24, 16)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("autocast", [None, BF16], ids=["fp32", "bf16"])
def test_counted_bytes_are_those_that_stay_alive(case, autocast):
    tower, inputs = CASES[case](towers_of(autocast))
    assert saved_bytes(tower, inputs) == pytest.approx(live_bytes(tower, inputs), rel=0.2)


def test_what_graphs_share_is_not_counted():
    """Under autocast a chunk of one caption would else cost a copy of the tower."""
    tower = towers_of(BF16).text
    weights = sum(2 * weight.numel() for weight in tower.encoder.transformer.parameters() if weight.dim() > 1)
    assert saved_bytes(tower, captions(1, 16)) < weights
    with torch.autocast("cpu", BF16, cache_enabled=False):  # casts of its own for every call
        assert live_bytes(tower, captions(1, 16)) > weights


@pytest.mark.parametrize("autocast", [None, BF16], ids=["fp32", "bf16"])
def test_other_sizes_are_foretold(autocast):
    towers = towers_of(autocast)
    image, text = graph_costs(towers)
    assert image.of(24) == pytest.approx(live_bytes(towers.image, pictures(24)), rel=0.25)
    for samples, length in ((20, CONTEXT), (24, 32), (40, 16)):
        wanted = live_bytes(towers.text, captions(samples, length))
        assert text.of(samples, samples * length) == pytest.approx(wanted, rel=0.25), (samples, length)


def test_counting_leaves_no_trace():
    towers, before = towers_of(), torch.get_rng_state()
    graph_costs(towers)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in towers.model.parameters())


# --- what is kept ---------------------------------------------------------------------------------------------------

COST = GraphCost(sample=1000.0), GraphCost(sample=100.0, token=10.0)


@pytest.fixture
def counted_so(monkeypatch):
    """A picture costs 1,000 bytes, a caption 100 and 10 a token; 400,000 bytes are free."""
    monkeypatch.setattr(planning, "graph_costs", lambda towers: COST)
    monkeypatch.setattr(planning, "host_memory", lambda: SimpleNamespace(left=400_000))


def plan(tmp_path, *words, world=ALONE, recorded=None) -> StepPlan:
    config = tiny_config(tmp_path, "x.tar", "train.global_batch=64", "gradcache.image_chunk=8", *words)
    return plan_step(config, towers_of(), world, recorded)


@pytest.mark.parametrize(
    ("keep_bytes", "image", "text"),
    [
        ("0", (0, 0), 0),
        ("20000", (20_000, 16), 4_000),
        ("80000", (80_000, 64), 16_000),
        ("auto", (100_000, 64), 36_000),
    ],
)
def test_pictures_are_kept_first_then_captions(tmp_path, counted_so, keep_bytes, image, text):
    """Of memory that is free a CPU gives a quarter."""
    found = plan(tmp_path, f"gradcache.keep_bytes={keep_bytes}")
    assert (found.image.keep_bytes, found.image.kept_samples(64)) == image
    assert found.text.keep_bytes == text
    assert (found.image.cost, found.text.cost) == (COST if keep_bytes != "0" else (GraphCost(), GraphCost()))


def test_chunks_are_no_larger_than_the_rank(tmp_path, counted_so):
    found = plan(tmp_path, "gradcache.image_chunk=1000", "gradcache.text_chunk=48", "gradcache.forward_chunks=3")
    assert (found.chunks, found.image.wide, found.text.wide) == ((64, 48), 192, 144)


def test_a_plan_comes_back_from_its_record(tmp_path, counted_so, monkeypatch):
    config = tiny_config(tmp_path, "x.tar", "gradcache.keep_bytes=auto")
    made = plan_step(config, towers_of(), ALONE, None)
    record = json.loads(json.dumps(plan_record(made, config, ALONE)))
    monkeypatch.setattr(planning, "host_memory", lambda: SimpleNamespace(left=0))
    monkeypatch.setattr(planning, "graph_costs", None)  # nothing is counted again
    assert plan_step(config, towers_of(), ALONE, record) == made


@pytest.mark.parametrize(
    "word",
    [
        *("gradcache.image_chunk=2", "gradcache.text_chunk=2", "gradcache.forward_chunks=2", "gradcache.keep_bytes=7"),
        *("train.global_batch=16", "train.precision=bf16"),
    ],
)
def test_a_changed_setting_makes_a_new_plan(tmp_path, counted_so, word, monkeypatch):
    config = tiny_config(tmp_path, "x.tar", "gradcache.keep_bytes=auto")
    record = plan_record(plan_step(config, towers_of(), ALONE, None), config, ALONE)
    monkeypatch.setattr(planning, "host_memory", lambda: SimpleNamespace(left=40_000))
    changed = tiny_config(tmp_path, "x.tar", "gradcache.keep_bytes=auto", word)
    assert plan_step(changed, towers_of(), ALONE, record) == plan_step(changed, towers_of(), ALONE, None)
    assert plan_step(config, towers_of(), ALONE, record) != plan_step(changed, towers_of(), ALONE, record)


class Together:
    """Ranks as threads, which gather what each of them brings."""

    def __init__(self, size: int) -> None:
        self.size, self.items, self.barrier = size, [None] * size, threading.Barrier(size, timeout=30)

    def worlds(self) -> list[World]:
        together = self

        class Rank(World):
            def gather(self, item):
                together.items[self.rank] = item
                together.barrier.wait()
                found = list(together.items)
                together.barrier.wait()
                return found

        return [Rank(rank, self.size, rank, torch.device("cpu")) for rank in range(self.size)]


def on_ranks(size: int, work) -> list:
    """`work(world)` of every rank."""
    found = [None] * size

    def run(world: World) -> None:
        found[world.rank] = work(world)

    threads = [threading.Thread(target=run, args=(world,)) for world in Together(size).worlds()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


def test_ranks_with_unequal_memory_make_one_plan(tmp_path, monkeypatch):
    mine = threading.local()

    def work(world: World) -> StepPlan:
        mine.free, mine.cost = ((4_000_000, 500.0), (400_000, 520.0))[world.rank]
        config = tiny_config(
            tmp_path, "x.tar", "train.global_batch=128", "gradcache.image_chunk=8", "gradcache.keep_bytes=auto"
        )
        return plan_step(config, towers_of(), world, None)

    monkeypatch.setattr(planning, "host_memory", lambda: SimpleNamespace(left=mine.free))
    monkeypatch.setattr(planning, "graph_costs", lambda towers: (GraphCost(sample=mine.cost), COST[1]))
    monkeypatch.setattr(Towers, "draws_by_chunk", lambda towers: {"image": [], "text": []})
    first, second = on_ranks(2, work)
    assert first == second
    assert first.image.keep_bytes == 400_000 // 4 // 2  # the poorest of the two that share the node
    assert first.image.cost.sample == 500.0  # the main rank's


# --- what is told, and who else asks ----------------------------------------------------------------------------------


def line(keep: str, keep_text: int, kept_slots: int = 64) -> str:
    image = TowerPlan(8, keep_bytes=int(keep), cost=COST[0])
    return plan_line(StepPlan(image, TowerPlan(16, keep_bytes=keep_text, cost=COST[1])), towers_of(), kept_slots)


def test_the_plan_in_words():
    start = "step: chunks of 8 pictures and 16 captions of full length; "
    end = " go through their tower once, the others twice"
    assert line("0", 0) == start + "0% of the pictures and 0% of the captions" + end
    assert line("32000", 10**6) == start + "50% of the pictures and 100% of the captions" + end
    # 16 captions of 77 tokens are 13,920 bytes, 64 of 16 tokens 16,640
    assert (
        line("64000", 20_000) == start + "100% of the pictures and 25% to 100% of the captions, by their length," + end
    )


def test_shares_are_those_of_the_walk():
    """What the line says of short captions is what the step keeps of them."""
    towers, tokens = towers_of(), make_captions(64, longest=16)
    planned = StepPlan(TowerPlan(8), TowerPlan(16, keep_bytes=20_000, cost=COST[1]))
    assert planning.captions_of(towers.text, tokens, planned.text).kept == 64


def test_chunks_where_nothing_is_trained(tmp_path):
    config = tiny_config(tmp_path, "x.tar", "gradcache.image_chunk=auto", "gradcache.text_chunk=6")
    assert chunks_of(config, None) == (256, 6)
    assert chunks_of(config, {"settings": {}, "image": {"chunk": 12}, "text": {"chunk": 7}}) == (12, 6)


def test_a_tower_that_runs_at_full_length_or_draws_by_chunk_is_told_once(tmp_path, counted_so, told):
    plan(tmp_path)
    assert not told
    model = dataclasses.replace(MODEL, text=MODEL.text | {"no_causal_mask": True})
    towers = build_towers(model, seed=3)
    towers.model.text.transformer.resblocks[1].mlp.add_module("drop", torch.nn.Dropout(0.1))
    config = tiny_config(tmp_path, "x.tar")
    found = plan_step(config, towers, ALONE, None)
    assert (found.image.by_chunk, found.text.by_chunk) == (False, True)
    draws, length = told
    assert "the text tower draws by chunk in 1 layer (transformer.resblocks.1.mlp.drop)" in draws
    assert length == "the text tower looks beyond the end of a caption: captions run at full length"
    plan_step(config, towers, ALONE, plan_record(found, config, ALONE))
    assert told == [draws, length], "a resumed run has told it already"
