"""train.lock: what learns, what is kept, and that a locked run is right, on any ranks, and resumes."""

from __future__ import annotations

import copy
import json
import shutil
from functools import cache
from pathlib import Path

import open_clip
import pytest
import timm
import torch
from open_clip.hf_model import HFTextEncoder
from safetensors.torch import load_file, save_file
from shards import write_pairs
from spawn import run_ranks
from test_gradcache import BARS, dense_step, gradients, make_batch, make_towers, run_step, worst_error
from test_optimizers import SMALL, bitwise_equal, model_of, what_is_in
from tiny import save_run, tiny_config, write_config
from torch import nn

from clipscale.cli import main
from clipscale.config import Lock
from clipscale.config.load import load_config
from clipscale.dist import World
from clipscale.errors import UserError
from clipscale.optim import lock_towers
from clipscale.optim.layers import layers_of
from clipscale.towers import Towers, build_towers
from clipscale.training.trainer import Trainer, train

VISIONS = {"open_clip": SMALL.vision, "timm": {"timm_model_name": "test_vit", "image_size": 32}}


@cache
def built(kind: str) -> Towers:
    """To be copied."""
    return build_towers(type(SMALL)(embed_dim=16, vision=VISIONS[kind], text=SMALL.text))


def towers_of(kind: str = "open_clip") -> Towers:
    towers = copy.copy(built(kind))
    towers.model = copy.deepcopy(towers.model)
    towers.image, towers.text = copy.copy(towers.image), copy.copy(towers.text)
    towers.image.encoder, towers.text.encoder = towers.model.visual, towers.model.text
    return towers


