"""clipscale/bench/loss/simulate.py: ranks as threads. Their loss is that of one rank, and no fault hangs."""

import threading
from contextlib import contextmanager

import pytest
import torch

from clipscale.bench.loss.inputs import draw_pairs, split_rows
from clipscale.bench.loss.simulate import run_ranks
from clipscale.loss import contrastive_grads, contrastive_loss, dense_contrastive_loss

CPU = torch.device("cpu")


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_the_loss_of_simulated_ranks_is_that_of_one(ranks):
    """Both doors, in float64; ranks with unequal numbers of pairs, none included."""
    image_BD, text_BD = draw_pairs(range(23), 8, seed=1, device=CPU, dtype=torch.float64)
    leaves = [torch.as_tensor(value, dtype=torch.float64).requires_grad_() for value in (image_BD, text_BD, 14.3)]
    whole = contrastive_grads(image_BD, text_BD, 14.3)
    dense = dense_contrastive_loss(*leaves)
    expected = torch.autograd.grad(dense, leaves)
    parts = [slice(part.start, part.stop) for part in split_rows(23, ranks)]
    if ranks == 5:
        parts[1:3] = [slice(parts[1].start, parts[2].stop), slice(parts[2].stop, parts[2].stop)]

    def grads(link):
        rows = parts[link.rank]
        return contrastive_grads(image_BD[rows], text_BD[rows], 14.3, group=link, tile=4)

    def autograd(link):
        own = [leaf.detach()[parts[link.rank]].requires_grad_() for leaf in leaves[:2]]
        scale = leaves[2].detach().requires_grad_()
        loss = contrastive_loss(*own, scale, link, tile=4)
        return loss.detach(), torch.autograd.grad(loss, [*own, scale])

    close = {"rtol": 1e-12, "atol": 1e-15}
    by_rank = run_ranks(ranks, grads)
    for got in by_rank:
        torch.testing.assert_close(got.loss, whole.loss, **close)
        torch.testing.assert_close(got.d_logit_scale, expected[2], **close)
        assert (got.pairs, got.image_accuracy) == (23, whole.image_accuracy)
    for side, truth in (("d_image_ND", expected[0]), ("d_text_ND", expected[1])):
        torch.testing.assert_close(torch.cat([getattr(got, side) for got in by_rank]), truth, **close)
    for loss, (d_image_ND, d_text_ND, d_scale) in (results := run_ranks(ranks, autograd)):
        torch.testing.assert_close(loss, dense.detach(), **close)
        torch.testing.assert_close(d_scale, expected[2], **close)
        assert d_image_ND.shape == d_text_ND.shape
    for side in (0, 1):
        got = torch.cat([gradients[side] for _, gradients in results])
        torch.testing.assert_close(got, ranks * expected[side], **close)


def test_collectives():
    def work(link):
        everyone = [link.gather(torch.tensor([link.rank, 10 * turn])) for turn in range(4)]
        total = torch.full((3,), 0.1 * (link.rank + 1))
        assert link.sum(total) is total
        return everyone, total

    for everyone, total in run_ranks(4, work):
        for turn, got in enumerate(everyone):
            assert got.tolist() == [[rank, 10 * turn] for rank in range(4)]
        assert total.equal(run_ranks(4, work)[0][1]), "the same bits on every rank, every time"


def test_exchanges_may_be_awaited_in_another_order_than_posted():
    """And a sent tensor may be overwritten after the wait, not before: two laps of blocks and what lags behind them."""

    def work(link):
        after, before = (link.rank + 1) % link.size, (link.rank - 1) % link.size
        first, second = torch.full((3,), float(link.rank)), torch.full((2,), 10.0 * link.rank)
        got_first, got_second = torch.empty(3), torch.empty(2)
        wait_first = link.exchange([first], after, [got_first], before)
        wait_second = link.exchange([second, first], after, [got_second, torch.empty(3)], before)
        wait_second()
        wait_first()
        first.fill_(-1.0)
        link.exchange([], after, [], before)()
        return got_first.tolist(), got_second.tolist()

    for ranks in (1, 2, 4):
        for rank, got in enumerate(run_ranks(ranks, work)):
            before = (rank - 1) % ranks
            assert got == ([before] * 3, [10.0 * before] * 2)


@pytest.mark.timeout(120)
def test_an_error_of_one_rank_ends_all_and_is_raised():
    def work(link):
        if link.rank == 2:
            raise KeyError("of rank 2")
        link.gather(torch.tensor([link.rank]))

    alive = threading.active_count()
    with pytest.raises(KeyError, match="of rank 2"):
        run_ranks(4, work)
    assert threading.active_count() <= alive  # fewer: of earlier tests


@pytest.mark.timeout(120)
def test_a_rank_that_leaves_early_is_named():
    def gathering(link):
        if link.rank != 1:
            link.sum(torch.zeros(1))

    def exchanging(link):
        if link.rank == 0:
            link.exchange([torch.zeros(1)], 1, [torch.zeros(1)], 1)()

    for work in (gathering, exchanging):
        with pytest.raises(RuntimeError, match=r"simulated rank \d waits for ranks \[1\], which have ended"):
            run_ranks(2 if work is exchanging else 3, work)


def test_ranks_take_turns_and_work_within_what_is_around_them():
    running, entered = [], []

    @contextmanager
    def around():
        entered.append(threading.get_ident())
        yield

    def work(link):
        for _ in range(20):
            running.append(link.rank)
            assert len(running) == 1
            torch.ones(1000).sum()
            running.clear()
            link.gather(torch.tensor([0]))
        return threading.get_ident()

    assert sorted(run_ranks(3, work, around=around)) == sorted(entered)
