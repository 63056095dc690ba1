"""clipscale/towers: the towers are open_clip's, weight for weight and number for number."""

import dataclasses
import json
import math

import open_clip
import pytest
import torch
from PIL import Image
from tiny import MODEL

from clipscale.config import Model
from clipscale.errors import UserError
from clipscale.towers import build_towers
from clipscale.upstream.open_clip_files import logit_bias_init, logit_scale_init

CAPTIONS = ["a red circle", "the large blue star sits in the middle, on gravel", ""]


def model(vision: dict | None = None, text: dict | None = None, **changes) -> Model:
    """MODEL with other fields."""
    return dataclasses.replace(MODEL, vision=MODEL.vision | (vision or {}), text=MODEL.text | (text or {}), **changes)


def pictures(n: int, side: int) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))


@pytest.fixture(scope="module")
def named(tmp_path_factory) -> str:
    """A small model that open_clip knows by name, with settings that ours must hand through."""
    settings = {
        "embed_dim": 24,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 24, "layers": 2, "width": 64, "patch_size": 8, "head_width": 32},
        "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    }
    folder = tmp_path_factory.mktemp("models")
    (folder / "ViT-test-24.json").write_text(json.dumps(settings))
    open_clip.add_model_config(folder)
    return "ViT-test-24"


# --- parity with open_clip --------------------------------------------------------------------------------------------


def test_a_named_model_computes_what_open_clip_computes(named):
    towers = build_towers(Model(name=named), seed=1)
    theirs = open_clip.create_model(named, force_custom_text=True).eval()
    theirs.load_state_dict(towers.model.state_dict())
    images, side = pictures(5, 24), 24
    preprocess = open_clip.image_transform(side, is_train=False)
    prepared = torch.stack([preprocess(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in images])
    tokens = open_clip.get_tokenizer(named)(CAPTIONS)
    assert (towers.embed_dim, towers.image_size, towers.context_length) == (24, side, tokens.shape[1])
    towers.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(towers.image(images), theirs.encode_image(prepared, normalize=True))
        torch.testing.assert_close(towers.text(tokens), theirs.encode_text(tokens, normalize=True))
        assert math.isclose(towers.logit_scale(), theirs.logit_scale.exp().item(), rel_tol=1e-6)


def test_the_state_dict_goes_to_open_clip_and_back(named):
    towers = build_towers(Model(name=named), seed=1)
    theirs = open_clip.create_model(named, force_custom_text=True)
    theirs.load_state_dict(towers.model.state_dict(), strict=True)
    other = build_towers(Model(name=named), seed=2)
    other.model.load_state_dict(theirs.state_dict(), strict=True)
    for ours, back in zip(towers.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(ours, back)


def test_one_of_open_clips_own_models():
    towers = build_towers(Model(name="ViT-S-32-alt"))
    assert (towers.embed_dim, towers.image_size, towers.tokenizer.name) == (256, 224, "ViT-S-32-alt")
    assert sum(parameter.numel() for parameter in towers.model.parameters()) > 40e6


def test_a_timm_backbone():
    towers = build_towers(model({"timm_model_name": "test_vit", "image_size": 32}))
    assert type(towers.model.visual).__name__ == "TimmModel"
    embeddings = towers.image(pictures(2, 32))
    assert embeddings.shape == (2, 16)
    embeddings[:, 0].sum().backward()
    weights = [parameter for parameter in towers.model.visual.parameters() if parameter.ndim > 1]
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in weights)


def test_embeddings_are_unit_vectors_in_float32_and_follow_a_float64_model():
    towers = build_towers(MODEL)
    for tower, inputs in ((towers.image, pictures(3, 16)), (towers.text, torch.randint(1, 1000, (3, 8)))):
        assert tower(inputs).dtype == torch.float32
        torch.testing.assert_close(tower(inputs).norm(dim=1), torch.ones(3))
    towers.model.double()
    assert towers.image(pictures(3, 16)).dtype == torch.float64
    low = build_towers(MODEL, autocast=torch.bfloat16)
    assert low.image(pictures(3, 16)).dtype == torch.float32
    difference = (low.image(pictures(3, 16)) - towers.image(pictures(3, 16))).norm(dim=1)
    assert 1e-5 < difference.max() < 3e-2  # bf16 inside, close all the same


# --- weights and the logit scale --------------------------------------------------------------------------------------


def test_the_seed_decides_the_weights_and_nothing_else_does():
    torch.manual_seed(0)
    first = build_towers(MODEL, seed=4).model.state_dict()
    after = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(1), after)  # building leaves the caller's randomness alone
    again, other = (build_towers(MODEL, seed=seed).model.state_dict() for seed in (4, 5))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["visual.conv1.weight"], other["visual.conv1.weight"])