def locked(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


# --- what is locked ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", range(5))
@pytest.mark.parametrize("kind", VISIONS)
def test_an_image_tower_is_locked_as_open_clip_locks_it(kind, groups):
    towers = towers_of(kind)
    lock_towers(towers, Lock(image=True, image_groups=groups))
    theirs = copy.deepcopy(built(kind).model)
    theirs.lock_image_tower(unlocked_groups=groups)
    assert locked(towers.model) == locked(theirs)
    assert len(locked(theirs)) > 1
    assert isinstance(towers.model, open_clip.CustomTextCLIP)


@pytest.mark.parametrize("groups", range(5))
def test_a_text_tower_is_locked_as_open_clip_locks_it(groups):
    towers = towers_of()
    lock_towers(towers, Lock(text=True, text_groups=groups))
    theirs = copy.deepcopy(built("open_clip").model)
    theirs.lock_text_tower(unlocked_layers=groups)
    assert locked(towers.model) == locked(theirs)
    assert len(locked(theirs)) > 1


@pytest.fixture(scope="module")
def roberta(tmp_path_factory) -> Path:
    """A text tower of Hugging Face's, of two layers, described and without weights."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("roberta")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    transformers.RobertaConfig(vocab_size=64, max_position_embeddings=16, **sizes).save_pretrained(folder)
    return folder


@pytest.mark.needs("transformers")
def test_a_tower_of_hugging_faces(roberta):
    """As open_clip locks it: embeddings and layers from below; what has no number is the head's or the last layer's."""

    def tower() -> nn.Module:
        return HFTextEncoder(str(roberta), output_dim=16, proj_type="linear", pretrained=False)

    layers = layers_of(tower())
    assert {layer for name, layer in layers.items() if ".embeddings." in name} == {0}
    for number in range(2):
        assert {layer for name, layer in layers.items() if f".layer.{number}." in name} == {number + 1}
    assert {layer for name, layer in layers.items() if name.startswith("proj")} == {3}
    for groups in range(3):
        towers = towers_of()
        towers.model.text = towers.text.encoder = tower()
        lock_towers(towers, Lock(text=True, text_groups=groups))
        theirs = tower()
        theirs.lock(groups)
        assert locked(towers.model.text) == locked(theirs)
        towers.model.train()
        assert towers.model.text.transformer.training == (groups > 0)
        assert towers.model.text.proj.training


def test_which_layers_those_are():
    """Written out, of three blocks: the projection, then blocks from the top, the norm with the highest."""
    towers = towers_of()
    lock_towers(towers, Lock(image=True, image_groups=2, text=True, text_groups=1))
    learns = dict(towers.model.named_parameters()).keys() - locked(towers.model)
    assert {name.rpartition("resblocks.2.")[0] or name for name in learns} == {
        *("logit_scale", "text.text_projection", "visual.proj", "visual.ln_post.weight", "visual.ln_post.bias"),
        "visual.transformer.",
    }


def test_norms_and_biases_alone():
    towers = towers_of()
    lock_towers(towers, Lock(image=True, text=True, learn=("norms", "visual.*.attn.*bias")))
    learns = dict(towers.model.named_parameters()).keys() - locked(towers.model)
    norms = {name for name in learns if ".ln_" in name}
    assert len(norms) == 2 * (2 * 3 * 2) + 4 + 2  # two a block, gain and bias; ln_pre, ln_post, ln_final
    biases = {f"visual.transformer.resblocks.{i}.attn.{n}" for i in range(3) for n in ("in_proj_bias", "out_proj.bias")}
    assert learns == norms | biases | {"logit_scale"}


def test_patterns():
    towers = towers_of()
    (line, other) = lock_towers(towers, Lock(patterns=("text.token_embedding.*", "logit_scale")))
    assert locked(towers.model) == {"text.token_embedding.weight", "logit_scale"}
    assert line == "image tower: learns"
    assert other.endswith("numbers; the rest is locked")


def test_nothing_is_locked_by_default():
    towers = towers_of()
    assert lock_towers(towers, Lock()) == []
    assert not locked(towers.model)


@pytest.mark.parametrize("kind", VISIONS)
def test_what_does_not_learn_stays_in_eval_mode(kind):
    towers = towers_of(kind)
    assert "image tower" in lock_towers(towers, Lock(image=True))[0]
    for model in (towers.model, copy.deepcopy(towers.model)):
        model.train()
        held = model.visual.trunk if kind == "timm" else model.visual
        assert not any(module.training for module in held.modules())
        assert model.text.training
        assert kind == "open_clip" or model.visual.head.training
        model.eval()
        assert not model.text.training


@pytest.mark.parametrize(
    ("lock", "said"),
    [
        (Lock(image=True, image_groups=9), r"image_groups=9 unlocks the whole image tower, of 5 layers"),
        (Lock(text=True, text_groups=5), r"text_groups=5 unlocks the whole text tower, of 5 layers"),
        (Lock(image=True, learn=("norm",)), r"train\.lock\.learn has 'norm', which matches no parameter"),
        (Lock(patterns=("vision.*",)), r"train\.lock\.patterns has 'vision\.\*', which matches no parameter"),
        (Lock(image=True, text=True), "leaves neither tower anything to learn"),
    ],
)
def test_what_cannot_be_locked_is_one_line(lock, said):
    with pytest.raises(UserError, match=said) as error:
        lock_towers(towers_of(), lock)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train.lock.image_groups=1"], r"image_groups=1 unlocks layers of a tower that is not locked"),
        (["train.lock.learn=[norms]"], r"learn=\['norms'\] is what learns in locked towers, and none is"),
        (["train.lock={text: true, text_groups: -1}"], r"text_groups=-1 must not be negative"),
    ],
)
def test_locks_that_make_no_sense_are_refused_when_they_are_loaded(words, said):
    with pytest.raises(UserError, match=said):
        load_config(words)


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lock", [Lock(image=True), Lock(text=True), Lock(image=True, image_groups=2, text=True, learn=("norms",))], ids=str
)
def test_what_learns_has_the_gradients_of_the_whole(lock):
    """Chunks of four and five against one autograd graph of float64; patch dropout, and dropout, where they learn."""
    images, tokens = make_batch(13)
    valid = torch.ones(13, dtype=torch.bool)
    towers = make_towers(torch.float64, dropout=True)
    lock_towers(towers, lock)
    towers.model.train()
    run_step(towers, images, tokens, valid, 4, 5)
    found = gradients(towers)
    assert found.keys() == dict(towers.model.named_parameters()).keys() - locked(towers.model)
    towers.model.zero_grad()
    dense_step(towers, images, tokens, valid, 4, 5)
    assert worst_error(found, gradients(towers)) <= BARS[torch.float64]


def test_a_locked_logit_scale_has_no_gradient():
    towers = make_towers(torch.float64, dropout=False)
    lock_towers(towers, Lock(patterns=("logit_scale",)))
    images, tokens = make_batch(6)
    run_step(towers, images, tokens, torch.ones(6, dtype=torch.bool), 4, 5)
    assert "logit_scale" not in gradients(towers)


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> tuple[str, Path, Path]:
    """Shards; a file of a timm backbone's weights; the folder of a run."""
    folder = tmp_path_factory.mktemp("data")
    urls = write_pairs(folder, 4, 8, size=16)
    torch.manual_seed(4)
    backbone = timm.create_model("test_vit", num_classes=0)
    save_file(backbone.state_dict(), folder / "backbone.safetensors")
    save_run(folder / "trained")
    return urls, folder / "backbone.safetensors", folder / "trained"


LIT = (
    "model.vision={timm_model_name: test_vit, image_size: 32, timm_proj: none, timm_pool: token}",
    "model.embed_dim=64",
    "model.init_towers=image",
    "train.lock.image=true",
    "optim.kind=lamb",
    "optim.layer_decay=0.8",
)
TEXT_LOCKED = (
    "model.vision={image_size: 16, patch_size: 4, width: 32, layers: 1, head_width: 16, patch_dropout: 0.5}",
    "model.init_towers=text",
    "train.lock.text=true",
    "optim.lr=1e-2",
)
CASES = {"image": LIT, "text": TEXT_LOCKED}
ALONE = World(0, 1, 0, torch.device("cpu"))


def words_of(case: str, data: tuple[str, Path, Path]) -> tuple[str, ...]:
    return (*CASES[case], f"model.init={data[1] if case == 'image' else data[2]}", "checkpoint.every_steps=2")


def trained(config, world: World) -> dict[str, torch.Tensor]:
    trainer = Trainer(config, world)
    try:
        trainer.run()
        still = [each for each in trainer.towers.model.parameters() if not each.requires_grad]
        assert still
        assert all(each.grad is None for each in still)
        return {name: tensor.clone() for name, tensor in trainer.towers.model.state_dict().items()}
    finally:
        trainer.close()


def a_rank(rank: int, size: int, folder: str, urls: str, words: tuple[str, ...]) -> dict[str, torch.Tensor]:
    own = Path(folder, str(rank))
    own.mkdir()
    config = tiny_config(own, urls, f"run.dir={folder}/run", "train.check_ranks_every_steps=1", *words)
    return trained(config, World(rank, size, rank, torch.device("cpu")))


@pytest.mark.parametrize("case", CASES)
def test_a_locked_run_keeps_its_weights_and_resumes_to_the_bit(case, data, tmp_path):
    config = tiny_config(tmp_path, data[0], *words_of(case, data), "checkpoint.keep=9")
    train(config)
    last = tmp_path / "run" / "checkpoints" / "step-000000004"
    wanted = what_is_in(last)
    prefix, part = ("visual.trunk.", "visual") if case == "image" else ("", "text")
    kept = load_file(data[1]) if case == "image" else load_file(next(data[2].glob("checkpoints/*/model.safetensors")))
    kept = {f"{prefix}{name}": tensor for name, tensor in kept.items() if prefix or name.startswith("text.")}
    assert kept.keys() == {name for name in wanted[0] if name.startswith(part)}
    assert all(torch.equal(wanted[0][name], tensor) for name, tensor in kept.items())
    first = build_towers(config.model, seed=config.seed).model.state_dict()
    moved = [name for name in first if not name.startswith(part) and not torch.equal(first[name], wanted[0][name])]
    assert len(moved) == len([name for name in first if not name.startswith(part)])
    named = {name for group in wanted[1]["param_groups"] for name in group["param_names"]}
    assert not {name for name in named if name.startswith(part)}
    assert len(wanted[1]["state"]) == len(named) == len(moved)
    log = (tmp_path / "run" / "run.log").read_text()
    assert f"{case} tower: locked; it runs in eval mode, and once a step" in log
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert f"seconds/{case}_backward" not in rows[-1]
    shutil.rmtree(last)
    train(config)
    assert bitwise_equal(what_is_in(last), wanted)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "size"), [("image", 2), ("image", 4), ("text", 2)])
