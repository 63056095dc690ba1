"""clipscale/data/load/shape.py: the arithmetic of a step's chunks."""

import pytest

from clipscale.data.load.shape import StepShape, spans

FIT = {"chunk": 256, "side": 10, "ahead_steps": 1, "ahead_bytes": 10**9}


@pytest.mark.parametrize("slots", [1, 7, 8, 9, 64])
@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_chunks_follow_one_another_and_cover_every_slot_once(slots, chunk):
    shape = StepShape.fit(slots, **FIT | {"chunk": chunk})
    assert [slot for start, stop in shape.spans for slot in range(start, stop)] == [*range(slots)]
    assert len(shape.spans) == shape.chunks
    assert all(stop - start == shape.chunk for start, stop in shape.spans[:-1])
    assert 1 <= shape.spans[-1][1] - shape.spans[-1][0] <= shape.chunk


def test_bytes():
    shape = StepShape(slots=1000, chunk=256, side=224, ahead=4)
    assert (shape.picture_bytes, shape.chunk_bytes, shape.step_bytes) == (150_528, 256 * 150_528, 150_528_000)
    assert shape.spans == [(0, 256), (256, 512), (512, 768), (768, 1000)]


def test_a_chunk_is_at_most_the_step():
    assert StepShape.fit(100, **FIT).chunk == 100
    assert StepShape.fit(1000, **FIT).chunk == 256


@pytest.mark.parametrize(
    ("ahead_steps", "ahead_bytes", "ahead"),
    [(1, 10**9, 4), (3, 10**9, 12), (3, 5 * 256 * 300, 5), (3, 5 * 256 * 300 - 1, 4), (1, 1, 0)],
)
def test_as_many_ahead_as_steps_and_bytes_allow(ahead_steps, ahead_bytes, ahead):
    """Four chunks a step, of 256 pictures of 300 bytes."""
    assert StepShape.fit(1000, **FIT | {"ahead_steps": ahead_steps, "ahead_bytes": ahead_bytes}).ahead == ahead


def test_spans_begin_where_they_are_told_to():
    assert [*spans(10, 25, 10)] == [(10, 20), (20, 25)]
    assert not [*spans(3, 3, 10)]
