"""clipscale/weights and model.init: a run begins with weights from elsewhere, or says what does not fit."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import open_clip
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from shards import write_pairs
from spawn import run_ranks
from tiny import MODEL, tiny_config

from clipscale.config import Config, Model
from clipscale.dist import World
from clipscale.errors import UserError
from clipscale.files import read_rows
from clipscale.preflight.checks import check_training
from clipscale.telemetry.parts import Parts
from clipscale.towers import Tower, Towers, build_towers
from clipscale.training.learner import Learner
from clipscale.training.trainer import train
from clipscale.upstream.open_clip_files import pretrained_tags
from clipscale.weights.start import begin_from

SETTINGS = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
NAME = "ViT-test-weights"
TIMM = {"timm_model_name": "test_vit", "image_size": 32}


@pytest.fixture(scope="module", autouse=True)
def named(tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("models")
    (folder / f"{NAME}.json").write_text(json.dumps(SETTINGS))
    open_clip.add_model_config(folder)


@pytest.fixture(scope="module")
def theirs() -> open_clip.CLIP:
    """A model of open_clip's, towers in one, with weights of its own."""
    torch.manual_seed(3)
    model = open_clip.create_model(NAME).eval()
    torch.nn.init.normal_(model.visual.positional_embedding)
    torch.nn.init.normal_(model.positional_embedding)
    return model


@pytest.fixture(scope="module")
def files(theirs, tmp_path_factory) -> Path:
    """The same weights in every form that open_clip's users have."""
    folder, state = tmp_path_factory.mktemp("files"), theirs.state_dict()
    torch.save(state, folder / "plain.pt")
    save_file(state, folder / "plain.safetensors")
    training = {"epoch": 3, "name": "b32", "state_dict": {f"module.{name}": each for name, each in state.items()}}
    torch.save(training | {"optimizer": {"state": {}, "param_groups": [{"lr": 1e-3}]}}, folder / "epoch_3.pt")
    apart = open_clip.create_model(NAME, pretrained=str(folder / "plain.pt"), force_custom_text=True).state_dict()
    torch.save(apart | {"logit_scale": apart["logit_scale"].reshape(1)}, folder / "apart.pt")
    (folder / "exported").mkdir()
    save_file(state, folder / "exported/open_clip_pytorch_model.safetensors")
    (folder / "exported/open_clip_config.json").write_text(json.dumps({"model_cfg": SETTINGS, "preprocess_cfg": {}}))
    return folder


def begun(init: str | Path, model: Model = MODEL, **changes) -> tuple[Towers, list[str]]:
    """Towers with the weights of `init`, and the lines that tell of them."""
    model = dataclasses.replace(model, init=str(init), **changes)
    towers = build_towers(model)
    lines = begin_from(model, towers)
    towers.model.eval()
    return towers, lines


def pictures(n: int, side: int) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))


