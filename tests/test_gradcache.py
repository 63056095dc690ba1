"""Step parity: the gradient-cached, tiled step against the dense loss of the whole batch by plain autograd."""

from __future__ import annotations

from functools import cache, partial
from math import inf

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from clipscale.config import Model
from clipscale.data.load.replay import Held
from clipscale.loss import contrastive_grads
from clipscale.step import GraphCost, StepPlan, TowerPlan, gradcache, gradcache_step
from clipscale.step.gradcache import chunk_randomness
from clipscale.towers import Towers, build_towers

KEY = 77
VISION = {"image_size": 16, "patch_size": 4, "width": 32, "layers": 2, "head_width": 16, "patch_dropout": 0.3}
TEXT = {"context_length": 8, "width": 32, "heads": 2, "layers": 2}
CHUNKS = [1, 3, 7, "B"]


def make_towers(dtype: torch.dtype, dropout: bool, scale: float = 14.0) -> Towers:
    """A ViT and a text transformer; with patch dropout, and dropout after each text block, if asked."""
    vision = VISION if dropout else VISION | {"patch_dropout": 0.0}
    towers = build_towers(Model(embed_dim=16, vision=vision, text=TEXT, logit_scale_init=scale), seed=3)
    if dropout:
        for block in towers.model.text.transformer.resblocks:
            block.mlp.add_module("drop", nn.Dropout(0.2))
    towers.model.to(dtype).train()
    return towers


def make_batch(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, 3, 16, 16), dtype=torch.uint8, generator=generator)
    tokens = torch.randint(1, 1000, (n, 8), generator=generator)
    tokens[:, -1] = 49407
    return images, tokens


def make_plan(image: int, text: int, *, kept: float = 0, forward_chunks: int = 1, by_chunk: bool = True) -> StepPlan:
    """`kept`: graphs of so many pictures, and of so many captions, may be kept: of whole chunks of them."""
    cost = GraphCost(sample=1.0)
    keep_bytes = 10**9 if kept == inf else int(kept)
    return StepPlan(*(TowerPlan(chunk, chunk * forward_chunks, keep_bytes, cost, by_chunk) for chunk in (image, text)))


def run_step(
    towers: Towers,
    images: torch.Tensor,
    tokens: torch.Tensor,
    valid: torch.Tensor,
    image: int,
    text: int,
    tile: int = 5,
    **planned: float,
):
    plan = make_plan(image, text, **planned)
    return gradcache_step(
        towers,
        Held(images, plan.image.wide),
        tokens,
        valid,
        plan=plan,
        loss_and_grads=partial(contrastive_grads, precision="auto", tile=tile),
        key=KEY,
    )


def dense_step(
    towers: Towers, images: torch.Tensor, tokens: torch.Tensor, valid: torch.Tensor, image: int, text: int
) -> torch.Tensor:
    """One autograd graph over the whole batch: same chunks and randomness, cross-entropy on all B x B logits."""

    def embed(tower, inputs, size):
        parts = []
        for start in range(0, len(inputs), size):
            with chunk_randomness(KEY, tower, start):
                parts.append(tower(inputs[start : start + size]))
        return torch.cat(parts)

    image_BD = embed(towers.image, images, image)[valid]
    text_BD = embed(towers.text, tokens, text)[valid]
    logits = towers.model.logit_scale.exp() * image_BD @ text_BD.T
    labels = torch.arange(len(logits), device=logits.device)
    loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    loss.backward()
    return loss.detach()


def gradients(towers: Towers) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in towers.model.named_parameters() if p.grad is not None}


