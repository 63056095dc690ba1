"""`GradCache`: gradient caching of one's own encoders against autograd over the whole batch, alone and on two ranks."""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from spawn import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_module
from torch.nn.parallel import DistributedDataParallel

from clipscale import GradCache, library
from clipscale.errors import UserError
from clipscale.loss import dense_contrastive_loss
from clipscale.step import gradcache

README = Path(__file__).resolve().parents[1] / "README.md"
PAIRS, WIDTH = 7, 5
ALL = 10**9


class Pictures(nn.Module):
    """[M, 6] -> [M, D]; with a parameter that has no part in them, and dropout that no module tells of."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, WIDTH)
        self.unused = nn.Parameter(torch.ones(2))
        self.dropout = dropout

    def forward(self, pictures):
        return self.last(F.dropout(self.first(pictures).tanh(), self.dropout, self.training))


class Words(nn.Module):
    """Token ids [M, L] and a mask [M, L] -> [M, D]."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.last = nn.Embedding(11, 8), nn.Linear(8, WIDTH)

    def forward(self, ids, mask):
        return self.last((self.table(ids) * mask[..., None]).sum(1).tanh())


class Model(nn.Module):
    def __init__(self, dtype=torch.float64, dropout: float = 0.0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            self.image, self.text = Pictures(dropout), Words()
            self.log_scale = nn.Parameter(torch.tensor(2.0))
        self.to(dtype)

    def gradients(self) -> dict[str, torch.Tensor]:
        return {name: p.grad.clone() for name, p in self.named_parameters() if p.grad is not None}


def make_batch(n: int = PAIRS, dtype=torch.float64) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(n)
    ids = torch.randint(0, 11, (n, 4), generator=generator)
    mask = torch.rand(n, 4, dtype=dtype, generator=generator)
    return torch.randn(n, 6, dtype=dtype, generator=generator), {"ids": ids, "mask": mask}


def part_of(batch, rows: slice):
    pictures, words = batch
    return pictures[rows], {name: tensor[rows] for name, tensor in words.items()}


def make_cache(model: Model, **options) -> GradCache:
    return GradCache(model.image, model.text, **{"image_chunk": 3, "text_chunk": 2} | options)


def one_step(model: Model, batch, *, grad_scale=1.0, **options):
    return make_cache(model, **options).step(*batch, model.log_scale.exp(), grad_scale=grad_scale)


def dense_step(model: Model, batch) -> dict:
    """Loss, gradients and accuracies by one graph over the whole batch."""
    pictures, words = batch
    image, text = F.normalize(model.image(pictures), dim=-1), F.normalize(model.text(**words), dim=-1)
    loss = dense_contrastive_loss(image, text, model.log_scale.exp())
    loss.backward()
    logits, right = image @ text.T, torch.arange(len(image))
    accuracies = [(logits.argmax(dim) == right).double().mean().item() for dim in (1, 0)]
    return {"loss": loss.item(), "grads": model.gradients(), "accuracies": accuracies}


def dense(n: int = PAIRS) -> dict:
    return dense_step(Model(), make_batch(n))


def worst_error(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    assert found.keys() == wanted.keys()
    return max(((found[name] - wanted[name]).norm() / wanted[name].norm()).item() for name in wanted)


@pytest.mark.parametrize("chunks", [(1, 3), (3, 1), (PAIRS, PAIRS)])
@pytest.mark.parametrize("keep_bytes", [0, 700, ALL], ids=["none", "some", "all"])
def test_every_gradient_equals_the_dense_one(chunks, keep_bytes):
    wanted, model = dense(), Model()
    result = one_step(model, make_batch(), image_chunk=chunks[0], text_chunk=chunks[1], keep_bytes=keep_bytes)
    assert result.loss == pytest.approx(wanted["loss"], rel=1e-12)
    assert result.pairs == PAIRS
    assert [result.image_accuracy, result.text_accuracy] == pytest.approx(wanted["accuracies"])
    assert worst_error(model.gradients(), wanted["grads"]) <= 1e-10
    assert model.image.unused.grad is None


@pytest.mark.parametrize(("keep_bytes", "runs"), [(0, 6), (700, 5), (ALL, 3)])
def test_kept_chunks_run_once(keep_bytes, runs):
    """Pictures in three chunks, the graph of each of which holds between 350 and 700 bytes."""
    model, batch = Model(), make_batch(PAIRS)
    cache, scale = make_cache(model, keep_bytes=keep_bytes), model.log_scale.exp().detach()
    cache.step(*batch, scale)  # counts what a graph holds
    with mock.patch.object(model.image, "forward", wraps=model.image.forward) as forward:
        cache.step(*batch, scale)
    assert forward.call_count == runs


@pytest.mark.parametrize("kind", [tuple, list])
def test_inputs_may_be_several_tensors(kind):
    wanted, model = dense(), Model()
    pictures, words = make_batch()
    one_step(model, (kind([pictures]), kind(words.values())))
    assert worst_error(model.gradients(), wanted["grads"]) <= 1e-10


def test_embeddings_may_come_normalised():
    class Unit(Pictures):
        def forward(self, pictures):
            return F.normalize(super().forward(pictures), dim=-1) * 0.9  # not to be normalised again

    wanted, model = Model(), Model()
    for each in (wanted, model):
        each.image.__class__ = Unit
    pictures, words = make_batch()
    text = F.normalize(wanted.text(**words), dim=-1)
    dense_contrastive_loss(wanted.image(pictures), text, wanted.log_scale.exp()).backward()
    plain = model.text.forward
    with mock.patch.object(model.text, "forward", lambda **words: F.normalize(plain(**words), dim=-1)):
        one_step(model, (pictures, words), normalize=False)
    assert worst_error(model.gradients(), wanted.gradients()) <= 1e-10


@pytest.mark.parametrize(("dtype", "precision"), [(torch.float32, "fp64"), (torch.float64, "fp32")])
def test_the_loss_may_have_a_precision_of_its_own(dtype, precision):
    wanted, model, batch = Model(dtype), Model(dtype), make_batch(dtype=dtype)
    dense_step(wanted, batch)
    one_step(model, batch, precision=precision)
    assert 0 < worst_error(model.gradients(), wanted.gradients()) <= 1e-5


def test_the_scale_may_be_a_number_or_a_leaf():
    model, batch = Model(), make_batch()
    scale = torch.tensor([7.0], dtype=torch.float64, requires_grad=True)
    make_cache(model).step(*batch, 7.0)
    assert model.log_scale.grad is None
    make_cache(model).step(*batch, scale)
    image, text = F.normalize(model.image(batch[0]), dim=-1), F.normalize(model.text(**batch[1]), dim=-1)
    (wanted,) = torch.autograd.grad(dense_contrastive_loss(image, text, scale), scale)
    torch.testing.assert_close(scale.grad, wanted, rtol=1e-10, atol=0)


def test_gradients_add_to_those_that_are_there():
    wanted, model = dense()["grads"], Model()
    for _ in range(2):
        one_step(model, make_batch())
    assert worst_error(model.gradients(), {name: 2 * grad for name, grad in wanted.items()}) <= 1e-10


def test_a_locked_encoder_gets_no_gradient():
    wanted, model = dense()["grads"], Model()
    model.image.requires_grad_(False)
    one_step(model, make_batch())
    rest = {name: grad for name, grad in wanted.items() if not name.startswith("image")}
    assert worst_error(model.gradients(), rest) <= 1e-10


@pytest.mark.parametrize("keep_bytes", [0, ALL])
def test_both_encoders_may_be_one(keep_bytes):
    wanted, model = Model(), Model()
    ours, theirs = make_batch()[0], make_batch(PAIRS)[0].flip(1)
    image, text = (F.normalize(wanted.image(inputs), dim=-1) for inputs in (ours, theirs))
    dense_contrastive_loss(image, text, wanted.log_scale.exp()).backward()
    cache = GradCache(model.image, model.image, image_chunk=3, text_chunk=2, keep_bytes=keep_bytes)
    cache.step(ours, theirs, model.log_scale.exp())
    assert worst_error(model.gradients(), wanted.gradients()) <= 1e-10


def test_steps_under_no_grad_learn_too():
    wanted, model = dense()["grads"], Model()
    scale = model.log_scale.exp()
    with torch.no_grad():
        make_cache(model).step(*make_batch(), scale)
    assert worst_error(model.gradients(), wanted) <= 1e-10


@pytest.mark.gpu
@pytest.mark.parametrize("keep_bytes", [0, ALL])
def test_every_gradient_equals_the_dense_one_on_a_gpu(keep_bytes):
    """Inputs in host memory, which go to the encoders' device chunk by chunk."""
    wanted, model = dense(), Model().cuda()
    one_step(model, make_batch(), keep_bytes=keep_bytes)
    found = {name: grad.cpu() for name, grad in model.gradients().items()}
    assert worst_error(found, wanted["grads"]) <= 1e-10


# --- randomness, mixed precision --------------------------------------------------------------------------------------


def dropout_gradients(seed: int, keep_bytes: int) -> dict[str, torch.Tensor]:
    model = Model(dropout=0.5)
    torch.manual_seed(seed)
    one_step(model, make_batch(), keep_bytes=keep_bytes)
    return model.gradients()


def test_both_passes_draw_the_same():
    """Kept graphs have drawn once: with them, the gradients are right whatever is replayed."""
    found, wanted = dropout_gradients(1, 0), dropout_gradients(1, ALL)
    assert worst_error(found, wanted) == 0
    assert worst_error(dropout_gradients(2, 0), wanted) > 1e-2, "every step draws anew"
    with mock.patch.object(gradcache, "chunk_randomness", return_value=nullcontext()):
        assert worst_error(dropout_gradients(1, 0), dropout_gradients(1, ALL)) > 1e-2, "draws that are not replayed"


def autocast_gradients(outer: bool, keep_bytes: int) -> dict[str, torch.Tensor]:
    model = Model(torch.float32)
    with torch.autocast("cpu", torch.bfloat16) if outer else nullcontext():
        one_step(
            model,
            make_batch(dtype=torch.float32),
            autocast=None if outer else torch.bfloat16,
            keep_bytes=keep_bytes,
        )
    return model.gradients()


@pytest.mark.parametrize("keep_bytes", [0, 900, ALL])
def test_autocast_of_its_own_or_of_the_caller(keep_bytes):
    plain = Model(torch.float32)
    one_step(plain, make_batch(dtype=torch.float32))
    own, outer = (autocast_gradients(outer, keep_bytes) for outer in (False, True))
    assert worst_error(own, outer) == 0
    assert 1e-4 < worst_error(own, plain.gradients()) < 0.1


def test_a_grad_scaler():
    """Gradients times its factor, and an optimizer's step that is that without it."""
    wanted, model = Model(torch.float32), Model(torch.float32)
    batch = make_batch(dtype=torch.float32)
    one_step(wanted, batch)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    one_step(model, batch, grad_scale=scaler)
    assert worst_error(model.gradients(), {name: 1024 * grad for name, grad in wanted.gradients().items()}) <= 1e-6
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler.step(optimizer)
    scaler.update()
    assert worst_error(model.gradients(), wanted.gradients()) <= 1e-6
    model.zero_grad()
    one_step(model, batch, grad_scale=0.0)
    assert not model.log_scale.grad.any()


# --- ranks ------------------------------------------------------------------------------------------------------------

SHARES = {"alike": (4, 3), "unequal": (6, 1), "one with none": (0, 7), "nobody has any": (0, 0)}


def share_of(rank: int, sizes: tuple[int, int]) -> slice:
    return slice(0, sizes[0]) if rank == 0 else slice(sizes[0], sum(sizes))


def ranks_step(rank: int, sizes: tuple[int, int], *, ddp: bool, steps: int = 1, averaged: bool = False, **options):
    """Result and gradients of this rank, whose pairs are a share of the batch.

    `averaged`: the wrapper is not set aside.
    """
    model = Model()
    if ddp:
        model.image = DistributedDataParallel(model.image, find_unused_parameters=True)
        model.text = DistributedDataParallel(model.text)
    cache = make_cache(model, **options)
    if averaged:
        for side, wrapped in zip(cache._sides, (model.image, model.text), strict=True):
            side.encoder = wrapped
    for _ in range(steps):
        result = cache.step(*part_of(make_batch(), share_of(rank, sizes)), model.log_scale.exp())
    return result, {name.replace(".module", ""): grad for name, grad in model.gradients().items()}


def wrong_steps(rank: int) -> dict:
    """Gradients that are not summed, and those that DDP's own average makes of them, chunk by chunk."""
    with mock.patch.object(library, "sum_in_buckets"):
        return {
            "no sum": ranks_step(rank, SHARES["alike"], ddp=False),
            "DDP's average": ranks_step(rank, SHARES["alike"], ddp=True, averaged=True, image_chunk=2),
        }


def refusal_of_a_rank(model: Model, **options) -> str:
    with pytest.raises(UserError) as told:
        one_step(model, make_batch(), **options)
    return str(told.value)


def every_case(rank: int, world: int) -> dict:
    found = {
        (name, ddp, keep): ranks_step(rank, sizes, ddp=ddp, keep_bytes=keep)
        for name, sizes in SHARES.items()
        for ddp in (False, True)
        for keep in (0, ALL)
    }
    found |= wrong_steps(rank)
    found["two steps"] = ranks_step(rank, SHARES["unequal"], ddp=True, steps=2)
    other, wrapped = Model(), Model()
    with torch.no_grad():
        other.text.last.bias.add_(rank)
    wrapped.image = DistributedDataParallel(wrapped.image)
    found |= {"weights": refusal_of_a_rank(other), "group": refusal_of_a_rank(wrapped, group="self")}
    wrapped.image = nn.Sequential(wrapped.image)
    sharded = Model()
    distribute_module(sharded.text, init_device_mesh("cpu", (world,)))
    return found | {"inside": refusal_of_a_rank(wrapped), "sharded": refusal_of_a_rank(sharded)}


@pytest.fixture(scope="module")
def two_ranks() -> list[dict]:
    return run_ranks(every_case, 2)


@pytest.mark.parametrize("keep_bytes", [0, ALL])
@pytest.mark.parametrize("ddp", [False, True], ids=["plain", "DDP"])
@pytest.mark.parametrize("name", list(SHARES)[:3])
def test_ranks_end_with_the_gradients_of_the_whole_batch(two_ranks, name, ddp, keep_bytes):
    wanted = dense()
    for rank in two_ranks:
        result, grads = rank[name, ddp, keep_bytes]
        assert result.loss == pytest.approx(wanted["loss"], rel=1e-12)
        assert result.pairs == PAIRS
        assert worst_error(grads, wanted["grads"]) <= 1e-10
    bits = [[grad.tolist() for grad in rank[name, ddp, keep_bytes][1].values()] for rank in two_ranks]
    assert bits[0] == bits[1]


def test_ranks_without_any_pair_learn_nothing(two_ranks):
    for rank in two_ranks:
        result, grads = rank["nobody has any", True, 0]
        assert (result.loss, result.pairs, grads) == (0, 0, {})


def test_ranks_add_to_gradients_that_are_there(two_ranks):
    wanted = {name: 2 * grad for name, grad in dense()["grads"].items()}
    for rank in two_ranks:
        assert worst_error(rank["two steps"][1], wanted) <= 1e-10


@pytest.mark.parametrize("wrong", ["no sum", "DDP's average"])
def test_catches_what_is_wrong_on_ranks(two_ranks, wrong):
    for rank in two_ranks:
        assert worst_error(rank[wrong][1], dense()["grads"]) > 1e-2


def test_ranks_that_do_not_fit_are_told(two_ranks):
    for rank in two_ranks:
        assert rank["weights"] == (
            "the text encoder's weights on ranks [1] are not those of rank 0: seed all ranks alike, load the same "
            "checkpoint, or wrap the encoder in DDP, which copies them"
        )
        assert rank["group"] == (
            "the image encoder's DDP has 2 ranks and the loss 1: pass GradCache the group that DDP was given"
        )
        assert rank["inside"] == (
            "the image encoder holds a DistributedDataParallel (0): its own communication would run once a chunk; let "
            "the encoder hold what it wraps (.module)"
        )
        assert rank["sharded"] == (
            "the text encoder is sharded (table.weight is a DTensor): GradCache takes encoders that are whole on every "
            "rank"
        )


# --- open_clip, the README, errors ------------------------------------------------------------------------------------


class Encode(nn.Module):
    """One of the two encoders that an open_clip model is."""

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.model, self.name = model, name

    def forward(self, inputs):
        return getattr(self.model, self.name)(inputs)


@pytest.mark.parametrize("locked", [False, True], ids=["", "image tower locked"])
def test_an_open_clip_model(locked):
    """Both encoders hold all of it, the scale too; locked, the image encoder has what learns but does not use it."""
    vision = CLIPVisionCfg(image_size=16, patch_size=8, width=32, layers=1, head_width=16)
    text = CLIPTextCfg(context_length=8, vocab_size=50, width=32, heads=2, layers=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text).double()
        images, tokens = torch.randn(5, 3, 16, 16, dtype=torch.float64), torch.randint(1, 50, (5, 8))
    if locked:
        model.lock_image_tower()
    image, text, scale = model(images, tokens)
    dense_contrastive_loss(image, text, scale).backward()
    wanted = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    cache = GradCache(Encode(model, "encode_image"), Encode(model, "encode_text"), image_chunk=2, text_chunk=3)
    cache.step(images, tokens, model.logit_scale.exp())
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert worst_error(found, wanted) <= 1e-9


def test_the_lines_of_the_readme_run(capsys):
    (code,) = re.findall(r"```python\n(from clipscale import GradCache\n.*?)```", README.read_text(), re.DOTALL)
    model = Model(torch.float32)
    before = model.log_scale.item()
    names = {"torch": torch, "image_encoder": model.image, "text_encoder": model.text, "logit_scale": model.log_scale}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    exec(code, names | {"optimizer": optimizer, "batches": [make_batch(dtype=torch.float32)] * 2})
    assert model.log_scale.item() != before
    assert capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"image_chunk": 0}, "image_chunk is 0: it must be a whole number of at least 1"),
        ({"text_chunk": 2.5}, "text_chunk is 2.5: it must be a whole number of at least 1"),
        ({"keep_bytes": -1}, "keep_bytes is -1: it must be a whole number of at least 0"),
        ({"autocast": torch.float32}, "autocast is torch.float32: it must be torch.bfloat16, torch.float16 or None"),
    ],
)
def test_settings_out_of_range_are_told(options, words):
    with pytest.raises(UserError, match=re.escape(words)):
        make_cache(Model(), **options)


