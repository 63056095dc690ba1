import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipscale.data.order.mixture import Mixture, begin, quotas, resumed
from clipscale.errors import UserError


def named(weights: list[float]) -> dict[str, float]:
    return {f"s{i}": weight for i, weight in enumerate(weights)}


weights = st.lists(st.just(0.0) | st.floats(0.1, 10), min_size=1, max_size=5).filter(any).map(named)


@settings(max_examples=60, deadline=None)
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
        assert ordinal[source == i].tolist() == list(range(3 * quota[name]))  # one by one, as they come
    some = np.array([0, cycle - 1, cycle, 2 * cycle + 17])
    for part, whole in zip(begin(quota, seed=seed).locate(some), (source, ordinal), strict=True):
        np.testing.assert_array_equal(part, whole[some])


def test_a_mixture_mixes_within_a_cycle_and_changes_between_cycles():
    source, _ = begin(quotas({"a": 1, "b": 3}, 1000), seed=5).locate(np.arange(2000))
    assert 15 <= (source[:100] == 0).sum() <= 35
    assert (source[:1000] != source[1000:]).sum() > 200


def test_golden_mixture():
    """A resume by another version must go on with the same samples."""
    source, ordinal = begin(quotas({"a": 2, "b": 1, "c": 1}, 8), seed=9).locate(np.arange(16))
    assert source.tolist() == [0, 1, 2, 0, 2, 0, 0, 1, 0, 0, 1, 0, 1, 2, 0, 2]
    assert ordinal.tolist() == [0, 0, 0, 1, 1, 2, 3, 1, 4, 5, 2, 6, 3, 2, 7, 3]


def test_a_weight_of_less_than_one_sample_a_cycle_is_refused():
    with pytest.raises(UserError, match="source 'b': its weight=1e-06 is under one sample in 10,000"):
        quotas({"a": 1, "b": 1e-6})


# --- weights that change at a resume ----------------------------------------------------------------------------------

CYCLE = 60
some_weights = st.dictionaries(st.sampled_from("abcd"), st.sampled_from([0.0, 1.0, 2.0, 5.0]), min_size=1).filter(
    lambda weights: any(weights.values())
)


def saved(mixture: Mixture) -> Mixture:
    return resumed(json.loads(json.dumps(mixture.journal())), seed=mixture.seed)


def turns(mixture: Mixture, stop: int) -> list[tuple[str, int]]:
    source, ordinal = mixture.locate(np.arange(stop))
    return [(mixture.names[i], n) for i, n in zip(source, ordinal.tolist(), strict=True)]


@settings(max_examples=80, deadline=None)
@given(some_weights, st.lists(st.tuples(st.integers(0, 200), some_weights), max_size=6), st.integers(0, 2**40))
def test_changed_weights_lose_no_sample_and_repeat_none(first, changes, seed):
    mixture, position = begin(quotas(first, CYCLE), seed=seed), 0
    for samples, weights in [*changes, (37, dict.fromkeys("abcd", 1.0))]:
        position += samples
        before = turns(mixture, position)
        mixture = saved(mixture.changed(position, quotas(weights, CYCLE)))
        assert mixture.quota == quotas(weights, CYCLE)
        assert turns(mixture, position) == before  # what was trained on keeps its meaning
    found = turns(mixture, position + 5 * CYCLE)
    for name in "abcd":
        ordinals = [n for of, n in found if of == name]
        assert ordinals == list(range(len(ordinals)))  # also across the cuts
    for start in range(mixture.segments[-1].start, position + 4 * CYCLE, CYCLE):
        assert np.bincount(mixture.locate(np.arange(start, start + CYCLE))[0]).tolist() == [CYCLE // 4] * 4
    given_before: Counter[str] = Counter()
    for stop in range(position + 1):
        assert mixture.taken(stop).tolist() == [given_before[name] for name in mixture.names]
        given_before[found[stop][0]] += 1


def test_the_same_weights_change_nothing():
    mixture = begin(quotas({"a": 1, "b": 3}), seed=1)
    assert mixture.changed(12_345, quotas({"b": 6, "a": 2, "c": 0})).journal() == mixture.journal()


def test_a_source_that_comes_back_goes_on_where_it_was():
    mixture = begin(quotas({"a": 1, "b": 1}, 10), seed=1)
    alone = mixture.changed(25, quotas({"a": 1, "b": 0}, 10))
    again = alone.changed(1000, quotas({"a": 1, "b": 1}, 10))
    given_before = [n for name, n in turns(mixture, 25) if name == "b"]
    given_after = [n for name, n in turns(again, 1100)[1000:] if name == "b"]
    assert not set(turns(alone, 1000)[25:]) & set(turns(mixture, 25))
    assert sorted(given_before + given_after) == list(range(len(given_before) + 50))
    assert alone.names == ["a", "b"]
    assert [*alone.quota] == ["a"]


def test_a_change_that_gave_nothing_leaves_no_trace():
    """Resumed twice at one position, or from a checkpoint that was written before it."""
    mixture = begin(quotas({"a": 1, "b": 1}), seed=1)
    changed = mixture.changed(500, quotas({"a": 1, "c": 2}))
    assert changed.changed(500, quotas({"a": 1, "b": 1})).journal() == mixture.journal()
    twice = changed.changed(500, quotas({"a": 3, "b": 1}))
    assert [segment.start for segment in twice.segments] == [0, 500]
    assert twice.names == ["a", "b"]
    anew = changed.changed(0, quotas({"c": 1}))
    assert anew.journal() == begin(quotas({"c": 1}), seed=1).journal()


def test_golden_change():
    """A resume by another version must go on with the same samples."""
    mixture = begin(quotas({"a": 2, "b": 1, "c": 1}, 8), seed=9).changed(11, quotas({"c": 1, "a": 1}, 8))
    source, ordinal = mixture.locate(np.arange(8, 24))
    assert mixture.journal()[1] == {"start": 11, "quota": {"c": 4, "a": 4}, "base": {"c": 2, "a": 6, "b": 3}}
    assert mixture.names == ["c", "a", "b"]
    assert source.tolist() == [1, 1, 2, 0, 1, 0, 1, 1, 0, 1, 0, 1, 0, 1, 0, 0]
    assert ordinal.tolist() == [4, 5, 2, 2, 6, 3, 7, 8, 4, 9, 5, 10, 6, 11, 7, 8]
