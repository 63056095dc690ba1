"""The wires between the ranks of one evaluation of the loss: what `ring.py` needs of them, and no more.

link = open_link(group)                                     # of torch.distributed, or a `Link` of one's own
wait = link.exchange([block], to, [incoming], source)       # in flight while tiles are computed
wait()
"""

import hashlib
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Link(ABC):
    """This process's end of the wires. Every method is collective, and a rank's calls come in the same order on all."""

    rank: int
    size: int

    @abstractmethod
    def gather(self, values_K: Tensor) -> Tensor:
        """Every rank's int64 values, [size, K], on every rank."""

    @abstractmethod
    def sum(self, values: Tensor) -> Tensor:
        """`values` summed over the ranks, in place: the same bits on every rank."""

    @abstractmethod
    def exchange(
        self, outgoing: Sequence[Tensor], to: int, incoming: Sequence[Tensor], source: int
    ) -> Callable[[], None]:
        """Start to send `outgoing` to rank `to`, and to receive what `source` sends to this rank into `incoming`.

        All are contiguous; either list may be empty. The function that is returned waits for both.
        """


class Alone(Link):
    """This process's pairs only."""

    rank, size = 0, 1

    def gather(self, values_K: Tensor) -> Tensor:
        return values_K[None]

    def sum(self, values: Tensor) -> Tensor:
        return values

    def exchange(self, outgoing, to, incoming, source):
        raise AssertionError("a process alone has nobody to send to")


class GroupLink(Link):
    """The ranks of a process group."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def gather(self, values_K: Tensor) -> Tensor:
        everyone = values_K.new_empty(self.size, len(values_K))
        dist.all_gather([*everyone], values_K, group=self.group)
        return everyone

    def sum(self, values: Tensor) -> Tensor:
        dist.all_reduce(values, group=self.group)
        return values

    def exchange(self, outgoing, to, incoming, source):
        ops = [self._op(dist.isend, block, to) for block in outgoing]
        ops += [self._op(dist.irecv, block, source) for block in incoming]
        works = dist.batch_isend_irecv(ops) if ops else []

        def wait() -> None:
            for work in works:
                work.wait()

        return wait

    def _op(self, kind: Callable, block: Tensor, peer: int) -> dist.P2POp:
        return dist.P2POp(kind, block, dist.get_global_rank(self.group, peer), self.group)


Group = dist.ProcessGroup | Link | str | None
"""What the public functions take: None is the default process group (this process alone where there is none), "self"
this process alone even where there is one."""


def open_link(group: Group) -> Link:
    """ValueError on a process that is not in the group, and for a word other than "self"."""
    if isinstance(group, Link):
        return group
    if isinstance(group, str) and group != "self":
        raise ValueError(f"group {group!r} is unknown: pass a process group, 'self' for this process alone, or None")
    if group == "self" or (group is None and not dist.is_initialized()):
        return Alone()
    group = group or dist.group.WORLD
    if dist.get_rank(group) < 0:
        raise ValueError("this process is not in the group it was given: call the loss on the group's ranks only")
    return GroupLink(group)


@cache
def node_identity() -> int:
    """An int64 that the processes of one machine, containers included, have in common and those of two have not."""
    try:
        name = _BOOT_ID.read_text()
    except OSError:
        name = socket.gethostname()
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little", signed=True)


def ring_order(nodes: list[int]) -> list[int]:
    """The ranks node by node, so that a hop of the ring leaves and enters each node once.

    `nodes` are the identities by rank. Nodes come in the order of their first ranks, ranks ascending inside.
    """
    first = {node: rank for rank, node in reversed(list(enumerate(nodes)))}
    return sorted(range(len(nodes)), key=lambda rank: first[nodes[rank]])
