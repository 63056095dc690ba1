import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipscale.counter import draw, fold
from clipscale.data.order.order import Order, Resampled, default_streams, rank_positions

# --- Order: what it promises for every configuration ------------------------------------------------------------------


@st.composite
def orders(draw):
    counts = draw(st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any))
    samples = sum(counts)
    return {
        "counts": counts,
        "seed": draw(st.integers(0, 2**63)),
        "streams": draw(st.integers(1, 24)),
        "block_shards": draw(st.none() | st.integers(1, 5)),
        "epoch_length": draw(st.none() | st.integers(1, samples)),
    }


def identify(shard: np.ndarray, index: np.ndarray) -> np.ndarray:
    return shard * 1000 + index


@settings(max_examples=150, deadline=None)
@given(orders())
def test_each_sample_once_an_epoch(kwargs):
    order, counts = Order(**kwargs), np.array(kwargs["counts"])
    length = kwargs["epoch_length"] or sum(counts)
    epoch, shard, index = order.locate(np.arange(3 * length))
    assert (epoch == np.repeat(np.arange(3), length)).all()
    assert (index >= 0).all()
    assert (index < counts[shard]).all()
    for e in range(3):
        seen = identify(shard, index)[epoch == e]
        assert len(np.unique(seen)) == length == len(seen)


