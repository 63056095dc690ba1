"""The step on 1, 2 and 4 gloo ranks: same loss, same gradients, same parameters."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path

import pytest
import torch
from spawn import run_ranks
from test_gradcache import TEXT, VISION, make_batch, make_plan, make_towers, worst_error

from clipscale.config import Config, Lock, Model, Train
from clipscale.data.load.replay import Held
from clipscale.dist import World
from clipscale.errors import SharedError
from clipscale.loss import contrastive_grads
from clipscale.optim import lock_towers
from clipscale.parallel import broadcast_parameters, sum_gradients
from clipscale.step import gradcache_step
from clipscale.towers import Towers, build_towers
from clipscale.training.trainer import Trainer

SLOTS, STEPS = 16, 3
UNEQUAL, DRAWING = "unequal, one rank of four with none", "by position and length"
LOCKED = "a locked image tower, and of the text tower its norms and two layers alone"
MASKS = {"equal": (), UNEQUAL: (1, 4, 5, 6, 7, 15)}


BARS = {torch.float32: 1e-5, torch.float64: 1e-10}


CONTEXT = 40  # tokens: captions are of three lengths


def make_drawing_towers(dtype: torch.dtype) -> Towers:
    """With patch dropout, which goes by position, and captions long enough to be walked by length."""
    model = Model(embed_dim=16, vision=VISION, text=TEXT | {"context_length": CONTEXT})
    towers = build_towers(model, seed=3)
    towers.model.to(dtype).train()
    return towers


def make_long_batch(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 1000, (n, CONTEXT), generator=generator)
    tokens[torch.arange(n), torch.randint(2, CONTEXT, (n,), generator=generator)] = 49407
    return make_batch(n, seed)[0], tokens


def some_steps(
    rank: int,
    size: int,
    masked: tuple[int, ...],
    dtype: torch.dtype,
    *,
    by_chunk: bool = True,
    offset: int = 0,
    lock: Lock | None = None,
) -> dict:
    """SGD on the same global batches; every step's loss and gradients, and the last parameters.

    by_chunk: nothing is drawn, and captions are walked in order; else patches are dropped by position (`offset` more
    than it is), and captions are walked by length.
    """
    world = World(rank, size, rank, torch.device("cpu"))
    towers = make_towers(dtype, dropout=False) if by_chunk else make_drawing_towers(dtype)
    lock_towers(towers, lock or Lock())
    with torch.no_grad():  # only rank 0 starts from the right weights
        for parameter in towers.model.parameters():
            parameter.add_(rank)
    broadcast_parameters(towers.model, world)
    # A small step: the gradient of towers this young turns a last bit of a weight into a hundred times as much.
    optimizer = torch.optim.SGD(towers.model.parameters(), lr=0.002)
    valid = torch.ones(SLOTS, dtype=torch.bool)
    valid[list(masked)] = False
    share = slice(rank * SLOTS // size, (rank + 1) * SLOTS // size)
    losses, grads = [], []
    for step in range(STEPS):
        images, tokens = (make_batch if by_chunk else make_long_batch)(SLOTS, seed=step)
        optimizer.zero_grad()
        result = gradcache_step(
            towers,
            Held(images[share], 3),
            tokens[share],
            valid[share],
            plan=make_plan(3, 5, kept=size, by_chunk=by_chunk),
            positions=None if by_chunk else torch.arange(SLOTS)[share] + step * SLOTS + offset,
            loss_and_grads=partial(contrastive_grads, tile=4),
            key=step,
        )
        sum_gradients(towers.encoder_parameters(), world)
        losses.append(result.loss)
        grads.append({name: p.grad.clone() for name, p in towers.model.named_parameters() if p.requires_grad})
        optimizer.step()
    return {"losses": losses, "grads": grads, "parameters": towers.model.state_dict()}


def cases_of(rank: int, size: int, dtype: torch.dtype) -> dict:
    found = {name: some_steps(rank, size, masked, dtype) for name, masked in MASKS.items()}
    found[DRAWING] = some_steps(rank, size, MASKS[UNEQUAL], dtype, by_chunk=False)
    lock = Lock(image=True, text=True, text_groups=2, learn=("text.*ln_*",))
    return found | {LOCKED: some_steps(rank, size, MASKS[UNEQUAL], dtype, lock=lock)}


@cache
def one_rank(dtype: torch.dtype) -> dict:
    return cases_of(0, 1, dtype)


@pytest.mark.parametrize(
    ("size", "dtype"),
    [(2, torch.float32), *(pytest.param(4, dtype, marks=pytest.mark.slow) for dtype in BARS)],
)
def test_ranks_agree_with_one_process(size, dtype):
    bar = BARS[dtype]
    for found_by_case in run_ranks(cases_of, size, dtype):
        for case, wanted in one_rank(dtype).items():
            found = found_by_case[case]
            assert found["losses"] == pytest.approx(wanted["losses"], rel=bar)
            for step in range(STEPS):
                assert worst_error(found["grads"][step], wanted["grads"][step]) <= bar
            for name, parameter in wanted["parameters"].items():
                torch.testing.assert_close(found["parameters"][name], parameter, rtol=bar, atol=bar / 10)


def test_masks_matter():
    """A control: the two masks are different problems, so agreement on both says something."""
    equal, unequal = (one_rank(torch.float32)[name]["grads"][0] for name in MASKS)
    assert worst_error(equal, unequal) > 1e-2


def test_positions_matter():
    """A control: other draws are another problem."""
    moved = some_steps(0, 1, MASKS[UNEQUAL], torch.float32, by_chunk=False, offset=1)
    assert worst_error(moved["grads"][0], one_rank(torch.float32)[DRAWING]["grads"][0]) > 1e-2


def missing_reduction(rank: int, size: int) -> float:
    """A step whose ranks keep their own shares."""
    towers = make_towers(torch.float32, dropout=False)
    images, tokens = make_batch(SLOTS)
    share = slice(rank * SLOTS // size, (rank + 1) * SLOTS // size)
    valid = torch.ones(SLOTS // size, dtype=torch.bool)
    inputs = Held(images[share], 3), tokens[share]
    gradcache_step(towers, *inputs, valid, plan=make_plan(3, 5), loss_and_grads=contrastive_grads, key=0)
    found = {name: p.grad.clone() for name, p in towers.model.named_parameters()}
    sum_gradients(towers.encoder_parameters(), World(rank, size, rank, torch.device("cpu")))
    return worst_error(found, {name: p.grad for name, p in towers.model.named_parameters()})


def test_catches_gradients_that_are_not_summed():
    assert min(run_ranks(missing_reduction, 2)) > 1e-2


def shared_errors(rank: int, size: int, run_dir: str) -> list[str]:
    """What each rank says where only rank 0 meets the trouble."""
    world = World(rank, size, rank, torch.device("cpu"))
    told = []
    config = Config(train=Train(global_batch=3))
    try:
        Trainer(config, world)
    except ValueError as error:
        told.append(str(error))

    def fail() -> None:
        raise SharedError(f"only rank {rank} tried")

    try:
        world.lead(fail)
    except SharedError as error:
        told.append(str(error))
    assert world.lead(lambda: Path(run_dir)) == Path(run_dir)
    assert world.sum([rank, 1.0]) == [sum(range(size)), size]
    return told


def test_an_error_of_one_rank_reaches_all(tmp_path):
    for told in run_ranks(shared_errors, 2, str(tmp_path)):
        assert told[0].startswith("train.global_batch=3 is not divisible by the 2 ranks; choose a multiple of 2")
        assert told[1] == "only rank 0 tried"
