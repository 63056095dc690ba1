"""clipscale/towers/fast.py: open_clip's numbers by other forwards, embeddings and every gradient."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from open_clip.transformer import LayerNorm, ResidualAttentionBlock
from test_gradcache import gradients, worst_error
from test_walks import CONTEXT, END, make_captions

from clipscale.config import AS_OPEN_CLIP, Config, Model, TowerSettings, Train
from clipscale.errors import UserError
from clipscale.towers import Towers, build_towers
from clipscale.towers.fast import FastBlock, FastNorm, HalfStream

VISION = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 16}
TEXT = {"context_length": CONTEXT, "width": 64, "heads": 4, "layers": 2}
VISIONS = {
    "class token": {},
    "mean of the patches": {"pool_type": "avg"},
    "norm behind the pool": {"pool_type": "avg", "final_ln_after_pool": True, "no_ln_pre": True},
    "layer scale": {"ls_init_value": 0.3},
    "patch dropout": {"patch_dropout": 0.5},
}
TEXTS = {
    "highest token": {},
    "end of text": {"pool_type": "eos", "eos_id": END},
    "layer scale": {"ls_init_value": 0.3},
    "both ways": {"no_causal_mask": True, "pool_type": "last"},
}
AS_IT_COMES = {
    "class token": {"embed_cls": True},
    "custom": {"qk_norm": True},
}


def towers_of(
    settings: TowerSettings, dtype=torch.float32, *, vision=None, text=None, autocast=None, **changes
) -> Towers:
    """With weights that are no fresh ones: norms neither 1 nor 0."""
    model = Model(embed_dim=16, vision=VISION | (vision or {}), text=TEXT | (text or {}), **changes)
    towers, draw = build_towers(model, settings, seed=3, autocast=autocast), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in towers.model.named_parameters():
            if name != "logit_scale":
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    towers.model.to(dtype).train()
    return towers


def pictures(n: int = 6, side: int = 32) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def passed(towers: Towers, images: torch.Tensor | None, tokens: torch.Tensor | None):
    """Embeddings of each tower that gets inputs, and every gradient of their product with fixed numbers."""
    found = []
    for tower, inputs in ((towers.image, images), (towers.text, tokens)):
        if inputs is not None:
            embeddings = tower(inputs, torch.arange(len(inputs)))
            weights = torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
            (embeddings * weights.to(embeddings)).sum().backward()
            found.append(embeddings.detach())
    return torch.cat(found), gradients(towers)


def assert_same(make, images, tokens, bar: float) -> None:
    """`make(settings)` -> towers: by default settings as by open_clip's own forwards."""
    (ours, our_grads), (theirs, their_grads) = (
        passed(make(way), images, tokens) for way in (TowerSettings(), AS_OPEN_CLIP)
    )
    assert (ours - theirs).abs().max() <= bar
    assert worst_error(our_grads, their_grads) <= bar


# --- the same numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "bar"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=["fp32", "fp64"])
@pytest.mark.parametrize("kind", VISIONS)
def test_pictures(kind, dtype, bar):
    make = partial(towers_of, dtype=dtype, vision=VISIONS[kind], quick_gelu=kind == "layer scale")
    towers = make(TowerSettings())
    assert all(type(block) is FastBlock and not block.causal for block in towers.model.visual.transformer.resblocks)
    assert_same(make, pictures(), None, bar)


