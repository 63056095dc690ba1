"""clipscale/bench/data/order.py: its rows, and that what it counts is there."""

import numpy as np
import pytest

from clipscale.bench.data.order import _neighbours_share, order_rows

LAYOUTS = ["default", "V=512, K=4", "V=2048, K=4", "V=1024, K=8", "resampled", "mixture of 3"]


def rows(**kwargs) -> dict[str, dict]:
    return {row["layout"]: row for row in order_rows(**{"global_batch": 4096, "world": 8, "repeats": 1} | kwargs)}


@pytest.fixture(scope="module")
def small() -> dict[str, dict]:
    return rows(shards=3000, per_shard=100)


def test_every_layout_has_its_row(small):
    assert [*small] == LAYOUTS
    for row in small.values():
        assert row["slice"] == 512
        assert 0 < row["rank_shards"] <= row["batch_shards"] <= 3000
        assert all(value > 0 for key, value in row.items() if key.endswith("_ms"))
    assert small["V=512, K=4"]["streams"] == [512]
    assert len(small["mixture of 3"]["streams"]) == 3


def test_tar_neighbours_by_default_as_chance_has_it_and_small_blocks_show(small):
    for layout in ("default", "resampled", "mixture of 3"):
        assert 0.5 < small[layout]["neighbours_over_chance"] < 2
    in_one_batch = rows(shards=6000, per_shard=1000)["V=512, K=4"]["neighbours_over_chance"]
    assert 2.5 < in_one_batch < 6  # 512 blocks of 4 are a third of 6,000 shards; an epoch's first blocks are smaller


def test_neighbours_are_counted_as_by_hand():
    rng = np.random.default_rng(0)
    counts = [np.array([3, 0, 5]), np.array([4, 2])]
    everything = [(s, k, i) for s, part in enumerate(counts) for k, n in enumerate(part) for i in range(n)]
    for _ in range(50):
        chosen = {everything[i] for i in rng.choice(len(everything), 7, replace=False)}
        expected = sum((s, k, i + 1) in chosen for s, k, i in chosen) / 7
        source, shard, index = np.array(sorted(chosen, key=lambda _: rng.random())).T
        assert _neighbours_share((source, source, shard, index), counts) == pytest.approx(expected)


def test_memory_grows_with_shards_and_not_with_samples(small):
    for layout, more_samples in rows(shards=3000, per_shard=10_000).items():
        assert more_samples["memory_bytes"] < small[layout]["memory_bytes"] * 1.1
    for layout, more_shards in rows(shards=12_000, per_shard=100).items():
        assert more_shards["memory_bytes"] < small[layout]["memory_bytes"] * 4.4
        assert more_shards["memory_bytes"] < 12_000 * 64 + 500_000  # bytes; a mixture's pattern takes the constant
