"""`ClipLoss` beside open_clip's: under DDP on two gloo ranks with every combination of flags, and alone.

Shapes: N pairs on this rank, B pairs of all ranks, D width.
"""

import inspect
import itertools

import open_clip
import pytest
import torch
import torch.distributed as dist
from spawn import run_ranks
from test_loss_tiles import make_pairs
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from clipscale.loss import ClipLoss, dense_contrastive_loss

WORLD, PAIRS = 2, 5
FLAGS = list(itertools.product([False, True], repeat=2))  # local_loss, gather_with_grad
EXACT = {"rtol": 1e-9, "atol": 1e-15}


class Model(nn.Module):
    """A linear tower each and a scale."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = (nn.Linear(12, 6, dtype=torch.float64) for _ in range(2))
        self.logit_scale = nn.Parameter(torch.tensor(2.66, dtype=torch.float64))

    def forward(self, image_ND, text_ND):
        features = (
            nn.functional.normalize(tower(x), dim=-1) for tower, x in ((self.image, image_ND), (self.text, text_ND))
        )
        return *features, self.logit_scale.exp()


def evaluated(loss_fn, model, inputs):
    """The loss and the gradients of towers and scale."""
    loss = loss_fn(*model(*inputs))
    loss.backward()
    model = getattr(model, "module", model)
    towers = torch.cat([p.grad.flatten() for tower in (model.image, model.text) for p in tower.parameters()])
    return loss.detach(), towers, model.logit_scale.grad


def under_ddp(rank, world):
    """By class and flags, on this rank's half of the batch."""
    inputs = [side_BD.split(PAIRS)[rank] for side_BD in make_pairs(world * PAIRS, 12)]
    outcomes = {}
    for name, kind in (("open_clip", open_clip.ClipLoss), ("ours", ClipLoss)):
        for flags in FLAGS:
            loss_fn = kind(*flags, False, rank, world)  # by position, as open_clip's factory may
            outcomes[name, flags] = evaluated(loss_fn, DistributedDataParallel(Model()), inputs)
    return outcomes


@pytest.fixture(scope="module")
def by_rank():
    return run_ranks(under_ddp, WORLD)


@pytest.fixture(scope="module")
def whole():
    """The truth: one process, the whole batch."""
    return evaluated(dense_contrastive_loss, Model(), make_pairs(WORLD * PAIRS, 12))


@pytest.mark.parametrize("flags", FLAGS)
def test_ours_is_exact_under_every_combination(by_rank, whole, flags):
    for outcomes in by_rank:
        for found, wanted in zip(outcomes["ours", flags], whole, strict=True):
            torch.testing.assert_close(found, wanted, **EXACT)


def test_what_the_docstring_says_of_open_clip(by_rank, whole):
    loss, towers, d_scale = whole
    for outcomes in by_rank:
        for local_loss, gather_with_grad in FLAGS:
            found = outcomes["open_clip", (local_loss, gather_with_grad)]
            torch.testing.assert_close(found[2], d_scale, **EXACT)
            if not local_loss:
                torch.testing.assert_close(found[0], loss, **EXACT)
            if gather_with_grad:
                torch.testing.assert_close(found[1], towers, **EXACT)
            elif not local_loss:
                torch.testing.assert_close(found[1] * WORLD, towers, **EXACT)
            else:  # not the truth times anything
                residual = found[1] - towers * (found[1] @ towers) / (towers @ towers)
                assert residual.norm() > 0.01 * found[1].norm()
    for gather_with_grad in (False, True):
        values = [outcomes["open_clip", (True, gather_with_grad)][0] for outcomes in by_rank]
        assert abs(values[0] - loss) > 1e-3
        torch.testing.assert_close(sum(values) / WORLD, loss, **EXACT)


def test_the_constructor_and_the_call_are_open_clips():
    for method in ("__init__", "forward"):
        theirs = inspect.signature(getattr(open_clip.ClipLoss, method)).parameters
        ours = inspect.signature(getattr(ClipLoss, method)).parameters
        assert list(ours)[: len(theirs)] == list(theirs)
        assert [p.default for p in theirs.values()] == [ours[name].default for name in theirs]
        assert all(p.kind == p.KEYWORD_ONLY for p in list(ours.values())[len(theirs) :])


@pytest.mark.parametrize("flags", [(), (True, False, True), (False, True, True)])
def test_alone_it_is_open_clips(flags):
    model = Model()
    features = model(*make_pairs(PAIRS, 12))
    wanted = open_clip.ClipLoss(*flags)(*features, output_dict=True)
    found = ClipLoss(*flags, tile=2)(*features, output_dict=True)
    assert list(found) == list(wanted) == ["contrastive_loss"]
    torch.testing.assert_close(found["contrastive_loss"], wanted["contrastive_loss"], **EXACT)
    assert not list(ClipLoss().state_dict())


def as_made_for_others(rank, world):
    """The value of a module for one process; the errors of modules for other ranks; a group of this rank alone."""
    inputs = make_pairs(PAIRS + rank, 6)
    messages = []
    for arguments in (
        {"world_size": 3, "rank": rank},
        {"world_size": 2, "rank": 1 - rank},
        {"group": dist.group.WORLD},
    ):
        with pytest.raises(ValueError) as caught:
            ClipLoss(**arguments)(*inputs, 14.3)
        messages.append(str(caught.value))
    groups = [dist.new_group([0]), dist.new_group([1])]
    return ClipLoss()(*inputs, 14.3), ClipLoss(group=groups[rank])(*inputs, 14.3), messages


def test_one_process_is_one_process_and_other_ranks_are_an_error():
    for rank, (alone, own_group, messages) in enumerate(run_ranks(as_made_for_others, 2)):
        wanted = dense_contrastive_loss(*make_pairs(PAIRS + rank, 6), 14.3)
        torch.testing.assert_close(alone, wanted, **EXACT)
        torch.testing.assert_close(own_group, wanted, **EXACT)
        size, place, default = messages
        assert (
            f"rank={rank}, world_size=3, and this process is rank {rank} of 2: pass torch.distributed.get_rank()"
            in size
        )
        assert f"rank={1 - rank}, world_size=2, and this process is rank {rank} of 2" in place
        assert f"rank=0, world_size=1, and this process is rank {rank} of 2" in default


def test_what_is_not_offered():
    features = Model()(*make_pairs(PAIRS, 12))
    with pytest.raises(ValueError, match=r"use_horovod=True: .*use open_clip's ClipLoss"):
        ClipLoss(use_horovod=True)
    for bias in (0.0, nn.Parameter(torch.tensor(-10.0))):
        with pytest.raises(ValueError, match=r"belongs to the sigmoid loss, .*use open_clip's SigLipLoss"):
            ClipLoss()(*features, bias)
    with pytest.raises(
        ValueError, match=r"rank=0, world_size=2, and this process is rank 0 of 1: .*after init_process_group"
    ):
        ClipLoss(world_size=2)(*features)
    with pytest.raises(ValueError, match="engine 'cuda' is unknown"):
        ClipLoss(engine="cuda")(*features)
