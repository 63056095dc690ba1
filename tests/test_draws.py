"""clipscale/towers/draws.py: what a sample draws depends on key, layer and position, and on nothing else."""

from __future__ import annotations

import copy
import math

import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from open_clip.transformer import PatchDropout
from torch import Tensor, nn

from clipscale.config import Model
from clipscale.towers import Towers, build_towers, tower
from clipscale.towers.draws import draw_by_position, drawing, draws_by_chunk

KEY, FAR = 5, 10**12
TEXT = {"context_length": 8, "width": 32, "heads": 2, "layers": 1}
VISIONS = {
    "open_clip": {"image_size": 32, "patch_size": 4, "width": 32, "layers": 2, "head_width": 16, "patch_dropout": 0.5},
    "timm": {"image_size": 64, "timm_model_name": "test_vit", "timm_drop_path": 0.4, "patch_dropout": 0.3},
}
PATCH_DROPOUTS = {
    "open_clip": PatchDropout,
    "open_clip, every token": lambda prob: PatchDropout(prob, exclude_first_token=False),
    "timm": timm.layers.PatchDropout,
    "timm, ordered, 3 in front": lambda prob: timm.layers.PatchDropout(prob, num_prefix_tokens=3, ordered=True),
    "timm, with indices": timm.layers.PatchDropoutWithIndices,
}
FRONT = dict(zip(PATCH_DROPOUTS, (1, 0, 1, 3, 1), strict=True))


def by_position(*modules: nn.Module) -> nn.Module:
    """The modules one after another, in training mode, drawing by position."""
    encoder = nn.Sequential(*modules).train()
    draw_by_position(encoder)
    return encoder


def at(encoder: nn.Module, x: Tensor, positions: Tensor | None = None, key: int = KEY) -> Tensor:
    with drawing(key, torch.arange(len(x)) if positions is None else positions):
        return encoder(x)


def kept(layer: nn.Module, positions: Tensor, patches: int, front: int = 1, key: int = KEY) -> Tensor:
    """Which patches a patch dropout keeps, int64 [M, K], found by what comes out."""
    out = at(layer, torch.arange(-front, patches).expand(len(positions), -1)[..., None], positions, key)
    out = out[0] if isinstance(out, tuple) else out
    return out[:, front:, 0]


def towers_of(kind: str, seed: int = 3) -> Towers:
    towers = build_towers(Model(embed_dim=16, vision=VISIONS[kind], text=TEXT), seed=seed)
    towers.model.double().train()
    return towers


def pictures(n: int, side: int) -> Tensor:
    return torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=torch.manual_seed(n))


# --- chunks, orders, subsets ------------------------------------------------------------------------------------------

POSITIONS = torch.arange(FAR, FAR + 12)


def worst_difference(kind: str) -> float:
    """Of 12 pictures' embeddings in float64, cut into chunks, shuffled and in part, from those of one chunk."""
    image = towers_of(kind).image
    x = pictures(12, VISIONS[kind]["image_size"])
    shuffled, some = torch.randperm(12, generator=torch.manual_seed(1)), torch.tensor([7, 2])
    ways = [*(torch.arange(12).split(size) for size in (1, 5)), [shuffled], shuffled.split(4), [some]]
    worst = 0.0
    with torch.no_grad():
        whole = image(x, POSITIONS)
        for chunks in ways:
            found = torch.cat([image(x[chunk], POSITIONS[chunk]) for chunk in chunks])
            worst = max(worst, (found - whole[torch.cat([*chunks])]).abs().max().item())
    return worst


@pytest.mark.parametrize("kind", VISIONS)
def test_chunks_and_orders_change_nothing(kind):
    assert worst_difference(kind) < 1e-13


@pytest.mark.parametrize("kind", VISIONS)
def test_catches_draws_by_the_row_in_the_chunk(kind, monkeypatch):
    monkeypatch.setattr(tower, "drawing", lambda key, positions: drawing(key, torch.arange(len(positions))))
    assert worst_difference(kind) > 1e-3


@pytest.mark.parametrize("kind", VISIONS)
def test_catches_draws_from_torchs_generator(kind, monkeypatch):
    monkeypatch.setattr(tower, "drawing", lambda key, positions: torch.random.fork_rng(devices=[]))
    assert worst_difference(kind) > 1e-3