@pytest.mark.parametrize(("dtype", "bar"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=["fp32", "fp64"])
@pytest.mark.parametrize("kind", TEXTS)
def test_captions(kind, dtype, bar):
    make = partial(towers_of, dtype=dtype, text=TEXTS[kind], quick_gelu=kind == "layer scale")
    causal = [block.causal for block in make(TowerSettings()).model.text.transformer.resblocks]
    assert causal == [kind != "both ways"] * 2
    assert_same(make, None, make_captions(6), bar)


def test_captions_cut_at_every_length():
    """Against open_clip's mask, cut; and the full length, whose mask it has not heard of."""
    ours, theirs = (towers_of(way, torch.float64) for way in (TowerSettings(), AS_OPEN_CLIP))
    tokens = make_captions(3)
    for length in range(2, CONTEXT + 1):
        cut = tokens[:, :length].clone()
        cut[:, -1] = END
        with torch.no_grad():
            torch.testing.assert_close(ours.text(cut), theirs.text(cut), rtol=0, atol=1e-12)


@pytest.mark.parametrize("causal", [True, False])
def test_a_mask_that_is_wrong_is_seen(causal, monkeypatch):
    """The check of parity finds blocks that look ahead, and those of pictures that do not."""
    make = partial(towers_of, dtype=torch.float64)
    towers = make(TowerSettings())
    encoder, inputs = (
        (towers.model.text, (None, make_captions(4))) if causal else (towers.model.visual, (pictures(), None))
    )
    for block in encoder.transformer.resblocks:
        block.causal = not causal
    ours, theirs = (passed(each, *inputs)[0] for each in (towers, make(AS_OPEN_CLIP)))
    assert (ours - theirs).abs().max() > 1e-3


def test_drop_path_draws_the_same():
    """timm's tower stays as it is, and a swap of open_clip's leaves what draws by position."""
    vision = {"image_size": 64, "timm_model_name": "test_vit", "timm_drop_path": 0.4, "patch_dropout": 0.3}
    (ours, grads), (theirs, their_grads) = (
        passed(towers_of(way, vision=vision), pictures(side=64), None) for way in (TowerSettings(), AS_OPEN_CLIP)
    )
    assert torch.equal(ours, theirs)
    assert all(torch.equal(grads[name], their_grads[name]) for name in their_grads)


@pytest.mark.parametrize("kind", AS_IT_COMES)
def test_what_is_not_known_stays(kind):
    make = partial(towers_of, text=AS_IT_COMES[kind])
    assert not any(isinstance(module, FastBlock) for module in make(TowerSettings()).model.text.modules())
    ours, theirs = (passed(make(way), None, make_captions(4))[0] for way in (TowerSettings(), AS_OPEN_CLIP))
    assert torch.equal(ours, theirs)
    told = "TextTransformer as it comes" if kind == "custom" else "2 blocks of open_clip's"
    assert make(TowerSettings()).how_computed().endswith(f"text: {told}")


def test_the_state_dict_and_what_is_off():
    ours, theirs = towers_of(TowerSettings()), towers_of(AS_OPEN_CLIP)
    assert [*ours.model.state_dict()] == [*theirs.model.state_dict()]
    kinds = {type(module) for module in theirs.model.modules()}
    assert {ResidualAttentionBlock, LayerNorm} < kinds
    assert not kinds & {FastBlock, FastNorm, HalfStream}
    theirs.model.load_state_dict(ours.model.state_dict())


def test_an_evaluation_is_open_clips_to_the_bit():
    images, tokens = pictures(), make_captions(6)
    for autocast, residual in ((None, "open_clip"), (torch.bfloat16, "bf16")):
        ours, theirs = (towers_of(way, autocast=autocast) for way in (TowerSettings(residual=residual), AS_OPEN_CLIP))
        trained = ours.image(images).detach()
        for towers in (ours, theirs):
            towers.model.eval()
        with torch.no_grad():
            assert torch.equal(ours.image(images), theirs.image(images))
            assert torch.equal(ours.text(tokens), theirs.text(tokens))
            assert not torch.equal(ours.image(images), trained)


# --- bf16 -------------------------------------------------------------------------------------------------------------


def errors(settings: TowerSettings) -> tuple[float, float]:
    """Of embeddings and of gradients under bf16, relative to float64 with the same weights, over both towers."""
    images, tokens = pictures(32), make_captions(32)
    wanted, wanted_grads = passed(towers_of(AS_OPEN_CLIP, torch.float64), images, tokens)
    found, found_grads = passed(towers_of(settings, autocast=torch.bfloat16), images, tokens)
    square = sum((found_grads[name] - wanted_grads[name]).square().sum() for name in wanted_grads)
    norm = sum(grad.square().sum() for grad in wanted_grads.values())
    return ((found - wanted).norm() / wanted.norm()).item(), (square / norm).sqrt().item()


def test_bf16_is_as_near_to_float64_as_by_open_clip():
    ours, theirs = errors(TowerSettings()), errors(AS_OPEN_CLIP)
    assert ours[0] <= theirs[0]
    assert ours[1] <= theirs[1]


def test_the_residual_stream_in_bf16_costs_little_and_is_asked_for():
    found, plain = errors(TowerSettings(residual="bf16")), errors(AS_OPEN_CLIP)
    assert plain[0] < found[0] < 1.3 * plain[0]
    assert plain[1] < found[1] < 1.3 * plain[1]


def saved_types(settings: TowerSettings) -> set[torch.dtype]:
    """Of the tensors of a caption's shape that the text tower's graph keeps."""
    towers, found = towers_of(settings, autocast=torch.bfloat16), set()

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape == (8, CONTEXT, 64):
            found.add(tensor.dtype)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        towers.text(make_captions(8))
    return found


def test_types_of_the_stream():
    assert saved_types(TowerSettings()) == {torch.float32}
    assert saved_types(TowerSettings(residual="bf16")) == {torch.bfloat16}


def test_residual_wants_bf16():
    with pytest.raises(UserError, match=r"^towers\.residual=bf16 is not for train\.precision=fp16; set"):
        Config(towers=TowerSettings(residual="bf16"), train=Train(precision="fp16"))
    with pytest.raises(UserError, match=r"^towers\.residual=bf16 wants .* on a cpu train\.precision=auto is another"):
        towers_of(TowerSettings(residual="bf16"))


# --- what is told -----------------------------------------------------------------------------------------------------


def test_what_is_fast_is_told():
    plain = towers_of(TowerSettings(), autocast=torch.bfloat16)
    line = "2 blocks of fast attention (flash), {} norms in bf16"
    assert plain.how_computed() == f"image: {line.format(6)}; text: {line.format(5)}"
    half = towers_of(TowerSettings(residual="bf16"), autocast=torch.bfloat16)
    assert half.how_computed().endswith("in bf16, residual stream in bf16")
    timm = towers_of(AS_OPEN_CLIP, vision={"timm_model_name": "test_vit"})
    assert timm.how_computed() == "image: TimmModel as it comes; text: 2 blocks of open_clip's"
    both = towers_of(TowerSettings(checkpoint_blocks=True, compile=True))
    assert both.how_computed().count("(flash), blocks compiled, blocks checkpointed") == 2


def test_the_backend_is_the_one_that_runs():
    """What a profiler sees of torch's attention, and of the zeros that open_clip's has filled for q, k and v."""
    zeros = {}
    for way in TowerSettings(), AS_OPEN_CLIP:
        towers = towers_of(way)
        with torch.profiler.profile() as profile:
            passed(towers, pictures(), make_captions(4))
        counts = {event.key: event.count for event in profile.key_averages()}
        names = {name for name in counts if "scaled_dot_product" in name}
        kernel = "aten::_scaled_dot_product_flash_attention_for_cpu"
        assert names == {"aten::scaled_dot_product_attention", kernel, f"{kernel}_backward"}
        zeros[way] = counts["aten::select_backward"]
    assert zeros == {TowerSettings(): 1, AS_OPEN_CLIP: 1 + 3 * 4}  # the class token; four blocks