def assert_same(towers: Towers, model: torch.nn.Module) -> None:
    """The embeddings are those of open_clip's model, for pictures of its size and captions of its length."""
    side, length = towers.image_size, towers.context_length
    images, tokens = pictures(3, side), torch.randint(1, 49000, (3, length))
    tokens[:, -2] = 49407
    preprocess = open_clip.image_transform(side, is_train=False)
    prepared = torch.stack([preprocess(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in images])
    with torch.no_grad():
        torch.testing.assert_close(towers.image(images), model.encode_image(prepared, normalize=True))
        torch.testing.assert_close(towers.text(tokens), model.encode_text(tokens, normalize=True))
    assert towers.logit_scale() == pytest.approx(model.logit_scale.exp().item())


# --- what is read -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["plain.pt", "plain.safetensors", "epoch_3.pt", "apart.pt", "exported"])
def test_the_weights_of_open_clip_in_each_of_their_forms(form, files, theirs):
    towers, lines = begun(files / form)
    assert_same(towers, theirs)
    assert lines[0].startswith("weights of ")
    assert lines[1:] == [
        "image tower: 20 tensors, 19.68k numbers: 20 as they are",
        "text tower: 17 tensors, 1.595M numbers: 17 as they are",
        "logit scale: 1 tensor, 1 numbers: 1 as it is",
    ]


def test_a_folder_may_be_named_as_open_clip_names_it(files, tmp_path):
    words = [f"model.init=local-dir:{files / 'exported'}"]
    assert tiny_config(tmp_path, "x.tar", *words).model.init == str(files / "exported")


def test_one_tower_alone(files, theirs):
    fresh = build_towers(MODEL).model.state_dict()
    for which, other in (("image", "text"), ("text", "visual")):
        towers, lines = begun(files / "plain.pt", init_towers=which)
        state = towers.model.state_dict()
        assert all(torch.equal(state[name], fresh[name]) for name in state if name.startswith((other, "logit")))
        assert sum(line.endswith(": fresh") for line in lines) == 2
    torch.save(theirs.visual.state_dict(), files / "visual.pt")
    towers, _ = begun(files / "visual.pt", init_towers="image")
    assert torch.equal(towers.model.visual.proj, theirs.visual.proj)


def test_a_backbone_of_timm(tmp_path):
    model = dataclasses.replace(MODEL, vision=TIMM)
    torch.manual_seed(1)
    backbone = timm.create_model("test_vit", num_classes=7)
    torch.save(backbone.state_dict(), tmp_path / "timm.pt")
    towers, lines = begun(tmp_path / "timm.pt", model, init_towers="image")
    for name, tensor in backbone.state_dict().items():
        assert name.startswith("head.") or torch.equal(towers.model.visual.trunk.state_dict()[name], tensor)
    assert "1 fresh (visual.head.proj.weight)" in lines[1]
    assert lines[-1] == "not used of the weights: visual.trunk.head.weight, visual.trunk.head.bias"


def test_a_backbone_of_timm_at_another_size(tmp_path):
    """Its positions are those that timm's own `set_input_size` makes of them."""
    backbone = timm.create_model("test_vit", num_classes=0)
    torch.save(backbone.state_dict(), tmp_path / "timm.pt")
    model = dataclasses.replace(MODEL, vision={"timm_model_name": "test_vit", "image_size": 160})
    towers, lines = begun(tmp_path / "timm.pt", model, init_towers="image", image_size=64)
    backbone.set_input_size(64)
    torch.testing.assert_close(towers.model.visual.trunk.pos_embed, backbone.pos_embed)
    assert "1 resized (visual.trunk.pos_embed 101 -> 17 positions)" in lines[1]
    assert towers.image(pictures(2, 64)).shape == (2, 16)


# --- other sizes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("side", "length"), [(32, 12), (24, 5)])
@pytest.mark.parametrize("model", [MODEL, Model(name=NAME)], ids=["own", "named"])
def test_another_size_is_what_open_clip_makes_of_it(model, side, length, files):
    towers, lines = begun(files / "plain.pt", model, image_size=side, context_length=length)
    assert (towers.image_size, towers.context_length) == (side, length)
    assert towers.tokenizer.context_length == length
    assert f"(visual.positional_embedding 5 -> {(side // 8) ** 2 + 1} positions)" in lines[1]
    assert f"(text.positional_embedding 8 -> {length} positions)" in lines[2]
    resized = open_clip.create_model(
        NAME, pretrained=str(files / "plain.pt"), force_image_size=side, force_context_length=length
    )
    assert_same(towers, resized.eval())


def test_positions_of_captions_may_be_cut_instead(files, theirs):
    towers, _ = begun(files / "plain.pt", context_length=5, init_context="cut")
    assert torch.equal(towers.model.text.positional_embedding, theirs.positional_embedding[:5])
    with pytest.raises(UserError, match=r"8 positions, fewer than the 12 .*init_context=stretch"):
        begun(files / "plain.pt", context_length=12, init_context="cut")


# --- what does not fit ------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_one_line_with_the_names(files):
    wider = dataclasses.replace(MODEL, vision=MODEL.vision | {"width": 48})
    with pytest.raises(
        UserError, match=r"do not fit the model: of another shape: visual\.class_embedding \[32\]"
    ) as no:
        begun(files / "plain.pt", wider)
    assert "\n" not in str(no.value)
    deeper = dataclasses.replace(MODEL, text=MODEL.text | {"layers": 2})
    with pytest.raises(UserError, match=r"missing: text\.transformer\.resblocks\.1\..* and 6 more"):
        begun(files / "plain.pt", deeper)
    shallower = dataclasses.replace(MODEL, vision=MODEL.vision | {"no_ln_pre": True})
    with pytest.raises(UserError, match=r"without a place in the model: visual\.ln_pre\.weight, visual\.ln_pre\.bias"):
        begun(files / "plain.pt", shallower)


def test_what_fits_is_taken_where_one_says_so(files, theirs):
    deeper = dataclasses.replace(MODEL, text=MODEL.text | {"layers": 2})
    towers, lines = begun(files / "plain.pt", deeper, init_strict=False)
    assert torch.equal(towers.model.text.ln_final.weight, theirs.ln_final.weight)
    assert "17 as they are, 12 fresh (text.transformer.resblocks.1." in lines[2]


def test_files_that_are_no_weights(tmp_path):
    (tmp_path / "text.pt").write_text("nothing of the kind")
    torch.save({"model": torch.nn.Linear(2, 2)}, tmp_path / "objects.pt")
    torch.save({"epoch": 3}, tmp_path / "numbers.pt")
    torch.save({"visual.proj": torch.tensor([torch.nan])}, tmp_path / "nan.pt")
    torch.save({"foo": torch.ones(2)}, tmp_path / "other.pt")
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "script.pt"))
    for name, said in (
        ("text.pt", "no file of tensors"),
        ("objects.pt", "no file of tensors, or holds more than tensors"),
        ("script.pt", "TorchScript"),
        ("numbers.pt", "holds no state dict"),
        ("nan.pt", "visual.proj is not finite"),
        ("other.pt", "without a place in the model: foo"),
    ):
        with pytest.raises(UserError, match=said) as no:
            begun(tmp_path / name)
        assert "\n" not in str(no.value)
    with pytest.raises(UserError, match="not one of the weights fits the model: they hold foo"):
        begun(tmp_path / "other.pt", init_strict=False)