@pytest.mark.parametrize("kind", VISIONS)
def test_what_is_drawn_depends_on_seed_and_position(kind):
    towers, x = towers_of(kind), pictures(4, VISIONS[kind]["image_size"])
    state = torch.get_rng_state()
    with torch.no_grad():
        first = towers.image(x, POSITIONS[:4])
        assert torch.equal(towers.image(x, POSITIONS[:4]), first)
        assert not torch.isclose(towers.image(x, POSITIONS[1:5]), first).all(dim=1).any()
        assert torch.equal(torch.get_rng_state(), state)  # nothing comes from torch's generator
        other = towers_of(kind, seed=4)
        assert len({one.draw_key for two in (towers, other) for one in (two.image, two.text)}) == 4
        other.model.load_state_dict(towers.model.state_dict())
        assert not torch.isclose(other.image(x, POSITIONS[:4]), first).all(dim=1).any()


def test_every_row_has_its_position():
    with pytest.raises(AssertionError):
        towers_of("open_clip").image(pictures(4, 32), POSITIONS[:2])


# --- patch dropout ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PATCH_DROPOUTS)
def test_as_many_patches_as_before_in_their_order(kind):
    for prob in (0.1, 0.5, 0.75, 0.99):
        layer, theirs = by_position(PATCH_DROPOUTS[kind](prob)), PATCH_DROPOUTS[kind](prob).train()
        for patches in (1, 2, 7, 49):
            x = torch.randn(6, FRONT[kind] + patches, 3, generator=torch.manual_seed(0))
            out, wanted = at(layer, x), theirs(x)
            ids = kept(layer, torch.arange(6), patches, FRONT[kind])
            if kind == "timm, with indices":
                assert torch.equal(out[1], ids)
                assert out[1].dtype == wanted[1].dtype
                out, wanted = out[0], wanted[0]
            assert out.shape == wanted.shape
            assert torch.equal(out[:, : FRONT[kind]], x[:, : FRONT[kind]])
            assert torch.equal(out[:, FRONT[kind] :], x[:, FRONT[kind] :].gather(1, ids[..., None].expand(-1, -1, 3)))
            assert (ids.diff(dim=1) > 0).all()


def test_nothing_happens_where_nothing_is_dropped():
    x = torch.randn(2, 5, 3)
    for kind, make in PATCH_DROPOUTS.items():
        for layer in (by_position(make(0.0)), by_position(make(0.5)).eval()):
            out = at(layer, x)
            assert (out[0] if kind == "timm, with indices" else out) is x
    for layer in (by_position(timm.layers.DropPath(0.0)), by_position(timm.layers.DropPath(0.5)).eval()):
        assert at(layer, x) is x


def deviations(ids: Tensor, patches: int) -> list[float]:
    """How often each patch, and each pair of neighbours, is kept: chi-square in standard deviations from its mean."""
    samples, number = ids.shape
    mask = torch.zeros(samples, patches, dtype=torch.float64).scatter_(1, ids, 1)
    p = number / patches
    single = ((mask.sum(0) - samples * p) ** 2).sum() / (samples * p * (1 - p)) * (patches - 1) / patches
    pair = p * (number - 1) / (patches - 1)
    pairs = ((mask * mask.roll(1, 1)).sum(0).mean() - samples * pair) / math.sqrt(samples * pair * (1 - pair) / patches)
    overlap = ((mask[1:] * mask[:-1]).sum(1).mean() - number * p) / math.sqrt(number * p * (1 - p) / samples)
    return [(single.item() - (patches - 1)) / math.sqrt(2 * (patches - 1)), pairs.item(), overlap.item()]


@pytest.mark.parametrize("kind", PATCH_DROPOUTS)
def test_every_patch_is_kept_as_often_as_by_the_original(kind):
    """Neighbours together, and in neighbouring positions, as often as chance has it; the original passes the same."""
    theirs = PATCH_DROPOUTS[kind](0.6).train()
    torch.manual_seed(0)
    x = torch.arange(-FRONT[kind], 20).expand(4000, -1)[..., None]
    out = theirs(x)
    out = out[0] if isinstance(out, tuple) else out
    ours = kept(by_position(PATCH_DROPOUTS[kind](0.6)), torch.arange(FAR, FAR + 4000), 20, FRONT[kind])
    for ids in (out[:, FRONT[kind] :, 0], ours):
        assert ids.shape == (4000, 8)
        assert max(map(abs, deviations(ids, 20))) < 4
    biased = torch.where(ours == 3, 4, ours)  # a control of the measure
    assert max(map(abs, deviations(biased, 20))) > 4


def test_layers_keys_and_positions_differ():
    both = by_position(PatchDropout(0.5), PatchDropout(0.5))
    positions = torch.arange(4)
    first = kept(both[0], positions, 64)
    for other in (
        kept(both[1], positions, 64),
        kept(both[0], positions, 64, key=KEY + 1),
        kept(both[0], positions + 4, 64),
    ):
        assert not (other[:, None] == first[None]).all(dim=2).any()
    assert torch.equal(kept(both[0], positions, 64), first)


