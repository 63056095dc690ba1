"""Features of a recipe together, by the trainer: any number of ranks agrees, and a resume is the run without a stop."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from shards import write_pairs
from spawn import run_ranks
from test_divergence import ALONE
from test_optimizers import bitwise_equal, what_is_in
from tiny import tiny_config

from clipscale.dist import World
from clipscale.training.trainer import Trainer

TIMM = "timm_model_name: test_vit, image_size: 32"
VISION = "model.vision={image_size: 16, patch_size: 4, width: 32, layers: 3, head_width: 16, patch_dropout: 0.5}"
TEXT = "model.text={context_length: 24, width: 32, heads: 2, layers: 3, ls_init_value: 0.1}"
EMA = "ema.half_life_samples=24"
STEADY = "optim.eps=1e-3"  # where a gradient is all rounding (a key's bias in attention), so is the step then
LAMB, COMPILED = "lamb, ema, checkpointed blocks", "compiled, kept graphs, ema"
LION = "lion, part of a tower locked, ema"
CASES: dict[str, tuple[str, ...]] = {
    LAMB: (
        f"model.vision={{{TIMM}, patch_dropout: 0.5, timm_drop_path: 0.3}}",
        *("optim.kind=lamb", "optim.lr=1e-2", STEADY, "optim.layer_decay=0.8", "towers.checkpoint_blocks=true"),
    ),
    "lit, ema": (
        f"model.vision={{{TIMM}, timm_proj: none, timm_pool: token, patch_dropout: 0.5}}",
        *("model.embed_dim=64", "model.init=backbone", "model.init_towers=image", "train.lock.image=true", STEADY),
    ),
    "muon, part of a tower locked, ema": (
        *(VISION, "optim.kind=muon", STEADY, "train.lock={image: true, image_groups: 1}"),
        "optim.lr_scales={logit_scale: 0.25}",
    ),
    LION: (*(VISION, "optim.kind=lion", "optim.lr=1e-4", "train.lock={image: true, image_groups: 1}"),),
    "bf16, fast norms, kept graphs, ema": (
        *(VISION, "train.precision=bf16", "towers.residual=bf16", "gradcache.keep_bytes=300_000", STEADY),
    ),
    "fp16, clipped updates, part of a tower locked, checkpointed blocks, ema": (
        *(VISION, "train.precision=fp16", "optim.update_clipping=1.0", STEADY, "towers.checkpoint_blocks=true"),
        *("train.lock={text: true, text_groups: 1}", "model.logit_scale_init=2.0"),  # far from overflows
    ),
    COMPILED: (VISION, "towers.compile=true", "gradcache.keep_bytes=300_000", STEADY),
}
RESUMED = [pytest.param(case, marks=[pytest.mark.slow] * (case in (COMPILED, LION))) for case in CASES]
BARS = {"fp32": (1e-6, 1e-5, 1e-5), "muon": (1e-5, 5e-5, None), "fp16": (1e-3, 1e-2, None), "bf16": (1e-2, 0.1, None)}
"""Between numbers of ranks: of losses, of gradients' norms, and of weights and averages by their largest number; None,
and for lion: not compared. Lion steps by signs, and Muon makes every direction of a gradient equally long, those too in
which there is nothing but rounding."""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> tuple[str, str]:
    """Shards; a file of a timm backbone's weights."""
    folder = tmp_path_factory.mktemp("data")
    torch.manual_seed(4)
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), folder / "backbone.safetensors")
    return write_pairs(folder, 4, 8, size=16), f"{folder}/backbone.safetensors"


def trained(folder: Path, data: tuple[str, str], world: World, words: tuple[str, ...]) -> dict[str, Any]:
    """What a run of four steps in folder/run leaves on this rank: weights, averages; on the first one rows."""
    own = folder / str(world.rank)
    own.mkdir(parents=True, exist_ok=True)
    always = (f"run.dir={folder}/run", TEXT, EMA, "checkpoint.every_steps=2", "checkpoint.keep=9")
    words = tuple(word.replace("=backbone", f"={data[1]}") for word in words)
    trainer = Trainer(tiny_config(own, data[0], *always, "train.check_ranks_every_steps=1", *words), world)
    try:
        trainer.run()
        tensors = dict(trainer.towers.model.state_dict()), dict(trainer.ema.averages)
    finally:
        trainer.close()
    return {"weights": tensors[0], "averages": tensors[1], "rows": [] if world.rank else rows(folder), "folder": folder}


def rows(folder: Path) -> list[dict[str, Any]]:
    """Without times and memory."""
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    aside = ("seconds/", "time", "memory_bytes", "samples_per_second", "data_wait_share")
    return [{name: x for name, x in json.loads(line).items() if not name.startswith(aside)} for line in lines]