def test_another_activation_is_refused_where_the_weights_tell_of_it(files):
    with pytest.raises(UserError, match="trained with quick_gelu=false, and the model has true"):
        begun(files / "exported", quick_gelu=True)
    with pytest.raises(UserError, match="trained with quick_gelu=true, and the model has false"):
        begin_from(Model(name="ViT-B-32", init="openai"), build_towers(MODEL))


def test_a_logit_scale_above_the_bound_is_told(files, theirs, tmp_path):
    torch.save(
        theirs.state_dict() | {"logit_scale": torch.tensor(5.0), "logit_bias": torch.tensor(-10.0)}, tmp_path / "a.pt"
    )
    towers, lines = begun(tmp_path / "a.pt")
    assert towers.logit_scale() == pytest.approx(100)
    assert lines[-2:] == ["not used of the weights: logit_bias", "logit scale 148.4, held at model.logit_scale_max=100"]


def test_the_tags_are_those_of_open_clip():
    for name in ("ViT-B-32", "ViT-B-32-quickgelu", "ViT-SO400M-14-SigLIP", "no-such"):
        theirs = set(open_clip.list_pretrained_tags_by_model(name))
        assert theirs <= set(pretrained_tags(name))
    with pytest.raises(
        UserError,
        match=r"'laion2b_s34b_b79' is no file, no folder and no tag of ViT-B-32; did you mean laion2b_s34b_b79k",
    ):
        begin_from(Model(name="ViT-B-32", init="laion2b_s34b_b79"), build_towers(MODEL))


# --- runs -------------------------------------------------------------------------------------------------------------

WHOLE = ("data.crop_scale=[1.0,1.0]", "optim.lr=1e-3", "optim.warmup_steps=2")


@pytest.fixture(scope="module")
def urls(tmp_path_factory) -> str:
    return write_pairs(tmp_path_factory.mktemp("data"), 1, 8, size=16)


def rows(folder: Path) -> list[dict]:
    return list(read_rows(folder / "run/metrics.jsonl"))