@settings(max_examples=80, deadline=None)
@given(orders(), st.data())
def test_the_place_of_a_position_depends_on_nothing_else(kwargs, data):
    """Not on what was asked before, nor on what else is asked, nor on the object."""
    order = Order(**kwargs)
    last = 4 * order.epoch_length - 1
    positions = np.array(data.draw(st.lists(st.integers(0, last), min_size=1, max_size=20)))
    together = order.locate(positions)
    for number, position in enumerate(positions):
        for other in (order, Order(**kwargs)):
            alone = other.locate(np.array([position]))
            assert [int(a[0]) for a in alone] == [int(t[number]) for t in together]
    everything = order.locate(np.arange(last + 1))
    for part, whole in zip(together, everything, strict=True):
        np.testing.assert_array_equal(part, whole[positions])


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 6), st.integers(1, 24), st.integers(0, 10**12))
def test_ranks_partition_a_batch_for_every_world(times, streams, start):
    batch = times * streams
    for world in (w for w in range(1, batch + 1) if batch % w == 0):
        parts = [rank_positions(start, batch, world=world, rank=rank, streams=streams) for rank in range(world)]
        assert {len(part) for part in parts} == {batch // world}
        assert sorted(np.concatenate(parts)) == list(range(start, start + batch))


def test_a_rank_keeps_to_few_streams():
    positions = rank_positions(640, 64, world=4, rank=1, streams=8)
    assert set(positions % 8) == {2, 3}


def test_golden_positions():
    """A resume by another version must go on with the same samples."""
    order = Order([3, 0, 5, 1, 4], seed=7, streams=2, block_shards=2)
    epoch, shard, index = order.locate(np.arange(20))
    assert epoch.tolist() == [0] * 13 + [1] * 7
    assert shard.tolist() == [3, 0, 2, 0, 2, 4, 2, 4, 2, 4, 2, 4, 0, 3, 0, 4, 2, 0, 2, 4]
    assert index.tolist() == [0, 1, 0, 2, 4, 0, 1, 2, 2, 1, 3, 3, 0, 0, 2, 0, 4, 1, 1, 3]
    _, shard, index = Order([40] * 9, seed=123, streams=4).locate(np.array([0, 1, 359, 360, 10**9]))
    assert [shard.tolist(), index.tolist()] == [[3, 1, 4, 5, 7], [8, 33, 38, 39, 7]]


def test_epochs_and_seeds_differ():
    order = Order([50] * 8, seed=1, streams=4)
    _, shard, index = order.locate(np.arange(4 * 400))
    runs = [*identify(shard, index).reshape(4, 400)]
    runs.append(identify(*Order([50] * 8, seed=2, streams=4).locate(np.arange(400))[1:]))
    for i in range(len(runs)):
        for j in range(i):
            assert (runs[i] == runs[j]).sum() < 20  # 1 by chance


def test_epochs_gone_by_take_no_memory():
    order = Order([5] * 8, seed=1)
    order.locate(np.arange(100 * 40))
    assert len(order._lines) <= 4


def test_the_samples_left_out_change_from_epoch_to_epoch():
    order = Order([25] * 8, seed=1, streams=4, epoch_length=160)
    _, shard, index = order.locate(np.arange(20 * 160))
    used = np.bincount(identify(shard, index), minlength=8000).reshape(8, 1000)[:, :25]
    assert used.min() >= 8  # 16 of 20 epochs in the mean
    assert used.max() <= 20


@pytest.mark.parametrize("kind", [Order, Resampled])
@pytest.mark.parametrize("counts", [[1], [0, 1, 0], [1] * 9, [5, 0, 0, 300], [7, 1, 0, 2, 90, 1]])
def test_ranks_read_what_one_rank_reads(kind, counts):
    """Shards fewer than ranks, fewer than streams, of one sample, empty; an epoch's end within the batch."""
    streams, batch = 12, 120
    order = kind(counts, seed=4, streams=streams)
    for start in (0, order.samples - order.samples % batch, 10**9):
        alone = np.stack(order.locate(np.arange(start, start + batch)))
        for world in (1, 2, 3, 5, 8):
            found = np.full_like(alone, -1)
            for rank in range(world):
                positions = rank_positions(start, batch, world=world, rank=rank, streams=streams)
                found[:, positions - start] = np.stack(kind(counts, seed=4, streams=streams).locate(positions))
            np.testing.assert_array_equal(found, alone)


# --- tar neighbours: near-duplicates lie side by side in a shard; they must not be kept apart, nor together -----------


def neighbours_together(order: Order, batch: int, epochs: int) -> float:
    """How often tar neighbours share a batch, relative to chance."""
    together = pairs = 0
    for e in range(epochs):
        _, shard, index = order.locate(np.arange(e * order.samples, (e + 1) * order.samples))
        step = np.full((len(order.counts), order.counts.max()), -1)
        step[shard, index] = np.arange(order.samples) // batch
        together += (step[:, 1:] == step[:, :-1]).sum()
        pairs += step[:, 1:].size
    chance = (batch - 1) / (order.samples - 1)
    return together / pairs / chance


@pytest.mark.parametrize(
    ("shards", "per_shard", "batch", "epochs"),
    [
        (1, 5000, 64, 8),
        (4, 500, 128, 12),
        (10, 500, 256, 6),
        (40, 200, 512, 4),
        (64, 1000, 4096, 1),
        (300, 100, 1024, 4),
        (2000, 5, 512, 40),
    ],
)
def test_tar_neighbours_share_a_batch_about_as_often_as_chance(shards, per_shard, batch, epochs):
    streams = default_streams(shards, batch)
    order = Order([per_shard] * shards, seed=3, streams=streams)
    assert 0.5 < neighbours_together(order, batch, epochs) < 2


def test_streams_as_many_as_the_batch_would_keep_neighbours_apart():
    order = Order([500] * 10, seed=3, streams=256)
    assert neighbours_together(order, 256, 6) < 0.1


def test_small_blocks_would_keep_neighbours_together():
    order = Order([200] * 40, seed=3, streams=1, block_shards=1)
    assert neighbours_together(order, 512, 4) > 10


@given(st.integers(1, 10**6), st.integers(1, 2**24))
def test_default_streams_divide_the_batch_and_leave_blocks_of_four_shards(shards, batch):
    for divides in (True, False):
        streams = default_streams(shards, batch, divides=divides)
        assert batch % streams == 0 or not divides
        assert streams == 1 or (shards / streams >= 4 and batch / streams >= 4)


# --- at scale ---------------------------------------------------------------------------------------------------------


def test_four_hundred_million_samples_are_set_up_and_located_in_a_moment():
    counts = np.random.default_rng(0).integers(9000, 10_001, 41_455)
    start = time.process_time()
    order = Order(counts, seed=0, streams=default_streams(41_455, 1 << 20))
    positions = rank_positions(100 << 20, 1 << 20, world=64, rank=5, streams=order.streams)
    epoch, shard, index = order.locate(positions)
    assert time.process_time() - start < 2  # about 0.05 s on an idle machine
    assert len(positions) == 16_384
    assert (epoch == 0).all()
    assert (index < counts[shard]).all()
    assert len(np.unique(shard)) < 1500  # a rank's slice keeps to few of the 41,455 shards


# --- Resampled --------------------------------------------------------------------------------------------------------


@st.composite
def resampled(draw):
    counts = draw(st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any))
    return {
        "counts": counts,
        "seed": draw(st.integers(0, 2**63)),
        "streams": draw(st.integers(1, 24)),
        "block_shards": draw(st.none() | st.integers(1, 5)),
    }


