"""The ring of the loss and the gradients' sum over W ranks: bytes, seconds, and from which batch on the wire is hidden.

    hops(job)                     # (Hop(bytes=..., seconds=..., flop=...) of pass 1, of pass 2)
    hidden_from(job, loss_rate)   # 109,000 pairs

In each pass a block of N texts goes W - 1 times on to the next rank while the tiles of the block here are computed
(loss/ring.py). The ring goes node by node, so that in a node with others each hop waits for the one that crosses the
network. The wire is hidden where a hop's tiles take longer than its bytes: above so many pairs a rank.
"""

from __future__ import annotations

from typing import NamedTuple

from clipscale.forecast.job import Job
from clipscale.forecast.memory import OPERAND

WIRE = 0.80
"""Of the datasheet's bandwidth between GPUs."""
_STATISTICS = 12  # bytes a text: largest logit, sum and diagonal


class Hop(NamedTuple):
    bytes: int
    """That a rank sends."""
    seconds: float
    flop: float
    """Of the tiles that are computed meanwhile."""


def hops(job: Job) -> tuple[Hop, Hop]:
    """One of each pass."""
    slots, width = job.slots, job.width
    block = slots * width * OPERAND[job.loss_precision]
    gradient = slots * width * (8 if job.loss_precision == "fp64" else 4)
    product = 2.0 * slots * slots * width
    sizes = block + _STATISTICS * slots, block + _STATISTICS * slots + gradient
    return tuple(
        Hop(size, size / wire_rate(job), products * product) for size, products in zip(sizes, (1, 3), strict=True)
    )


def wire_rate(job: Job) -> float:
    """Bytes a second that reach the next rank of the ring, the slowest of them."""
    device = job.device
    return WIRE * (device.link if job.ranks <= device.per_node else device.network)


def exposed_seconds(job: Job, loss_rate: float) -> float:
    """Of a step, what the ring's transfers take beyond its tiles."""
    return (job.ranks - 1) * sum(max(0.0, hop.seconds - hop.flop / loss_rate) for hop in hops(job))


def hidden_from(job: Job, loss_rate: float) -> int:
    """The global batch from which on no transfer is exposed."""
    if job.ranks == 1:
        return 0
    needed = (hop.bytes / job.slots / wire_rate(job) * loss_rate * job.slots**2 / hop.flop for hop in hops(job))
    return int(max(needed)) * job.ranks


def sum_seconds(job: Job) -> float:
    """Of the gradients' sum once a step, in float32: 2 (W - 1) / W of their bytes, by all adapters of a node."""
    if job.ranks == 1:
        return 0.0
    device = job.device
    between = device.network * device.per_node
    rate = device.link if job.ranks <= device.per_node else min(device.link, between)
    return 2 * (job.ranks - 1) / job.ranks * 4 * sum(job.learned) / (rate * WIRE)