def test_the_first_loss_of_a_run_is_that_of_open_clip(files, theirs, urls, tmp_path, monkeypatch):
    """Of the pixels and tokens that the towers are handed."""
    seen = {"image": {}, "text": {}}  # by position
    call = Tower.__call__

    def recorded(tower, inputs, positions=None):
        if positions is not None and len(inputs) > 1:  # not the trial of one sample; behind a chunk's own come padding
            for row, position in zip(inputs, positions.tolist(), strict=True):
                seen[tower.name].setdefault(position, row.clone())
        return call(tower, inputs, positions)

    monkeypatch.setattr(Tower, "__call__", recorded)
    init = f"model.init={files / 'epoch_3.pt'}"
    train(tiny_config(tmp_path, urls, *WHOLE, init, "train.samples=8", "optim.warmup_steps=0"))
    pixels = torch.stack([seen["image"][position] for position in range(8)]) / 255
    tokens = torch.zeros(8, 8, dtype=torch.int64)
    for position, row in seen["text"].items():
        tokens[position, : len(row)] = row
    mean, std = (torch.tensor(each)[:, None, None] for each in (theirs.visual.image_mean, theirs.visual.image_std))
    with torch.no_grad():
        image = theirs.encode_image((pixels - mean) / std, normalize=True)
        text = theirs.encode_text(tokens, normalize=True)
        loss = open_clip.ClipLoss()(image, text, theirs.logit_scale.exp())
    assert rows(tmp_path)[0]["loss"] == pytest.approx(loss.item(), abs=1e-6)
    log = (tmp_path / "run/run.log").read_text()
    assert "image tower: 20 tensors, 19.68k numbers: 20 as they are\n" in log
    assert "from the start, with the weights of " in log


def test_a_run_begins_with_the_weights_of_another_and_resumes_without_it(urls, tmp_path):
    """Weights only: its steps, its schedule and its moments are new; once it has a checkpoint the other may go."""
    train(tiny_config(tmp_path, urls, *WHOLE))
    first, before = tmp_path / "first", rows(tmp_path)
    (tmp_path / "run").rename(first)
    words = (*WHOLE, f"model.init={first}", "seed=9")
    train(tiny_config(tmp_path, urls, *words))
    after = rows(tmp_path)
    assert [(row["step"], row["lr"]) for row in after] == [(row["step"], row["lr"]) for row in before]
    assert after[0]["loss"] < before[-1]["loss"] < before[0]["loss"]
    notes = check_training(
        tiny_config(tmp_path, urls, *words, f"run.dir={tmp_path / 'other'}", f"resume={first}", "train.samples=48")
    )
    assert f"warning: model.init={first} is not used: resume={first} has weights" in notes
    shutil.rmtree(first)
    assert train(tiny_config(tmp_path, urls, *words, "train.samples=40"))[0].startswith("trained 1 step")
    with pytest.raises(UserError, match=r"^model\.init: no weights: '.*first' is no file and no folder$"):
        train(tiny_config(tmp_path, urls, *words, f"run.dir={tmp_path / 'new'}"))
    assert not (tmp_path / "new").exists()


def begin_on(rank: int, size: int, config: Config) -> dict[str, torch.Tensor]:
    """The weights of a rank's towers, which were built with a seed of its own."""
    towers, device = build_towers(config.model, seed=rank), torch.device("cpu")
    Learner(config, towers, World(rank, size, rank, device), Parts(device)).begin(None)
    return towers.model.state_dict()


def test_every_rank_begins_with_them(files, theirs, tmp_path):
    config = tiny_config(tmp_path, "x.tar", f"model.init={files / 'apart.pt'}")
    for state in run_ranks(begin_on, 2, config):
        assert torch.equal(state["visual.proj"], theirs.visual.proj)
        assert torch.equal(state["text.positional_embedding"], theirs.positional_embedding)


def test_what_is_refused_is_refused_on_every_rank(files, tmp_path):
    config = tiny_config(tmp_path, "x.tar", f"model.init={files / 'apart.pt'}", "model.text.layers=2")
    with pytest.raises(
        RuntimeError, match=r"SharedError: model\.init: the weights do not fit the model: missing: "
    ) as no:
        run_ranks(begin_on, 2, config)
    assert str(no.value).count("SharedError: model.init: the weights do not fit") >= 2