def test_gradients_flow_to_what_was_kept():
    layer = by_position(PatchDropout(0.5))
    x = torch.randn(3, 11, 4, requires_grad=True)
    out = at(layer, x)
    weight = torch.randn_like(out)
    out.backward(weight)
    ids = kept(layer, torch.arange(3), 10)
    wanted = torch.zeros(3, 11, 4)
    wanted[:, 0] = weight[:, 0]
    wanted[:, 1:].scatter_(1, ids[..., None].expand(-1, -1, 4), weight[:, 1:])
    assert torch.equal(x.grad, wanted)


# --- drop path --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("prob", [0.1, 0.37, 0.9])
def test_drop_path_drops_at_its_rate_and_scales_as_before(prob, scaled, dtype):
    samples = 20_000
    x = torch.ones(samples, 2, 3, dtype=dtype)
    ours = at(by_position(timm.layers.DropPath(prob, scaled)), x)
    torch.manual_seed(0)
    theirs = timm.layers.DropPath(prob, scaled).train()(x)
    assert ours.dtype == dtype
    assert (ours == ours[:, :1, :1]).all()  # a sample as a whole
    assert torch.equal(ours.unique(), theirs.unique())  # 0 and the same scale
    rate = (ours[:, 0, 0] == 0).double().mean().item()
    assert abs(rate - prob) < 4 * math.sqrt(prob * (1 - prob) / samples)
    expected = 1 if scaled else 1 - prob
    assert ours.double().mean().item() == pytest.approx(expected, abs=4 * math.sqrt(prob / (1 - prob) / samples) + 2e-3)


def test_all_paths_can_be_dropped():
    assert at(by_position(timm.layers.DropPath(1.0)), torch.ones(5, 2)).abs().max() == 0


def test_layers_and_calls_in_one_pass_draw_apart():
    """Some of timm's blocks call one drop path twice: for the attention and for the MLP."""
    first, second = by_position(timm.layers.DropPath(0.5), timm.layers.DropPath(0.5))
    x = torch.ones(10_000, 1)
    with drawing(KEY, torch.arange(10_000)):
        drawn = torch.cat([first(x), second(x), first(x), second(x)], dim=1)
    assert (drawn.T.corrcoef() - torch.eye(4)).abs().max() < 0.04
    assert torch.equal(at(first, x), drawn[:, :1])  # the next pass begins again


def test_rows_that_are_parts_of_samples():
    """Windows of a picture as rows of their own, as in timm's hierarchical models: each draws, by its picture."""
    layer = by_position(timm.layers.DropPath(0.5))
    x, positions = torch.ones(12 * 4, 1), torch.arange(12)
    whole = at(layer, x, positions).view(12, 4)
    assert torch.equal(at(layer, x[:8], positions[[9, 4]]).view(2, 4), whole[[9, 4]])
    assert (whole != whole[:, :1]).any()
    with pytest.raises(AssertionError):
        at(layer, torch.ones(30, 1), positions)


# --- the swap ---------------------------------------------------------------------------------------------------------


def encoder_of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "open_clip":
        return open_clip.model._build_vision_tower(16, open_clip.model.CLIPVisionCfg(**VISIONS[kind]))
    if kind == "timm":
        return timm.create_model("test_vit", img_size=32, num_classes=8, drop_path_rate=0.4, patch_drop_rate=0.5)
    encoder = timm.create_model("test_convnext", num_classes=8, drop_path_rate=0.4)
    for name, parameter in encoder.named_parameters():
        if "gamma" in name:  # 1e-6 at first, so that no path would show
            nn.init.ones_(parameter)
    return encoder


@pytest.mark.parametrize("kind", ["open_clip", "timm", "convolutions"])
def test_the_swap_changes_nothing_but_the_draws(kind):
    theirs, x = encoder_of(kind).train(), torch.randn(4, 3, 32, 32)
    ours = copy.deepcopy(theirs)
    draw_by_position(ours)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(tensor, theirs.state_dict()[key]) for key, tensor in ours.state_dict().items())
    outs = []
    for encoder in (theirs, ours):  # outside of `drawing`: torch's generator, as before
        torch.manual_seed(1)
        outs.append(encoder(x))
    assert torch.equal(*outs)
    drawn = at(ours, x)
    assert not torch.isclose(drawn, outs[0]).all(dim=1).any()
    drawn.sum().backward()
    assert all(parameter.grad is not None for parameter in ours.parameters())
    assert torch.equal(at(ours.eval(), x), theirs.eval()(x))


