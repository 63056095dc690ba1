"""Floating-point operations of the towers, as they are run: every forward and every backward, recomputed ones too.

    tower_flops(step)                  # of one call

They are counted by torch.utils.flop_counter, operation by operation. The loss is no tower, so that a contestant marks
what it costs:

    with not_towers(times=3):          # forward here, and twice as much backward later
        loss = loss_fn(image_ND, text_ND)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count


def _attention(query_shape, key_shape, value_shape, *_, out_shape=None, **__) -> int:
    return sdpa_flop_count(query_shape, key_shape, value_shape)


def _attention_backward(grad_shape, query_shape, key_shape, value_shape, *_, out_shape=None, **__) -> int:
    return sdpa_backward_flop_count(grad_shape, query_shape, key_shape, value_shape)


def _addmm(total_shape, left_shape, right_shape, *_, out_shape=None, **__) -> int:
    return 2 * left_shape[0] * left_shape[1] * right_shape[1]


_OWN_COUNTS = {  # what torch does not count: attention on a CPU, and half products added to a float32 matrix
    torch.ops.aten.addmm: _addmm,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


class _Count:
    def __init__(self) -> None:
        self.counter = FlopCounterMode(display=False, custom_mapping=_OWN_COUNTS)
        self.of_others = 0


_open: list[_Count] = []


def tower_flops(call: Callable[[], Any]) -> int:
    """Of one call, without what it marks as no tower's. A multiplication and an addition are two."""
    count = _Count()
    _open.append(count)
    try:
        with count.counter:
            call()
    finally:
        _open.pop()
    return count.counter.get_total_flops() - count.of_others


@contextmanager
def not_towers(times: int = 1) -> Iterator[None]:
    """What is done within is the loss's, `times` over: its backward, which comes later, does twice the forward's."""
    before = _open[-1].counter.get_total_flops() if _open else 0
    yield
    if _open:
        _open[-1].of_others += times * (_open[-1].counter.get_total_flops() - before)
