"""Ranks that have drifted apart are found by a hash of their weights, before that becomes a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from shards import write_pairs
from spawn import run_ranks
from tiny import tiny_config
from torch import nn

from clipscale.bits import AT_ONCE, hash_bits
from clipscale.checkpoint import load_checkpoint
from clipscale.dist import World
from clipscale.errors import RestartError
from clipscale.guard.drift import compare_ranks
from clipscale.training.learner import Learner
from clipscale.training.trainer import Trainer

EVERY = {1: torch.bool, 2: torch.bfloat16, 4: torch.float32, 8: torch.float64}


@pytest.mark.parametrize("dtype", EVERY.values())
def test_the_hash_sees_any_one_bit_and_any_two_places_exchanged(dtype):
    generator = torch.Generator().manual_seed(1)
    values = (
        torch.randint(0, 2, (5, 7), generator=generator)
        if dtype == torch.bool
        else torch.randn(5, 7, generator=generator)
    )
    values = values.to(dtype)
    first = hash_bits(values)
    assert torch.equal(first, hash_bits(values.clone()))
    seen = {int(first)}
    for place in range(values.numel()):
        other = values.clone()
        raw = other.view(-1).view(torch.uint8)
        raw[place * dtype.itemsize] ^= 1  # the lowest bit
        seen.add(int(hash_bits(other)))
    assert len(seen) == 1 + values.numel()
    if dtype != torch.bool:
        assert hash_bits(values.flip(0)) != first
    assert hash_bits(values.T.contiguous().T) == first  # the layout is no part of it


def test_pieces_of_a_large_tensor_are_told_apart():
    large = torch.zeros(AT_ONCE + 8, dtype=torch.int8)
    hashes = set()
    for place in (0, 7, AT_ONCE, AT_ONCE + 7):
        large[place] = 1
        hashes.add(int(hash_bits(large)))
        large[place] = 0
    assert len(hashes) == 4


def test_alone_nothing_is_compared():
    compare_ranks(nn.Linear(2, 2), {}, World(0, 1, 0, torch.device("cpu")), step=1)


def drifting(rank: int, size: int, folder: str, urls: str) -> tuple[str, list[str], bool]:
    """What the run ends by where the last rank loses a bit in step 2, what was published then, and whether a start
    anew ends as the run without it."""
    world, update = World(rank, size, rank, torch.device("cpu")), Learner.update
    home = Path(folder, str(rank))

    def train(name: str, *words: str) -> None:
        trainer = Trainer(
            tiny_config(home, urls, f"run.dir={folder}/{name}", "checkpoint.every_steps=1", *words), world
        )
        try:
            trainer.run()
        finally:
            trainer.close()

    def losing_a_bit(learner, *, step):
        norm = update(learner, step=step)
        if step == 2 and rank == size - 1:
            learner.towers.model.text.ln_final.weight.data.view(torch.int32)[3] ^= 1
        return norm

    train("twin")
    Learner.update = losing_a_bit
    with pytest.raises(RestartError) as error:
        train("run")
    Learner.update = update
    torch.distributed.barrier()  # the first rank has written what it had to
    published = sorted(path.name for path in Path(folder, "run", "checkpoints").iterdir())
    torch.distributed.barrier()
    train("run")
    found, wanted = (load_checkpoint(Path(folder, name, "checkpoints", "step-000000004")) for name in ("run", "twin"))
    return str(error.value), published, all(torch.equal(found.model[name], wanted.model[name]) for name in wanted.model)


def test_a_bit_lost_on_one_rank_ends_the_run_before_its_checkpoint_and_a_start_anew_heals_it(tmp_path):
    urls = write_pairs(tmp_path / "data", 4, 6, size=16)
    for rank in range(3):
        (tmp_path / str(rank)).mkdir()
    for told, published, healed in run_ranks(drifting, 2, str(tmp_path), urls):
        assert told.startswith("step 2: ranks 0 and 1 differ in text.ln_final.weight: ranks have drifted apart")
        assert published == ["step-000000001"]
        assert healed


def odd_ones(rank: int, size: int) -> tuple[str, str]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    world = World(rank, size, rank, torch.device("cpu"))
    averages = {"0.bias": torch.zeros(3)}
    compare_ranks(model, averages, world, step=1)
    averages["0.bias"][2] += rank == 2
    with pytest.raises(RestartError) as average:
        compare_ranks(model, averages, world, step=1)
    with torch.no_grad():
        model[1].weight[0, 0] += rank == 1
        model[1].bias[0] += rank == 0
    with pytest.raises(RestartError) as error:
        compare_ranks(model, averages, world, step=2)
    return str(average.value), str(error.value)


def test_the_odd_one_of_several_ranks_is_named():
    for average, told in run_ranks(odd_ones, 3):
        assert average.startswith("step 1: rank 2 differs in the average of 0.bias: ")
        assert told.startswith("step 2: rank 1 differs in 1.weight: ")
        assert "start again" in told
