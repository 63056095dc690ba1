
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipscale.data.mixture import begin, quotas
from clipscale.errors import UserError


def named(weights: list[float]) -> dict[str, float]:
    return {f"s{i}": weight for i, weight in enumerate(weights)}


weights = st.lists(st.just(0.0) | st.floats(0.1, 10), min_size=1, max_size=5).filter(any).map(named)


@settings(max_examples=100, deadline=None)
@given(weights, st.integers(500, 1000), st.integers(0, 2**40))
def test_a_mixture_is_exact_in_every_cycle(weights, cycle, seed):
    quota = quotas(weights, cycle)
    share = {name: weight / sum(weights.values()) for name, weight in weights.items()}
    assert sum(quota.values()) == cycle
    assert quota.keys() == {name for name, weight in weights.items() if weight}
    assert all(abs(slots - cycle * share[name]) < 1 for name, slots in quota.items())
    mixture = begin(quota, seed=seed)
    source, ordinal = mixture.locate(np.arange(3 * cycle))
    for c in range(3):
        here = slice(c * cycle, (c + 1) * cycle)
        assert np.bincount(source[here]).tolist() == [*quota.values()]
    for i, name in enumerate(mixture.names):
        assert sorted(ordinal[source == i]) == list(range(3 * quota[name]))  # every ordinal once, none left out
    some = np.array([0, cycle - 1, cycle, 2 * cycle + 17])
    for part, whole in zip(begin(quota, seed=seed).locate(some), (source, ordinal), strict=True):
        np.testing.assert_array_equal(part, whole[some])


def test_a_mixture_mixes_within_a_cycle_and_changes_between_cycles():
    source, _ = begin(quotas({"a": 1, "b": 3}, 1000), seed=5).locate(np.arange(2000))
    assert 15 <= (source[:100] == 0).sum() <= 35
    assert (source[:1000] != source[1000:]).sum() > 200


def test_golden_mixture():
    """A resume by another version must go on with the same samples."""
    mixture = begin(quotas({"a": 2, "b": 1, "c": 1}, 8), seed=9)
    source, ordinal = mixture.locate(np.arange(16))
    assert source.tolist() == [1, 0, 2, 0, 2, 0, 1, 0, 1, 0, 1, 0, 2, 0, 0, 2]
    assert ordinal.tolist() == [0, 2, 0, 1, 1, 0, 1, 3, 2, 6, 3, 7, 2, 4, 5, 3]


def test_a_weight_of_less_than_one_sample_a_cycle_is_refused():
    with pytest.raises(UserError, match="source 'b': its weight=1e-06 is under one sample in 10,000"):
        quotas({"a": 1, "b": 1e-6})
