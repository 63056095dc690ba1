"""clipscale/forecast/: formulas against models that torch builds, counts and runs; plans against what was measured."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from shards import write_pairs
from tiny import write_config

from clipscale.bench.common.memory import watched_parts
from clipscale.bench.step.captions import draw_captions, read_lengths
from clipscale.bench.step.flops import tower_flops
from clipscale.checkpoint.staging import state_bytes
from clipscale.config import AS_OPEN_CLIP, Model, TowerSettings
from clipscale.config.load import load_config
from clipscale.data.load.blocks import Layout
from clipscale.data.load.replay import Held
from clipscale.forecast import memory
from clipscale.forecast.answer import plan_run, scale_rows
from clipscale.forecast.built import built_towers
from clipscale.forecast.hardware import cpu, find_gpu
from clipscale.forecast.job import make_job
from clipscale.forecast.measured import Found, look_up
from clipscale.forecast.memory import memory_of
from clipscale.forecast.scale import exposed_seconds, hidden_from, hops
from clipscale.forecast.seconds import data_seconds, job_flop, loss_rate, seconds_of
from clipscale.forecast.towers import plain_towers
from clipscale.loss import contrastive_grads_in_place
from clipscale.optim import build_optimizer
from clipscale.step import StepPlan, TowerPlan, gradcache_step
from clipscale.step.costs import graph_costs
from clipscale.towers import build_towers

ROOT = Path(__file__).resolve().parents[1]
VISION = {"image_size": 48, "patch_size": 16, "width": 96, "layers": 2, "head_width": 32}
TEXT = {"context_length": 24, "width": 64, "heads": 4, "layers": 3}
VARIANTS = {
    "plain": ({}, {}, False),
    "quick_gelu": ({}, {}, True),
    "patch dropout, averaged": ({"patch_dropout": 0.5, "pool_type": "avg"}, {"pool_type": "eos", "eos_id": 5}, False),
    "norm after the pool": ({"final_ln_after_pool": True, "no_ln_pre": True}, {"pool_type": "last"}, False),
    "bias, no mask": (
        {"mlp_ratio": 2.5, "pool_type": "avg", "final_ln_after_pool": True},
        {"proj_bias": True, "no_causal_mask": True, "mlp_ratio": 3.0},
        False,
    ),
}


def described(variant: str) -> Model:
    vision, text, quick = VARIANTS[variant]
    return Model(embed_dim=48, vision=VISION | vision, text=TEXT | text, quick_gelu=quick)


# --- towers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_and_operations_of_a_described_model_are_those_of_the_built_one(variant):
    model = described(variant)
    towers = build_towers(model)
    for facts, tower, example in zip(
        plain_towers(model, TowerSettings(), half=False), (towers.image, towers.text), towers.examples(), strict=True
    ):
        assert facts.parameters == sum(each.numel() for each in tower.encoder.parameters())
        assert facts.forward_flop() == tower_flops(lambda tower=tower, example=example: tower(example[1]))
    assert plain_towers(model, TowerSettings(), half=False)[1].cuttable == (towers.text.cut is not None)


@pytest.mark.parametrize("variant", VARIANTS)
def test_saved_bytes_are_those_that_the_step_counts(variant):
    model = described(variant)
    towers = build_towers(model)
    towers.model.train()
    mine, costs = plain_towers(model, TowerSettings(), half=False), graph_costs(towers)
    for facts, cost, tokens in zip(mine, costs, (None, 24), strict=True):
        for length in {tokens, 16 if facts.cuttable else tokens}:
            planned = facts.graph_bytes(32, 32 * (length or facts.tokens))
            assert planned == pytest.approx(cost.of(32, 32 * (length or 0)), rel=0.003)


SETTINGS = {
    "default": TowerSettings(),
    "as open_clip": AS_OPEN_CLIP,
    "residual": TowerSettings(residual="bf16"),
    "checkpointed": TowerSettings(checkpoint_blocks=True),
}


@pytest.mark.parametrize(
    ("half", "settings"),
    [
        (True, SETTINGS["default"]),
        *(pytest.param(half, its, marks=pytest.mark.slow) for half in (False, True) for its in SETTINGS.values()),
    ],
)
def test_vit_b_32_is_what_torch_makes_of_it_without_memory(half, settings):
    """Under half, with the casts of a GPU's autocast and fused attention, which torch's fake tensors go through."""
    model = Model(name="ViT-B-32")
    for formula, built in zip(
        plain_towers(model, settings, half=half), built_towers(model, settings, half=half), strict=True
    ):
        assert formula.parameters == built.parameters
        assert formula.forward_flop() == built.forward_flop()
        assert formula.graph_bytes(256, 256 * formula.tokens) == built.graph_bytes(256, 256 * built.tokens)
        assert formula.cast == pytest.approx(built.cast, rel=1e-4)  # which counts the class token and the like


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ViT-L-14", "ViT-H-14-CLIPA", "ViT-B-16-SigLIP", "ViT-B-16-plus-240"])
def test_named_models_are_what_torch_makes_of_them(name):
    model, settings = Model(name=name), TowerSettings()
    for formula, built in zip(
        plain_towers(model, settings, half=True), built_towers(model, settings, half=True), strict=True
    ):
        if formula is None:
            assert name.endswith("SigLIP"), "its image tower is timm's"
            assert 90e6 < built.parameters < 95e6
            continue
        assert (formula.parameters, formula.forward_flop()) == (built.parameters, built.forward_flop())
        assert formula.graph_bytes(1, formula.tokens) == built.graph_bytes(1, built.tokens)


# --- memory -----------------------------------------------------------------------------------------------------------


def test_the_peak_of_a_step_is_within_a_tenth_of_what_its_operations_make():
    vision, text = VISION | {"width": 192, "layers": 4}, TEXT | {"context_length": 77, "width": 128}
    model = Model(embed_dim=96, vision=vision, text=text)
    towers, pairs = build_towers(model), 1024
    towers.model.train()
    tokens = draw_captions(read_lengths(None), pairs, length=77, vocabulary=towers.vocabulary, seed=0)
    images = torch.zeros(pairs, 3, 48, 48, dtype=torch.uint8)
    step = partial(
        gradcache_step,
        towers,
        Held(images, 128),
        tokens,
        torch.ones(pairs, dtype=torch.bool),
        plan=StepPlan(TowerPlan(128), TowerPlan(64)),
        loss_and_grads=contrastive_grads_in_place,
        key=1,
    )
    result, peaks = watched_parts(
        step, torch.device("cpu"), known=[images, tokens, *towers.model.state_dict().values()]
    )
    config = replace(load_config([f"train.global_batch={pairs}", "gradcache.image_chunk=128"]), model=model)
    config = replace(config, gradcache=replace(config.gradcache, text_chunk=64))
    job = make_job(config, ranks=1, device=cpu(), tokens=result.tokens_per_caption)
    assert beyond_what_is_always_there(job) == pytest.approx(max(peaks.values()), rel=0.10)


def beyond_what_is_always_there(job) -> int:
    """Of a step without kept graphs: what it makes itself."""
    found = memory_of(job)
    inside = (memory.GRADIENTS, memory.LOSS, memory.WORKSPACE, memory.CHUNK, memory.EMBEDDINGS, memory.COPIES)
    return found.total - sum(size for name, size in found.parts.items() if name not in inside)


def test_the_copy_for_checkpoints_and_the_loader_s_blocks_are_what_they_are():
    model = described("plain")
    towers = build_towers(model)
    for kind in memory.MOMENTS:
        config = replace(load_config(["train.global_batch=64", f"optim.kind={kind}"]), model=model)
        job = make_job(config, ranks=2, device=cpu())
        needed = state_bytes(towers.model, build_optimizer(towers.model, config.optim))
        assert memory_of(job).parts[memory.STAGING] == pytest.approx(needed, rel=2e-3)  # each tensor is aligned
    shape = job.shape()
    layout = Layout(len(shape.spans) + shape.ahead, shape.chunk, 48, 24)
    assert memory_of(job).parts[memory.PICTURES] >= layout.total_bytes


def on_h100(*words: str):
    return make_job(load_config(["model.name=ViT-B-32", *words]), ranks=1, device=find_gpu("h100"))


def test_averaged_weights_are_a_copy_more():
    before, after = memory_of(on_h100()), memory_of(on_h100("ema.half_life_samples=1000"))
    learned = before.parts[memory.GRADIENTS]
    assert after.parts[memory.AVERAGE] == learned
    assert after.host[memory.STAGING] - before.host[memory.STAGING] == learned


def test_a_locked_tower_goes_through_once_and_has_neither_gradients_nor_moments():
    free, locked = on_h100(), on_h100("train.lock.image=true", "model.init=b32.pt")
    towers = build_towers(free.config.model, device="meta")
    learned = sum(each.numel() for each in towers.model.text.parameters())
    assert memory_of(locked).parts[memory.GRADIENTS] == 4 * learned
    assert memory_of(locked).parts[memory.STATE] == 8 * learned
    assert memory_of(locked).peaks["the image tower's second pass"] < memory_of(free).peaks["the loss"]
    before, after = (seconds_of(job, Found(), replace(memory_of(job), kept=(0, 0))) for job in (free, locked))
    assert after["image tower"] == pytest.approx(before["image tower"] / 4)
    assert after["text tower"] == before["text tower"]


def test_checkpointed_blocks_keep_less_and_run_once_more():
    plain, checkpointed = on_h100("gradcache.keep_bytes=0"), on_h100("gradcache.keep_bytes=0", BLOCKS)
    assert memory_of(checkpointed).parts[memory.CHUNK] < memory_of(plain).parts[memory.CHUNK] / 3
    assert job_flop(checkpointed) == job_flop(plain) * 5 / 4


BLOCKS = "towers.checkpoint_blocks=true"


def document(name: str) -> dict:
    return json.loads((ROOT / "docs" / "benchmarks" / f"{name}.json").read_text())


def h100_step():
    """The job of docs/benchmarks/step-h100.json, and its row."""
    row = document("step-h100")["steps"][0]["rows"][0]
    words = ["model.name=ViT-B-32", "train.global_batch=32768", "gradcache.image_chunk=1024", "gradcache.keep_bytes=0"]
    words += ["towers.fast_attention=false", "towers.fast_norms=false"]  # there were none
    config = load_config([*words, "gradcache.text_chunk=2048", "data.threads=64"])
    return make_job(config, ranks=1, device=find_gpu("h100"), tokens=row["tokens_per_caption"]), row


def test_a_step_on_an_h100_takes_the_memory_and_time_that_are_planned():
    job, row = h100_step()
    assert beyond_what_is_always_there(job) == pytest.approx(row["peak_bytes"], rel=0.10)
    measured = row["step_seconds"]["median"]
    assert sum(seconds_of(job, Found()).values()) == pytest.approx(measured, rel=0.10), "by the datasheet alone"
    found = look_up(job.device, ROOT)
    assert found.step.seconds == measured
    assert sum(seconds_of(job, found).values()) == pytest.approx(measured, rel=0.02)


def test_the_loss_takes_the_workspace_and_time_that_an_h100_needed():
    case = document("loss-h100")["cases"][1]
    row = case["rows"][0]
    job = make_job(
        load_config([f"train.global_batch={case['batch']}", "model.name=ViT-L-14"]), ranks=1, device=find_gpu("h100")
    )
    assert memory_of(job).parts[memory.WORKSPACE] == pytest.approx(row["extra_bytes"], rel=0.01)
    for found in (Found(), look_up(job.device, ROOT)):
        assert seconds_of(job, found)["loss"] == pytest.approx(row["both_ms"]["median"] / 1e3, rel=0.05)


@pytest.mark.slow
def test_a_run_s_processes_hold_what_is_planned(tmp_path):
    urls = write_pairs(tmp_path / "data", 2, 32, size=32)
    words = [
        write_config(tmp_path, urls),
        "model.vision.image_size=64",
        "model.vision.width=384",
        "data.loader=process",
    ]
    words += ["model.vision.layers=6", "model.vision.head_width=64", "model.text.width=256", "model.text.layers=4"]
    words += ["train.global_batch=256", "train.samples=256", "data.allow_repeats=true", "gradcache.image_chunk=128"]
    words += ["gradcache.text_chunk=256", "data.loader=process", "model.text.context_length=16"]
    command = [sys.executable, str(Path(__file__).with_name("step_memory.py")), *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    planned = memory_of(make_job(load_config(words), ranks=1, device=cpu())).total
    assert planned == pytest.approx(int(done.stdout.splitlines()[-1]), rel=0.10)


# --- the wire ---------------------------------------------------------------------------------------------------------


def test_the_ring_is_hidden_from_the_batch_on_that_is_told():
    config = load_config(["model.name=ViT-L-14", "train.global_batch=4194304"])
    job = make_job(config, ranks=64, device=find_gpu("h100"))
    rate = loss_rate(job, Found())
    batch = hidden_from(job, rate)

    def exposed(pairs: int) -> float:
        train = replace(config.train, global_batch=pairs)
        return exposed_seconds(replace(job, config=replace(config, train=train)), rate)

    assert exposed(64 * (batch // 64 + 1)) == 0.0
    assert exposed(64 * (batch // 80)) > 0.0
    first, second = hops(job)
    assert (first.bytes, second.bytes) == (65536 * (768 * 2 + 12), 65536 * (768 * 6 + 12))
    assert second.seconds == pytest.approx(second.bytes / (0.8 * 50e9))
    assert second.flop == 3 * first.flop == 6 * 65536**2 * 768


def test_a_table_for_1_to_1024_ranks():
    rows = scale_rows(load_config(["vit_b32"]), ranks=8, device=find_gpu("h100"), tokens=None, root=ROOT)
    assert [row["ranks"] for row in rows] == [2**power for power in range(11)]
    assert rows[0]["hop_bytes"] == [0, 0]
    assert rows[4]["wire_bytes_per_second"] < rows[3]["wire_bytes_per_second"], "the network, from two nodes on"
    assert rows[10]["loss_seconds"] == pytest.approx(1024 * rows[0]["loss_seconds"])
    assert len({row["gpu_bytes"] for row in rows[2:]}) == 1, "constant memory"


# --- the answer -------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_told_with_chunks_that_do():
    chunks = "gradcache.image_chunk={0} gradcache.text_chunk={0}"
    words = ["model.name=ViT-B-32", "train.global_batch=65536", *chunks.format(8192).split()]
    device = replace(find_gpu("h100"), memory_bytes=24_000_000_000)
    answer = plan_run(load_config(words), ranks=1, device=device, timed=False)
    assert not answer["memory"]["fits"]
    (advice,) = answer["advice"]
    words += advice.removeprefix("smaller chunks fit: ").split()
    assert plan_run(load_config(words), ranks=1, device=device, timed=False)["memory"]["fits"]
    embeddings = ["model.name=ViT-L-14", "train.global_batch=16777216", *chunks.format(8).split()]
    answer = plan_run(load_config(embeddings), ranks=2, device=device, timed=False)
    assert "ranks hold it" in " ".join(answer["advice"])


def test_slow_decoding_is_the_limit_and_told_with_the_cores_it_needs():
    config = load_config(["model.name=ViT-B-32", "train.global_batch=65536", "data.threads=1"])
    answer = plan_run(config, ranks=8, device=find_gpu("b200"), root=ROOT)
    assert answer["limit"] == "data"
    assert answer["decode"]["cores_per_rank"] > 1
    assert "data.threads=1 decode too slowly" in answer["timing_advice"][0]
    job = make_job(config, ranks=8, device=find_gpu("b200"))
    assert answer["seconds"]["step"] == pytest.approx(data_seconds(job, look_up(job.device, ROOT), memory_of(job)))


def test_results_of_other_devices_and_broken_files_are_passed_over(tmp_path):
    folder = tmp_path / "bench-results"
    folder.mkdir()
    (folder / "broken.json").write_text("{")
    (folder / "unfinished.json").write_text(json.dumps(document("step-h100") | {"finished": False}))
    assert look_up(find_gpu("h100"), tmp_path) == Found()
    part = folder / "gpu-h100-parts" / "step.json"  # of bench gpu
    part.parent.mkdir()
    part.write_text(json.dumps(document("step-h100")))
    assert look_up(find_gpu("a100"), tmp_path) == Found()
    assert look_up(find_gpu("h100"), tmp_path).sources == {"towers": str(part)}