@settings(max_examples=80, deadline=None)
@given(resampled(), st.data())
def test_a_draw_depends_on_its_position_alone(kwargs, data):
    order, counts = Resampled(**kwargs), np.array(kwargs["counts"])
    positions = np.array(data.draw(st.lists(st.integers(0, 5000), min_size=1, max_size=20)))
    together = order.locate(positions)
    assert (together[0] == positions // sum(counts)).all()
    assert (together[2] >= 0).all()
    assert (together[2] < counts[together[1]]).all()
    for number, position in enumerate(positions):
        alone = Resampled(**kwargs).locate(np.array([position]))
        assert [int(a[0]) for a in alone] == [int(t[number]) for t in together]
    everything = order.locate(np.arange(5001))
    for part, whole in zip(together, everything, strict=True):
        np.testing.assert_array_equal(part, whole[positions])


@settings(max_examples=60, deadline=None)
@given(resampled())
def test_a_block_takes_no_sample_twice_before_its_bin_is_used_up(kwargs):
    order, counts = Resampled(**kwargs), np.array(kwargs["counts"])
    blocks = 3
    positions = np.arange((blocks + 1) * order._block_length) * order.streams  # those of stream 0
    row = int(draw(fold(order.seed, "stagger"), np.zeros(1))[0] % np.uint64(order._block_length))
    _, shard, index = order.locate(positions)
    starts = np.concatenate([[0], np.cumsum(counts)])
    bin = np.searchsorted(order._edges, starts[shard] + index, side="right") - 1
    size = np.diff(order._edges)
    assert size.min() >= order._per_bin
    for block in range(1, blocks + 1):
        here = slice(block * order._block_length - row, (block + 1) * order._block_length - row)
        for b in np.unique(bin[here]):
            times = np.unique(identify(shard[here], index[here])[bin[here] == b], return_counts=True)[1]
            taken = times.sum()
            assert taken % order._per_bin == 0
            assert times.max() == -(-taken // size[b])
            assert len(times) == min(taken, size[b])


@pytest.mark.parametrize(
    ("counts", "streams", "block_shards"),
    [
        ([100] * 40, 8, None),
        ([37, 0, 120, 1, 64, 64, 3, 200, 90, 15], 5, 3),  # small shards share a bin, an empty one has no part
        ([1] * 50, 4, 7),
        ([250], 3, None),
    ],
)
def test_every_sample_is_drawn_as_often_as_any_other(counts, streams, block_shards):
    """Chi-square over shards and over samples, of one slot of each block: those are drawn independently."""
    order = Resampled(counts, seed=11, streams=streams, block_shards=block_shards)
    samples, counts = sum(counts), np.array(counts)
    block, stream = np.divmod(np.arange(6000 * streams), streams)
    _, shard, index = order.locate((block * order._block_length + 5) * streams + stream)
    expected = len(shard) / samples
    assert chi_square_score(np.bincount(shard, minlength=len(counts))[counts > 0], counts[counts > 0] * expected) < 5
    starts = np.concatenate([[0], np.cumsum(counts)])
    assert chi_square_score(np.bincount(starts[shard] + index, minlength=samples), np.full(samples, expected)) < 5


def chi_square_score(found: np.ndarray, expected: np.ndarray) -> float:
    """How many standard deviations chi-square lies above its mean; Wilson and Hilferty's normal approximation."""
    freedom = len(found) - 1
    if freedom == 0:
        return float((found != expected).any()) * 99
    chi_square = ((found - expected) ** 2 / expected).sum()
    third = 2 / (9 * freedom)
    return float(((chi_square / freedom) ** (1 / 3) - (1 - third)) / third**0.5)


def test_the_score_finds_a_sample_that_is_drawn_too_often():
    rng, often = np.random.default_rng(0), np.full(100, 0.01)
    assert chi_square_score(rng.multinomial(100_000, often), np.full(100, 1000.0)) < 5
    often[3] *= 1.5
    assert chi_square_score(rng.multinomial(100_000, often / often.sum()), np.full(100, 1000.0)) > 5


def test_draws_of_streams_blocks_and_seeds_are_independent():
    kwargs = {"counts": [50] * 20, "streams": 4}
    order = Resampled(**kwargs, seed=1)
    length = order._block_length * 4
    _, shard, index = order.locate(np.arange(8 * length))
    runs = [*identify(shard, index).reshape(8, length)]
    runs.append(identify(*Resampled(**kwargs, seed=2).locate(np.arange(length))[1:]))
    for i in range(len(runs)):
        for j in range(i):
            assert (runs[i] == runs[j]).sum() < 10  # 0.8 by chance


def test_golden_draws():
    """A resume by another version must go on with the same samples."""
    _, shard, index = Resampled([3, 0, 5, 1, 4], seed=7, streams=2, block_shards=2).locate(np.arange(12))
    assert shard.tolist() == [2, 0, 2, 4, 2, 2, 4, 2, 0, 2, 0, 4]
    assert index.tolist() == [4, 0, 3, 0, 3, 1, 1, 3, 1, 2, 0, 1]


def test_tar_neighbours_share_a_resampled_batch_about_as_often_as_chance():
    order = Resampled([200] * 40, seed=3, streams=default_streams(40, 512))
    together = 0
    for step in range(200):
        _, shard, index = order.locate(np.arange(step * 512, (step + 1) * 512))
        number = np.unique(shard * 200 + index)
        together += ((np.diff(number) == 1) & (number[1:] % 200 > 0)).sum()
    chance = 200 * 40 * 199 * (512 / 8000) ** 2
    assert 0.5 < together / chance < 2
