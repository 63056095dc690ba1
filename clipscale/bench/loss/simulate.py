"""Ranks simulated by threads of one process on one device: the loss's ring without a second GPU.

    results = run_ranks(4, lambda link: contrastive_grads(image[link.rank], text[link.rank], scale, group=link))

The ranks take turns: a rank runs until it has to wait for another one. So nothing races, whatever of the process a rank
changes for a while (float32 precision, a compiler's cache), the work of all ranks lies on one stream, and a time is
that of all ranks together.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from clipscale.loss.link import Link

T = TypeVar("T")


class _Abandoned(Exception):
    """Raised in a rank that waits, because another one has failed."""


@dataclass
class _Parcel:
    tensors: Sequence[Tensor]
    taken: bool = False


@dataclass
class _Board:
    """What the ranks share. `turn` is held by the rank that runs; waiting gives it away."""

    size: int
    turn: threading.Condition = field(default_factory=threading.Condition)
    parcels: dict[tuple[int, int, int], _Parcel] = field(default_factory=dict)  # by (from, to, number)
    gathered: dict[int, dict[int, Tensor]] = field(default_factory=dict)  # by number, then rank
    ended: set[int] = field(default_factory=set)
    failure: BaseException | None = None

    def wait(self, rank: int, ready: Callable[[], Any], needed: Callable[[], set[int]]) -> None:
        """Until `ready()`. `needed()`: the ranks without which that cannot come."""

        def settled() -> bool:
            return bool(ready()) or self.failure is not None or bool(needed() & self.ended)

        self.turn.notify_all()
        self.turn.wait_for(settled)
        if ready():
            return
        if self.failure is not None:
            raise _Abandoned
        raise RuntimeError(f"simulated rank {rank} waits for ranks {sorted(needed() & self.ended)}, which have ended")


class ThreadLink(Link):
    """The wires of one simulated rank."""

    def __init__(self, board: _Board, rank: int) -> None:
        self.rank = rank
        self.size = board.size
        self._board = board
        self._gathers = 0
        self._sent = [0] * board.size
        self._received = [0] * board.size

    def gather(self, values_K: Tensor) -> Tensor:
        return torch.stack(self._everyones(values_K))

    def sum(self, values: Tensor) -> Tensor:
        first, *others = self._everyones(values)
        values.copy_(first)
        for other in others:
            values += other
        return values

    def exchange(
        self, outgoing: Sequence[Tensor], to: int, incoming: Sequence[Tensor], source: int
    ) -> Callable[[], None]:
        # As with real ranks, once `wait` has returned `outgoing` may be overwritten and `incoming` read.
        board, post = self._board, (self.rank, to, self._sent[to])
        receipt = (source, self.rank, self._received[source])
        self._sent[to] += 1
        self._received[source] += 1
        own = board.parcels[post] = _Parcel(outgoing)

        def wait() -> None:
            board.wait(self.rank, lambda: receipt in board.parcels, lambda: {source})
            parcel = board.parcels.pop(receipt)
            for target, sent in zip(incoming, parcel.tensors, strict=True):
                target.copy_(sent)
            parcel.taken = True
            board.wait(self.rank, lambda: own.taken, lambda: {to})

        return wait

    def _everyones(self, values: Tensor) -> list[Tensor]:
        """Copies of every rank's `values`, by rank."""
        board, number = self._board, self._gathers
        self._gathers += 1
        slots = board.gathered.setdefault(number, {})
        slots[self.rank] = values.clone()
        board.gathered.pop(number - 2, None)  # everyone has left that one: they are all at number - 1 or later
        board.wait(self.rank, lambda: len(slots) == self.size, lambda: set(range(self.size)) - set(slots))
        return [slots[rank] for rank in range(self.size)]


def run_ranks(
    ranks: int,
    work: Callable[[ThreadLink], T],
    *,
    device: torch.device | None = None,
    around: Callable[[], AbstractContextManager] = nullcontext,
) -> list[T]:
    """`work(link)` of every rank, each in a thread of its own and within `around()`; the results by rank.

    The first error of any rank ends the others, and is raised. RuntimeError when a rank waits for one that has ended.
    """
    board = _Board(ranks)
    results: list[Any] = [None] * ranks

    def run(link: ThreadLink) -> None:
        with board.turn:
            try:
                if device is not None and device.type == "cuda":
                    torch.cuda.set_device(device)
                if board.failure is None:
                    with around():
                        results[link.rank] = work(link)
            except _Abandoned:
                pass
            except BaseException as error:
                board.failure = board.failure or error
            finally:
                board.ended.add(link.rank)
                board.turn.notify_all()

    threads = [threading.Thread(target=run, args=(ThreadLink(board, rank),), daemon=True) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if board.failure is not None:
        raise board.failure
    return results