def test_a_drawing_ends_where_it_ends():
    layer, x = by_position(timm.layers.DropPath(0.5)), torch.ones(64, 1)
    whole = at(layer, x)
    with drawing(KEY, torch.arange(64)):
        at(layer, x, key=KEY + 1)  # one inside another
        assert torch.equal(layer(x), whole)
    with pytest.raises(ZeroDivisionError), drawing(KEY, torch.arange(64)):
        1 / 0  # noqa: B018
    state = torch.get_rng_state()
    layer(x)
    assert not torch.equal(torch.get_rng_state(), state)


def test_nothing_asks_for_a_value_on_the_host():
    """Tensors without values: whatever needs one of them (item, a mask as an index, nonzero) raises."""
    layers = by_position(PatchDropout(0.5), timm.layers.DropPath(0.5))
    out = at(layers, torch.ones(6, 9, 2, device="meta"), torch.arange(6, device="meta"))
    assert out.shape == (6, 5, 2)


def test_compiles_as_one_graph_that_other_positions_and_keys_share():
    graphs = []
    torch._dynamo.reset()
    twice = timm.layers.DropPath(0.5)
    layers = by_position(PatchDropout(0.5), twice, timm.layers.DropPath(0.5), twice)
    compiled = torch.compile(layers, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    x = torch.randn(6, 9, 2)
    for key, positions in ((1, torch.arange(6)), (2, torch.arange(6) + FAR)):
        assert torch.equal(at(compiled, x, positions, key), at(layers, x, positions, key))
    assert len(graphs) == 1


@pytest.mark.gpu
def test_on_a_gpu_nothing_waits_and_the_draws_are_the_same():
    layers = by_position(PatchDropout(0.5), timm.layers.DropPath(0.5))
    x, positions = torch.randn(64, 50, 8), torch.arange(FAR, FAR + 64)
    device_x, device_positions = x.cuda(), positions.cuda()
    at(layers, device_x, device_positions)
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = at(layers, device_x, device_positions)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(out.cpu(), at(layers, x, positions))


# --- what still draws by chunk ----------------------------------------------------------------------------------------


class Functional(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.1, self.training)


class Attention(nn.Module):
    """Self-attention by torch's module, whose dropout is a number and no module."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, dropout=dropout, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x, x, x, need_weights=False)[0]


class OtherDropPath(timm.layers.DropPath):
    """Of a class that is not known."""


def named_by(encoder: nn.Module, x: Tensor) -> list[str]:
    with drawing(KEY, torch.arange(len(x))):
        return draws_by_chunk(encoder, lambda: encoder(x))


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (nn.Dropout(0.1), "1"),
        (nn.Sequential(nn.GELU(), nn.Dropout(0.1)), "1.1"),
        (nn.RReLU(), "1"),
        (nn.AlphaDropout(0.1), "1"),
        (Functional(), "1"),
        (Attention(0.1), "1.attn"),
        (timm.layers.Attention(8, 2, attn_drop=0.1), "1"),
        (timm.layers.Attention(8, 2, proj_drop=0.1), "1.proj_drop"),
        (OtherDropPath(0.1), "1"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_names_what_draws_by_chunk(module, name):
    """With inputs of zeros, in which dropout does not show."""
    encoder = by_position(nn.Linear(8, 8), module, timm.layers.DropPath(0.1))
    x, state = torch.zeros(2, 3, 8), torch.get_rng_state()
    assert named_by(encoder, x) == [name]
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in encoder.modules())
    assert named_by(encoder.eval(), x) == []


def test_names_nothing_where_all_draws_are_by_position():
    quiet = (nn.Dropout(0.0), Attention(0.0), timm.layers.Attention(8, 2), nn.LayerNorm(8), PatchDropout(0.5))
    assert named_by(by_position(nn.Linear(8, 8), *quiet, timm.layers.DropPath(0.1)), torch.randn(2, 5, 8)) == []


def test_towers_say_which_of_their_layers_draw_by_chunk():
    for kind in VISIONS:
        towers = towers_of(kind)
        assert towers.draws_by_chunk() == {"image": [], "text": []}
    towers.model.text.transformer.resblocks[0].mlp.add_module("drop", nn.Dropout(0.2))
    assert towers.draws_by_chunk() == {"image": [], "text": ["transformer.resblocks.0.mlp.drop"]}
    towers.model.eval()
    assert towers.draws_by_chunk() == {"image": [], "text": []}