def test_logit_scale_starts_as_told_and_is_clamped():
    assert math.isclose(build_towers(MODEL).logit_scale(), 1 / 0.07, rel_tol=1e-6)
    towers = build_towers(model(logit_scale_init=20.0, logit_scale_max=30.0))
    assert math.isclose(towers.logit_scale(), 20.0, rel_tol=1e-6)
    for log_scale, clamped in ((9.0, 30.0), (2.0, math.exp(2.0))):
        with torch.no_grad():
            towers.model.logit_scale.fill_(log_scale)
        assert towers.clamp_logit_scale() == (clamped == 30.0)
        assert math.isclose(towers.logit_scale(), clamped, rel_tol=1e-6)
        assert not towers.clamp_logit_scale()


def test_logit_scale_starts_as_the_named_model_has_it(monkeypatch):
    """As open_clip's factory builds it: of its JSONs none has another, so one is given."""
    settings = open_clip.get_model_config("ViT-B-32")
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: settings | {"init_logit_scale": math.log(10)})
    theirs = open_clip.CustomTextCLIP(**settings, init_logit_scale=math.log(10))
    assert math.isclose(logit_scale_init(Model(name="ViT-B-32")), theirs.logit_scale.exp().item(), rel_tol=1e-6)
    assert logit_scale_init(Model(name="ViT-B-32", logit_scale_init=20.0)) == 20.0
    assert logit_scale_init(MODEL) == pytest.approx(1 / 0.07, rel=1e-15)
    assert logit_bias_init(Model(name="ViT-B-32")) is None


def test_encoder_parameters_are_all_but_the_logit_scale():
    towers = build_towers(MODEL)
    ours = {id(parameter) for parameter in towers.encoder_parameters()}
    rest = [name for name, parameter in towers.model.named_parameters() if id(parameter) not in ours]
    assert rest == ["logit_scale"]


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (Model(name="ViT-B-3"), r"model\.name='ViT-B-3' is no open_clip model; did you mean ViT-B-32"),
        (Model(), r"no model: set model\.name to one of open_clip's, or describe"),
        (Model(name="zzz"), r"'zzz' is no open_clip model; see open_clip\.list_models"),
        (Model(name="coca_ViT-B-32"), "coca_ViT-B-32' needs multimodal_cfg"),
        (model({"widht": 3}), r"unknown key model\.vision\.widht; did you mean model\.vision\.width\?"),
        (model(text={"haeds": 3}), r"unknown key model\.text\.haeds; did you mean model\.text\.heads\?"),
        (model({"zzz": 3}), "the fields are layers, width, head_width"),
        (model({"layers": [1, 1, 1, 1], "width": 8, "image_size": 32}), r"BatchNorm \(visual\.bn1\).*ViT"),
        (model({"timm_model_name": "test_resnet"}), r"BatchNorm \(visual\.trunk"),
        (model({"timm_model_name": "nope"}), r"cannot be built: RuntimeError: Unknown model \(nope\)"),
        (model({"timm_model_name": "swin_tiny_patch4_window7_224", "image_size": 32}), "pictures of 32 x 32.*224"),
        (model({"image_size": 4}), "does not take pictures of 4 x 4"),
        (model({"image_size": [16, 24]}), r"image_size=\[16, 24\] must be square"),
        (model({"patch_dropout": 1.5}), r"cannot be built: AssertionError: assert 0 <= prob < 1"),
        (model({"head_width": 0}), "cannot be built: ZeroDivisionError"),
        (model({"output_tokens": True}), "does not take pictures of 16 x 16"),
        (model(text={"output_tokens": True}), "does not take captions of 8 tokens"),
        (model(text={"heads": 3}), "must be divisible"),
        (model(text={"context_length": 0}), "does not take captions of 0 tokens"),
        (model(text={"vocab_size": 1000}), r"model\.text\.vocab_size=1000 is below the 49408"),
        (model(text={"tokenizer_mode": "clips"}), r"model\.text\.tokenizer_mode: .*CLIP's own tokenizer"),
        (model(text={"pool_type": "none"}), r"makes \[8, 16\] numbers .* embed_dim=16"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_models_that_cannot_be_trained_say_why_in_one_line(config, said):
    with pytest.raises(UserError, match=said) as error:
        build_towers(config)
    assert "\n" not in str(error.value)