@pytest.mark.parametrize(
    ("encoder", "words"),
    [
        (len, "the image encoder is a builtin_function_or_method: it must be an nn.Module"),
        (nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), r"the image encoder has BatchNorm \(1\): gradient caching"),
        (nn.Identity(), "the image encoder has no parameters"),
    ],
)
def test_encoders_that_cannot_be_cached_are_told(encoder, words):
    with pytest.raises(UserError, match=words) as told:
        GradCache(encoder, Words(), image_chunk=1, text_chunk=1)
    assert "\n" not in str(told.value)


PICTURES, WORDS = make_batch()


@pytest.mark.parametrize(
    ("images", "texts", "words"),
    [
        (PICTURES[:5], WORDS, "5 images and 7 texts: pass as many, row i of each a pair"),
        (["a.jpg"], WORDS, "images are a list: pass a tensor, or a tuple or dict of tensors, of one row a sample"),
        ((), WORDS, "images are a tuple: pass a tensor"),
        (PICTURES, WORDS | {"mask": WORDS["mask"][:3]}, r"texts hold tensors of \[3, 7\] rows: all must have one row"),
        (PICTURES[:, None], WORDS, r"the image encoder made \[3, 1, 5\] of 3 samples: it must make a tensor of"),
    ],
)
def test_inputs_that_do_not_fit_are_told(images, texts, words):
    with pytest.raises(UserError, match=words):
        one_step(Model(), (images, texts))


def test_the_package_names_what_it_has():
    import clipscale

    assert clipscale.GradCache is GradCache
    with pytest.raises(AttributeError, match="GradCash"):
        _ = clipscale.GradCash
