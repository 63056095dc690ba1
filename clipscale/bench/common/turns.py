"""Suppliers of batches, taking turns in one process: wall time and CPU time per batch, fairly.

    field, turns = take_turns([Supplier("a", take_a), Supplier("b", take_b)], rounds=5, seconds=6)
    [turn.wall_seconds / turn.items for turn in turns["a"]]

A round is one turn of each. Before a turn its supplier hands over what it had ready, untimed, and after it the next
begins only when the machine is idle again: nothing that one prepares is paid by another.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from clipscale.bench.common.processes import cpu_seconds, settle


@dataclass(frozen=True)
class Supplier:
    name: str
    take: Callable[[], int]
    """Waits for the next batch; how many items it has."""
    how: str = ""
    close: Callable[[], None] = lambda: None
    ahead: int = 1
    """Batches that may lie ready after a pause; 0 for one who begins a batch only when it is asked for."""
    stride: int = 1
    """Batches come in groups of so many, one a worker."""
    filling: int = 0
    """Batches until its buffers are full and its rate is steady."""


class Turn(NamedTuple):
    items: int
    wall_seconds: float
    cpu_seconds: float  # of this process and all below it
    own_cpu_seconds: float  # of this process alone


def take_turns(
    entrants: Iterable[Supplier], *, rounds: int, seconds: float, say: Callable[[str], None] = lambda line: None
) -> tuple[list[Supplier], dict[str, list[Turn]]]:
    """Every supplier, now closed, and its turns, one a round. `entrants` may make them one by one: each is started
    when those before it are idle."""
    field: list[Supplier] = []
    try:
        for one in entrants:
            field.append(one)
            for _ in range(one.filling):
                one.take()
            settle()
        turns: dict[str, list[Turn]] = {one.name: [] for one in field}
        for number in range(rounds):
            for one in field:
                turns[one.name].append(_turn(one, seconds))
                settle()
            rates = ", ".join(f"{name} {done[-1].items / done[-1].wall_seconds:.0f}" for name, done in turns.items())
            say(f"round {number + 1} of {rounds}, a second: {rates}")
    finally:
        for one in field:
            one.close()
    return field, turns


def _turn(one: Supplier, seconds: float) -> Turn:
    if one.ahead:
        for _ in range((-(-one.ahead // one.stride) + 1) * one.stride):
            one.take()
    wall, own, cpu = time.perf_counter(), time.process_time(), cpu_seconds()
    items = batches = 0
    while batches == 0 or batches % one.stride or time.perf_counter() < wall + seconds:
        items += one.take()
        batches += 1
    wall_seconds, own_seconds = time.perf_counter() - wall, time.process_time() - own
    return Turn(items, wall_seconds, cpu_seconds() - cpu, own_seconds)  # last, for it walks through /proc