def last_of(folder: Path) -> Path:
    return folder / "run" / "checkpoints" / "step-000000004"


def saved(folder: Path) -> tuple:
    """Weights, optimizer and loss scale of the last step; averages."""
    last = last_of(folder)
    return *what_is_in(last), load_file(last / "ema.safetensors")


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Callable[[str], dict[str, Any]]:
    """A case's run on one rank without a stop."""
    found = {}

    def run(case: str) -> dict[str, Any]:
        if case not in found:
            found[case] = trained(tmp_path_factory.mktemp("whole"), data, ALONE, CASES[case])
        return found[case]

    return run


@pytest.mark.parametrize("case", RESUMED)
def test_a_resume_is_the_run_without_a_stop(case, whole, data, tmp_path):
    shutil.copytree(whole(case)["folder"] / "run", tmp_path / "run")
    shutil.rmtree(last_of(tmp_path))
    resumed = trained(tmp_path, data, ALONE, CASES[case])
    assert bitwise_equal(saved(tmp_path), saved(whole(case)["folder"]))
    assert resumed["rows"] == whole(case)["rows"]
    assert [row["step"] for row in resumed["rows"]] == [1, 2, 3, 4]
    assert bitwise_equal(resumed["averages"], whole(case)["averages"])


def a_rank(rank: int, size: int, folder: str, data: tuple[str, str], words: tuple[str, ...]) -> dict[str, Any]:
    return trained(Path(folder), data, World(rank, size, rank, torch.device("cpu")), words)


def bars_of(case: str) -> tuple[float, float, float | None]:
    loss, grad_norm, weights = BARS[next((name for name in BARS if case.startswith(name)), "fp32")]
    return loss, grad_norm, None if case == LION else weights


@pytest.mark.parametrize(
    ("case", "size"),
    [pytest.param(case, n, marks=[pytest.mark.slow] * ((case, n) != (LAMB, 2))) for case in CASES for n in (2, 4)],
)
def test_ranks_agree_with_one_process(case, size, whole, data, tmp_path):
    wanted, (first, *others) = whole(case), run_ranks(a_rank, size, str(tmp_path), data, CASES[case])
    for other in others:
        assert all(bitwise_equal(first[what], other[what]) for what in ("weights", "averages"))
    loss_bar, norm_bar, bar = bars_of(case)
    for one, many in zip(wanted["rows"], first["rows"], strict=True):
        assert many["loss"] == pytest.approx(one["loss"], rel=loss_bar)
        assert many["grad_norm"] == pytest.approx(one["grad_norm"], rel=norm_bar)
        assert (many["lr"], many["samples"]) == (one["lr"], one["samples"])
    for what in ("weights", "averages") if bar else ():
        assert first[what].keys() == wanted[what].keys()
        for name, tensor in wanted[what].items():
            torch.testing.assert_close(first[what][name], tensor, rtol=0, atol=bar * tensor.abs().max().item() + 1e-8)


def test_averages_and_checkpointed_blocks_change_no_bit(whole, data, tmp_path):
    """Of a run with LAMB, layer decay, patch dropout and drop path."""
    plain = trained(tmp_path, data, ALONE, (*CASES[LAMB], "towers.checkpoint_blocks=false", "ema.half_life_samples=0"))
    assert bitwise_equal(what_is_in(last_of(tmp_path)), what_is_in(last_of(whole(LAMB)["folder"])))
    assert plain["rows"] == whole(LAMB)["rows"]
    assert plain["averages"] == {} != whole(LAMB)["averages"]


def test_averages_of_what_is_locked_later_are_dropped_with_a_warning(data, tmp_path):
    """A run of two steps goes on for two with its image tower locked."""
    trained(tmp_path, data, ALONE, (VISION, "train.samples=16"))
    found = trained(tmp_path, data, ALONE, (VISION, "train.lock.image=true"))
    names = {name for name in found["weights"] if not name.startswith("visual.")}
    assert found["averages"].keys() == load_file(last_of(tmp_path) / "ema.safetensors").keys() == names
    count = len(found["weights"]) - len(names)
    told = f"warning: the checkpoint's averages of {count} tensors are dropped: train.lock"
    assert told in (tmp_path / "run" / "run.log").read_text()


@pytest.mark.slow
def test_compiled_blocks_train_as_they_come(whole, data, tmp_path):
    plain = trained(tmp_path, data, ALONE, (*CASES[COMPILED], "towers.compile=false"))
    for one, many in zip(plain["rows"], whole(COMPILED)["rows"], strict=True):
        assert many["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert many["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)
    assert 0 < whole(COMPILED)["rows"][-1]["kept_share"] < 1
    for name, tensor in plain["weights"].items():
        torch.testing.assert_close(whole(COMPILED)["weights"][name], tensor, rtol=1e-5, atol=1e-6)
