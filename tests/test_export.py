"""clipscale/export: what was trained opens in open_clip, transformers and onnxruntime, and is the same there."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from tiny import MODEL, save_run

from clipscale.cli import main
from clipscale.config import Model, Preprocess
from clipscale.data.pixels.decode import Decoding
from clipscale.errors import UserError
from clipscale.eval.view import View
from clipscale.export.export import export_model
from clipscale.files import append_rows
from clipscale.towers import Towers, build_towers
from clipscale.weights.start import begin_from
from clipscale.weights.target import find_target, open_towers

NAME = "ViT-test-export"
SETTINGS = {
    "embed_dim": 16,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
NAMED = Model(name=NAME)
TIMM = dataclasses.replace(MODEL, vision={"timm_model_name": "test_vit", "image_size": 32})
CAPTIONS = ["a red circle", "Two large Blue stars, isn't it?", ""]


@pytest.fixture(scope="module", autouse=True)
def named(tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("models")
    (folder / f"{NAME}.json").write_text(json.dumps(SETTINGS))
    open_clip.add_model_config(folder)


@pytest.fixture
def few(monkeypatch) -> None:
    """Of the pictures and captions that a card tells of."""
    monkeypatch.setattr("clipscale.export.differences.SAMPLES", 20)


def exported(model: Model, folder: Path, kind: str, *words: str) -> tuple[Path, Towers]:
    towers = save_run(folder / "run", model)
    export_model(*find_target(str(folder / "run"), list(words)), kind, str(folder / "out"))
    return folder / "out", towers


def inputs(towers: Towers, n: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """uint8 pictures, the same as open_clip prepares them, and tokens of CAPTIONS."""
    images = towers.noise(towers.image, n)
    tokens = open_clip.SimpleTokenizer(context_length=towers.context_length)(CAPTIONS[:n])
    return images, towers.image.prepare(images, torch.float32), tokens


@torch.no_grad()
def difference(towers: Towers, model: torch.nn.Module) -> float:
    images, pixels, tokens = inputs(towers)
    pairs = (
        (towers.image(images), model.encode_image(pixels, normalize=True)),
        (towers.text(tokens), model.encode_text(tokens, normalize=True)),
    )
    assert model.logit_scale.item() == pytest.approx(3.0)
    return max((ours - theirs).abs().max().item() for ours, theirs in pairs)


# --- open_clip --------------------------------------------------------------------------------------------------------


def test_each_call_of_open_clip_opens_a_model_by_name(tmp_path):
    folder, towers = exported(NAMED, tmp_path, "open_clip")
    file = str(folder / "open_clip_model.safetensors")
    plain, _, preprocess = open_clip.create_model_and_transforms(NAME, pretrained=file)
    for model in (
        plain,
        open_clip.create_model(f"local-dir:{folder}"),
        open_clip.create_model(NAME, pretrained=file, force_custom_text=True),
    ):
        assert difference(towers, model.eval()) == 0
    assert preprocess.transforms[0].size == 16
    assert open_clip.get_tokenizer(f"local-dir:{folder}")(CAPTIONS).shape == (3, 12)


def test_a_model_of_ones_own_opens_as_a_folder_and_by_a_name_that_it_is_given(tmp_path):
    folder, towers = exported(MODEL, tmp_path, "open_clip")
    assert difference(towers, open_clip.create_model(f"local-dir:{folder}").eval()) == 0
    fields = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    (tmp_path / "ViT-test-own.json").write_text(json.dumps(fields))
    open_clip.add_model_config(tmp_path / "ViT-test-own.json")
    for custom in (False, True):
        model = open_clip.create_model(
            "ViT-test-own", pretrained=str(folder / "open_clip_model.safetensors"), force_custom_text=custom
        )
        assert difference(towers, model.eval()) == 0


@pytest.mark.parametrize(
    ("model", "custom"),
    [
        (TIMM, False),
        (dataclasses.replace(MODEL, text=MODEL.text | {"proj_bias": True}), True),
        (dataclasses.replace(MODEL, text=MODEL.text | {"no_causal_mask": True, "pool_type": "last"}), False),
        (dataclasses.replace(MODEL, vision=MODEL.vision | {"pool_type": "avg", "ls_init_value": 0.1}), False),
    ],
    ids=["timm", "biased", "unmasked", "pooled"],
)
def test_other_models_open_as_a_folder(model, custom, tmp_path):
    folder, towers = exported(model, tmp_path, "open_clip")
    assert difference(towers, open_clip.create_model(f"local-dir:{folder}").eval()) == 0
    assert ("custom_text" in json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]) is custom


def test_another_size_is_exported_as_it_was_fitted(tmp_path):
    folder, _ = exported(NAMED, tmp_path, "open_clip", "model.image_size=32", "model.context_length=9")
    wanted = open_towers(*_again(tmp_path, "model.image_size=32", "model.context_length=9"))
    wanted.model.eval()
    assert (wanted.image_size, wanted.context_length) == (32, 9)
    assert difference(wanted, open_clip.create_model(f"local-dir:{folder}").eval()) == 0


def _again(folder: Path, *words: str):
    found, config = find_target(str(folder / "run"), list(words))
    return found, config.model


def test_what_was_exported_is_read_again(tmp_path):
    folder, towers = exported(NAMED, tmp_path, "open_clip")
    found, config = find_target(str(folder), [])
    assert config.model.quick_gelu
    again = open_towers(found, config.model)
    assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), towers.model.parameters(), strict=True))


def test_the_pixels_that_a_model_takes_come_along(tmp_path):
    model = dataclasses.replace(
        NAMED, preprocess=Preprocess(mean=(0.5, 0.5, 0.5), std=(0.4, 0.5, 0.6), resize_mode="squash")
    )
    folder, towers = exported(model, tmp_path, "open_clip")
    _, _, theirs = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    picture = Image.fromarray(torch.randint(0, 256, (20, 30, 3), dtype=torch.uint8).numpy())
    image = View(16, Decoding(max_pixels=10**6), towers.preprocess)(_png(picture))
    torch.testing.assert_close(towers.image.prepare(image[None], torch.float32)[0], theirs(picture))
    assert find_target(str(folder), [])[1].model.preprocess == model.preprocess
    with pytest.raises(UserError, match=r"another mean: set model\.preprocess\.mean=\[0\.5,0\.5,0\.5\]"):
        begin_from(dataclasses.replace(NAMED, init=str(folder)), build_towers(NAMED))


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


# --- transformers -----------------------------------------------------------------------------------------------------


@pytest.mark.needs("transformers")
@pytest.mark.parametrize("model", [NAMED, pytest.param(MODEL, marks=pytest.mark.slow)], ids=["quick_gelu", "gelu"])
def test_transformers_makes_the_same_embeddings(model, few, tmp_path):
    from transformers import AutoProcessor, CLIPModel

    folder, towers = exported(model, tmp_path, "transformers")
    theirs = CLIPModel.from_pretrained(folder).eval()
    images, pixels, tokens = inputs(towers)
    with torch.no_grad():
        result = theirs(pixel_values=pixels, input_ids=tokens)
        torch.testing.assert_close(result.image_embeds, towers.image(images), atol=1e-5, rtol=0)
        torch.testing.assert_close(result.text_embeds, towers.text(tokens), atol=1e-5, rtol=0)
    assert theirs.logit_scale.item() == pytest.approx(3.0)
    assert theirs.config.text_config.eos_token_id == 49407
    processor = AutoProcessor.from_pretrained(folder)
    ids = processor(text=CAPTIONS, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]
    assert ids.shape == tokens.shape
    assert ids.max() == 49407
    assert all(
        row[: row.index(49407)] == its[: its.index(49407)]
        for row, its in zip(ids.tolist(), tokens.tolist(), strict=True)
    )
    with torch.no_grad():  # its padding is another, which nothing looks at
        torch.testing.assert_close(theirs(pixel_values=pixels, input_ids=ids).text_embeds, result.text_embeds)
    assert processor.image_processor.size["shortest_edge"] == 16
    assert "over 20 pictures, " in (folder / "README.md").read_text()


@pytest.mark.needs("transformers")
@pytest.mark.parametrize(
    ("model", "said"),
    [
        (TIMM, "model.vision.timm_model_name='test_vit' has no counterpart"),
        (dataclasses.replace(MODEL, vision=MODEL.vision | {"no_ln_pre": True}), "model.vision.no_ln_pre=True has no"),
        (dataclasses.replace(MODEL, text=MODEL.text | {"pool_type": "last"}), "model.text.pool_type='last' has no"),
        (dataclasses.replace(MODEL, text=MODEL.text | {"vocab_size": 50000}), "vocabulary has 50000 tokens"),
    ],
    ids=["timm", "vision", "text", "vocabulary"],
)
def test_what_transformers_cannot_hold_is_one_line_and_leaves_nothing(model, said, tmp_path):
    with pytest.raises(UserError, match="this model cannot be exported to transformers: ") as no:
        exported(model, tmp_path, "transformers")
    assert said in str(no.value)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


# --- onnx -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.needs("onnx")
@pytest.mark.parametrize("model", [NAMED, TIMM], ids=["named", "timm"])
def test_onnxruntime_makes_the_same_embeddings_of_any_number(model, tmp_path):
    import onnxruntime

    folder, towers = exported(model, tmp_path, "onnx")
    image, text = (onnxruntime.InferenceSession(folder / f"{name}.onnx") for name in ("image", "text"))
    for n in (1, 2, 3):
        images, pixels, tokens = inputs(towers, n)
        with torch.no_grad():
            wanted = towers.image(images), towers.text(tokens)
        (found,) = image.run(None, {"pixels": pixels.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), wanted[0], atol=1e-5, rtol=0)
        (found,) = text.run(None, {"tokens": tokens.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), wanted[1], atol=1e-5, rtol=0)
    assert (folder / "image.onnx.data").stat().st_size > (folder / "image.onnx").stat().st_size / 10


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ViT-B-32", "open_clip"),
        pytest.param("ViT-B-32", "transformers", marks=pytest.mark.needs("transformers")),
        pytest.param("ViT-B-32", "onnx", marks=pytest.mark.needs("onnx")),
        pytest.param("ViT-L-14", "transformers", marks=pytest.mark.needs("transformers")),
    ],
)
def test_models_of_real_size(name, kind, tmp_path, request):
    """Compared as they are written: at batch 1, 2 and 5, to 1e-5."""
    if kind == "transformers":
        request.getfixturevalue("few")
    towers = build_towers(Model(name=name))
    torch.save(towers.model.state_dict(), tmp_path / "a.pt")
    lines = export_model(*find_target(str(tmp_path / "a.pt"), [f"model.name={name}"]), kind, str(tmp_path / "out"))
    assert "embeddings differ by " in lines[0]


# --- the command and the card -----------------------------------------------------------------------------------------


def test_the_card_tells_of_the_training(tmp_path):
    save_run(tmp_path / "run", NAMED)
    rows = [
        {"step": 2, "zeroshot/top1": 0.25},
        {"step": 4, "zeroshot/top1": 0.5, "cifar/pictures": 1200, "cifar/top5": None, "seconds/loss": 1.0},
        {"step": 6, "zeroshot/top1": 0.75},
    ]
    append_rows(tmp_path / "run/metrics.jsonl", rows)
    words = ["export", str(tmp_path / "run"), "--format", "open_clip", "--output", str(tmp_path / "out")]
    assert main(words) == 0
    card = (tmp_path / "out/README.md").read_text()
    for line in (
        f"# {NAME}",
        "| samples seen | 32 |",
        "| data | mine (weight 1) |",
        "| global batch | 4,096 |",
        "| zeroshot/top1 (step 4) | 0.5000 |\n| cifar/pictures (step 4) | 1,200 |\n",
        "| pictures | 16 x 16 |",
        'open_clip.create_model_and_transforms("local-dir:<this folder>")',
    ):
        assert line in card


def test_what_cannot_be_exported_is_told_at_once(tmp_path, capsys, monkeypatch):
    save_run(tmp_path / "run", NAMED)
    torch.save({"a": torch.ones(1)}, tmp_path / "a.pt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("clipscale.export.check.find_spec", lambda name: None)
    new = ["--output", "out"]
    for words, said in (
        (["run", "--format", "open_clip", "--output", "run"], "--output 'run' is there already"),
        (["nowhere", "--format", "open_clip", *new], "no weights: 'nowhere' is no file and no folder"),
        (["run", "--format", "onnx", *new], "onnx, onnxscript, onnxruntime; pip install 'clipscale[onnx]'"),
        (["run", "--format", "transformers", *new], "transformers; pip install 'clipscale[hf]'"),
        (["a.pt", "--format", "open_clip", *new], "no model: set model.name"),
        (["a.pt", "model.name=ViT-test-exprt", "--format", "open_clip", *new], "did you mean ViT-test-export"),
        (["a.pt", f"model.name={NAME}", "--format", "open_clip", *new], "without a place in the model: a"),
        (["ViT-B-32:opnai", "--format", "open_clip", *new], "no tag of ViT-B-32; did you mean openai?"),
        (["run", "model.image_size=4", "--format", "open_clip", *new], "does not take pictures of 4 x 4"),
    ):
        assert main(["export", *words]) == 2, words
        err = capsys.readouterr().err
        assert said in err
        assert err.count("\n") == 1, err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt", "run"]