def worst_error(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """The largest ||difference|| / max(||g||, 1e-3 tower RMS sqrt(n)) over the parameter tensors."""
    assert found.keys() == wanted.keys()
    worst = 0.0
    for tower in {name.split(".")[0] for name in wanted}:  # visual, text, logit_scale
        names = [name for name in wanted if name.startswith(tower)]
        elements = sum(wanted[name].numel() for name in names)
        rms = (sum(wanted[name].double().square().sum() for name in names) / elements).sqrt()
        for name in names:
            floor = 1e-3 * rms * wanted[name].numel() ** 0.5
            scale = torch.maximum(wanted[name].double().norm(), floor)
            worst = max(worst, ((found[name].double() - wanted[name].double()).norm() / scale).item())
    return worst


def parity(dtype, n, image, text, *, dropout=True, scale=14.0, masked=(), seed=0, **planned):
    """(worst gradient error, loss error, loss) of the cached step against the dense one."""
    images, tokens = make_batch(n, seed)
    valid = torch.ones(n, dtype=torch.bool)
    valid[list(masked)] = False
    towers = make_towers(dtype, dropout, scale)
    found_loss = run_step(towers, images, tokens, valid, image, text, by_chunk=dropout, **planned).loss
    found = gradients(towers)
    towers.model.zero_grad()
    wanted_loss = dense_step(towers, images, tokens, valid, image, text).item()
    return worst_error(found, gradients(towers)), abs(found_loss - wanted_loss), wanted_loss


BARS = {torch.float32: 1e-5, torch.float64: 1e-10}


@pytest.mark.parametrize("dtype", BARS, ids=["fp32", "fp64"])
@pytest.mark.parametrize("n", [2, 13, 24], ids=["smaller than a tile", "odd", "even"])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_every_gradient_equals_the_dense_one(dtype, n, chunk):
    size = n if chunk == "B" else chunk
    error, loss_error, _ = parity(dtype, n, size, max(1, size - 1))
    assert error <= BARS[dtype]
    assert loss_error <= BARS[dtype]


@pytest.mark.parametrize("dtype", BARS, ids=["fp32", "fp64"])
@pytest.mark.parametrize(("kept", "forward_chunks"), [(0, 3), (4, 1), (9, 3), (inf, 1)])
@pytest.mark.parametrize("dropout", [True, False], ids=["dropout", ""])
def test_kept_graphs_and_wide_chunks_change_nothing(dtype, kept, forward_chunks, dropout):
    planned = {"kept": kept, "forward_chunks": forward_chunks}
    error, loss_error, _ = parity(dtype, 13, 2, 3, dropout=dropout, masked=(1, 7), **planned)
    assert error <= BARS[dtype]
    assert loss_error <= BARS[dtype]


@pytest.mark.parametrize("kept", [0, 4, inf], ids=["none", "some", "all"])
def test_what_is_kept_runs_once_and_changes_no_bit(kept, monkeypatch):
    """The calls of each tower, and gradients bit for bit those of a step that keeps nothing."""
    images, tokens = make_batch(12)
    valid = torch.ones(12, dtype=torch.bool)
    towers = make_towers(torch.float32, dropout=True)
    run_step(towers, images, tokens, valid, 2, 3)
    wanted = gradients(towers)
    towers.model.zero_grad()
    calls = {"image": [], "text": []}
    for tower in (towers.image, towers.text):
        real = tower.encoder.forward
        note = calls[tower.name]

        def counted(*args, real=real, note=note):
            note.append(torch.is_grad_enabled())
            return real(*args)

        monkeypatch.setattr(tower.encoder, "forward", counted)
    result = run_step(towers, images, tokens, valid, 2, 3, kept=kept)
    slots = min(kept, 12)
    for name, chunk in (("image", 2), ("text", 3)):
        chunks = slots // chunk
        without, with_grad = calls[name].count(False), calls[name].count(True)
        assert (without, with_grad) == (12 // chunk - chunks, 12 // chunk)
    assert result.kept_share == {0: 0, 4: (4 + 3) / 24, inf: 1}[kept]
    for name, grad in gradients(towers).items():
        assert torch.equal(grad, wanted[name]), name


def test_kept_graphs_share_the_casts_of_the_weights_and_gather_in_float32():
    """Under autocast each chunk's graph would hold a bf16 copy of its tower: counted are the storages."""
    towers = make_towers(torch.float32, dropout=False)
    for tower in (towers.image, towers.text):
        tower.autocast = torch.bfloat16
    images, tokens = make_batch(12)
    step = partial(run_step, towers, images, tokens, torch.ones(12, dtype=torch.bool), 1, 1, by_chunk=False)
    largest_activation = 17 * 4 * 32  # of one picture; captions are smaller
    weights = {p.numel() for p in towers.model.visual.parameters() if p.numel() > largest_activation}
    held = set()

    def note(tensor):
        if tensor.dtype == torch.bfloat16 and tensor.untyped_storage().nbytes() // 2 in weights:
            held.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        step(kept=inf)
    found = gradients(towers)
    of_one = sum(p.numel() in weights for p in towers.model.parameters())
    assert 0 < len(held) <= of_one, "the graphs of twelve chunks hold one copy of each weight"
    assert {grad.dtype for grad in found.values()} == {torch.float32}
    towers.model.zero_grad()
    step()
    for name, grad in gradients(towers).items():
        assert torch.equal(grad, found[name]), name


@pytest.mark.parametrize("dtype", BARS, ids=["fp32", "fp64"])
def test_masked_slots_have_no_part(dtype):
    error, loss_error, _ = parity(dtype, 13, 4, 5, masked=(0, 6, 12))
    assert error <= BARS[dtype]
    assert loss_error <= BARS[dtype]


@pytest.mark.parametrize("locked", [("visual",), ("text",), ("visual", "text")], ids=" and ".join)
def test_a_locked_tower_is_not_replayed(locked, monkeypatch):
    """What learns gets the gradients it would get by plain autograd, and the locked tower no pass with grad."""
    replayed = []
    real = gradcache.TwoPasses.replay
    monkeypatch.setattr(
        gradcache.TwoPasses, "replay", lambda self, *rest: (replayed.append(self.tower.name), real(self, *rest))
    )
    images, tokens = make_batch(13)
    valid = torch.ones(13, dtype=torch.bool)
    towers = make_towers(torch.float64, dropout=True)
    for name in locked:
        getattr(towers.model, name).requires_grad_(False)
    run_step(towers, images, tokens, valid, 4, 5)
    found = gradients(towers)
    assert {name.split(".")[0] for name in found} == {"visual", "text", "logit_scale"} - {*locked}
    assert replayed == [name for name, part in (("image", "visual"), ("text", "text")) if part not in locked]
    towers.model.zero_grad()
    dense_step(towers, images, tokens, valid, 4, 5)
    assert worst_error(found, gradients(towers)) <= BARS[torch.float64]


@cache
def pulled_together(scale: float) -> dict[str, torch.Tensor]:
    """Weights of towers trained on one small batch until the loss is below 0.01."""
    images, tokens = make_batch(9)
    towers = make_towers(torch.float32, dropout=False, scale=scale)
    optimizer = torch.optim.Adam(towers.encoder_parameters(), lr=3e-3)
    for _ in range(200):
        towers.model.zero_grad()
        if dense_step(towers, images, tokens, torch.ones(9, dtype=torch.bool), 9, 9) < 5e-3:
            return towers.model.state_dict()
        optimizer.step()
    raise AssertionError("the towers did not learn the batch")


def low_loss_gradients(towers: Towers, step, image: int, text: int) -> tuple[float, dict[str, torch.Tensor]]:
    images, tokens = make_batch(9)
    towers.model.zero_grad()
    result = step(towers, images, tokens, torch.ones(9, dtype=torch.bool), image, text)
    return float(getattr(result, "loss", result)), gradients(towers)


@pytest.mark.parametrize("dtype", BARS, ids=["fp32", "fp64"])
@pytest.mark.parametrize("scale", [14.0, 30.0, 60.0])
def test_low_loss(dtype, scale):
    """Held against dense autograd in float64 with the same weights: in float32 that loss is itself off by 1e-5 (s = 14)
    to 6e-5 (s = 60), because the rounding of its logits is common to a row and cancels in exact arithmetic only. Where
    even its own error is above the bar, that error is the bar."""
    towers, exact = (make_towers(kind, dropout=False) for kind in (dtype, torch.float64))
    for each in (towers, exact):
        each.model.load_state_dict(pulled_together(scale))
    wanted_loss, wanted = low_loss_gradients(exact, dense_step, 9, 9)
    dense_error = worst_error(low_loss_gradients(towers, dense_step, 9, 9)[1], wanted)
    bar = max(BARS[dtype], dense_error if scale == 60 else 0)
    assert wanted_loss < 0.01
    for image, text in ((1, 3), (7, 9), (4, 2)):
        loss, found = low_loss_gradients(towers, run_step, image, text)
        assert loss == pytest.approx(wanted_loss, rel=10 * BARS[dtype])
        assert worst_error(found, wanted) <= bar


def test_no_valid_pair_gives_no_gradient():
    towers = make_towers(torch.float32, dropout=True)
    images, tokens = make_batch(5)
    result = run_step(towers, images, tokens, torch.zeros(5, dtype=torch.bool), 2, 2)
    assert result.pairs == 0
    assert result.loss == 0
    assert all(parameter.grad is None for parameter in towers.model.parameters())


def test_the_outer_random_state_is_left_alone():
    towers = make_towers(torch.float32, dropout=True)
    images, tokens = make_batch(5)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    run_step(towers, images, tokens, torch.ones(5, dtype=torch.bool), 2, 2)
    assert torch.equal(before, torch.get_rng_state())


# --- the same check must catch steps that are wrong -------------------------------------------------------------------


def test_catches_randomness_that_is_not_replayed(monkeypatch):
    real, calls = gradcache.chunk_randomness, iter(range(10_000))
    monkeypatch.setattr(gradcache, "chunk_randomness", lambda key, tower, start: real(key + next(calls), tower, start))
    error, _, _ = parity(torch.float64, 13, 4, 5)
    assert error > 1e-2


def test_catches_a_dropped_chunk(monkeypatch):
    real = gradcache.TwoPasses.replay

    def drop_the_second(self, d_VD, *rest):
        d_VD = d_VD.clone()
        d_VD[4:8] = 0
        real(self, d_VD, *rest)

    monkeypatch.setattr(gradcache.TwoPasses, "replay", drop_the_second)
    error, _, _ = parity(torch.float64, 13, 4, 5)
    assert error > 1e-2


def test_catches_a_scale_gradient_once_per_chunk(monkeypatch):
    real = gradcache._add_logit_scale_grad
    monkeypatch.setattr(gradcache, "_add_logit_scale_grad", lambda towers, d: real(towers, 4 * d))
    error, _, _ = parity(torch.float64, 13, 4, 5)
    assert error > 1


@pytest.mark.gpu
@pytest.mark.parametrize("chunk", [3, 13])
def test_every_gradient_equals_the_dense_one_on_a_gpu(chunk):
    """Dropout on, float32 without TF32: CUDA generators are replayed per chunk, copies run on a stream of their own."""
    images, tokens = make_batch(13)
    valid = torch.ones(13, dtype=torch.bool)
    towers = make_towers(torch.float32, dropout=True)
    towers.model.cuda()
    step = partial(contrastive_grads, precision="fp32", tile=5)
    inputs = Held(images.pin_memory(), chunk), tokens
    gradcache_step(towers, *inputs, valid, plan=make_plan(chunk, 4), loss_and_grads=step, key=KEY)
    found = {name: grad.cpu() for name, grad in gradients(towers).items()}
    towers.model.zero_grad()
    dense_step(towers, images.cuda(), tokens.cuda(), valid.cuda(), chunk, 4)
    assert worst_error(found, {name: grad.cpu() for name, grad in gradients(towers).items()}) <= 1e-4