def test_ranks_agree_with_one_process(case, size, data, tmp_path):
    words = words_of(case, data)
    (tmp_path / "alone").mkdir()
    wanted = trained(tiny_config(tmp_path / "alone", data[0], *words), ALONE)
    first, *others = run_ranks(a_rank, size, str(tmp_path), data[0], words)
    assert all(bitwise_equal(first, other) for other in others)
    for name, tensor in wanted.items():
        if name.startswith("visual" if case == "image" else "text"):
            assert torch.equal(first[name], tensor)
        else:
            torch.testing.assert_close(first[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("words", [(), ("model.init_towers=text",)], ids=["none", "of the other tower"])
def test_a_tower_that_would_keep_random_weights_is_refused_before_data_are_read(words, data, tmp_path):
    init = (f"model.init={data[2]}",) if words else ()
    with pytest.raises(UserError, match=r"train\.lock\.image=true keeps .* random ones: set model\.init") as error:
        train(tiny_config(tmp_path, "no-such.tar", "train.lock.image=true", *init, *words))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_tower_that_is_unlocked_later_begins_its_moments_then(data, tmp_path):
    words = words_of("text", data)
    train(tiny_config(tmp_path, data[0], *words))
    train(tiny_config(tmp_path, data[0], *words, "train.lock.text=false", "train.samples=48"))
    log = (tmp_path / "run" / "run.log").read_text()
    count = len([name for name, _ in model_of().text.named_parameters() if "resblocks" not in name]) + 12
    assert f"optimizer: {count} parameters that did not learn before (text." in log
    state = what_is_in(tmp_path / "run" / "checkpoints" / "step-000000006")[1]
    assert sorted({int(slots["step"]) for slots in state["state"].values()}) == [2, 6]


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("train.lock.patterns=['vision.*']", "train.lock.patterns has 'vision.*', which matches no parameter"),
        ("optim.no_decay=['vision.*']", "optim.no_decay has 'vision.*', which matches no parameter"),
        ("optim.lr_scales.vision=0.1", "optim.lr_scales has 'vision', which matches no parameter"),
    ],
)
def test_what_matches_nothing_is_told_before_a_shard_is_read(tmp_path, capsys, word, line):
    config = write_config(tmp_path, write_pairs(tmp_path / "data", 2, 8, size=16))
    assert main(["train", config, word]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"clipscale: error: {line}")
    assert not any((tmp_path / "data").glob("*.index"))
    assert not (tmp_path / "run").exists()
