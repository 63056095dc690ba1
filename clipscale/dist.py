"""The ranks of a run: started by torchrun, by Slurm's srun, or one process alone.

with start_world("auto") as world:
    world.rank, world.size, world.device
    total = world.sum([local_count, local_loss])       # float64, the same on every rank
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from clipscale.errors import RestartError, SharedError, reason, require
from clipscale.launch import launched
from clipscale.words import counted

TIMEOUT_SECONDS = 1800.0
"""Without an answer from another rank, after which this one gives up."""
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    local_rank: int  # among the ranks of this node
    device: torch.device
    control: dist.ProcessGroup | None = None  # for objects, over gloo; None: the default group
    patient: dist.ProcessGroup | None = None  # the same, for what may take hours; None: the default group

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Elementwise sum over the ranks, in float64; collective."""
        if self.size == 1:
            return [float(value) for value in values]
        return self.total(torch.tensor(values, dtype=torch.float64, device=self.device)).tolist()

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """The same of a tensor of any shape on this rank's device, in its own type and in place; collective."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, item: Any, *, patient: bool = False) -> list[Any]:
        """Every rank's item, on every rank; collective. For small things that are rare.

        Args:
            patient: the others may be at work for hours.
        """
        if self.size == 1:
            return [item]
        items = [None] * self.size
        dist.all_gather_object(items, item, group=self.patient if patient else self.control)
        return items

    def collect(self, values_N: torch.Tensor) -> torch.Tensor | None:
        """Every rank's values on rank 0, one rank's after another's; None on the others. Collective.

        Args:
            values_N: [N] on the CPU, of one type; ranks may hold different numbers of them.
        """
        if self.size == 1:
            return values_N
        lengths = self.gather(len(values_N))
        padded = values_N.new_zeros(max(lengths))
        padded[: len(values_N)] = values_N
        parts = [torch.empty_like(padded) for _ in lengths] if self.is_main else None
        dist.gather(padded, parts, dst=0, group=self.control)
        return torch.cat([part[:n] for part, n in zip(parts, lengths, strict=True)]) if self.is_main else None

    def broadcast(self, item: Any) -> Any:
        """Rank 0's item on every rank; collective."""
        if self.size == 1:
            return item
        box = [item]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def lead(self, work: Callable[[], Any], *, on_each_node: bool = False, patient: bool = False) -> Any:
        """Rank 0 does the work and every rank gets its result; collective.

        Args:
            on_each_node: the first rank of every node does it (local files); the result is still rank 0's.
            patient: it may take hours.

        Raises:
            SharedError: on every rank, with the text of the first error that the work raised.
        """
        mine = self.is_main or (on_each_node and self.local_rank == 0)
        return self.broadcast(self.each(work if mine else lambda: None, patient=patient))

    def each(self, work: Callable[[], _Result], *, patient: bool = False) -> _Result:
        """Every rank does its work and gets its own result; collective. The work itself must not be.

        Raises:
            SharedError: on every rank, with the text of the first error that the work raised on any.
        """
        result, problem, cause = None, "", None
        try:
            result = work()
        except Exception as error:  # the others are waiting: whatever it is, they must hear of it
            problem, cause = reason(error), error
        problems = [line for line in self.gather(problem, patient=patient) if line]
        if problems:
            raise SharedError(problems[0]) from cause
        return result


def nccl_options(timeout: timedelta) -> dist.ProcessGroupNCCL.Options:
    """Transfers have a stream of high priority: they are to run beside the loss's tiles and the towers' chunks, and
    without it each waits for a gap between these kernels."""
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options._timeout = timeout  # as init_process_group is told, or it warns
    return options


def _store(rank: int, size: int, timeout: timedelta) -> dist.Store:
    """Where the ranks meet, by MASTER_ADDR and MASTER_PORT. torchrun keeps one store for all its attempts, and the
    addresses that an earlier one left there are of ranks that are gone: each attempt has names of its own."""
    store, _, _ = next(iter(dist.rendezvous("env://", rank, size, timeout=timeout)))
    return dist.PrefixStore(f"attempt{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def lost_peer(error: BaseException) -> bool:
    """Whether an error says that another rank is gone or does not answer, rather than that something is wrong here."""
    words = ("gloo", "closed by peer", "reset by peer", "Broken pipe", "Timed out waiting")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError)
        and not isinstance(error, RestartError)
        and any(word in str(error) for word in words)
    )


def peer_words(error: BaseException) -> str:
    """What such an error says, in one sentence: gloo puts a line of its source before it, and advice behind."""
    line = str(error).splitlines()[0]
    return (line.rpartition("cc:")[2].partition("] ")[2] or line).partition(". ")[0].removesuffix(".")


@contextmanager
def _lost_peers(what: str) -> Iterator[None]:
    """RestartError with `what`, one line, for what torch raises meanwhile where another rank is lost."""
    try:
        yield
    except Exception as error:
        if not lost_peer(error):
            raise
        raise RestartError(f"{what} ({peer_words(error)}); start the run again") from error


@contextmanager
def start_world(device: str = "auto", timeout_seconds: float = TIMEOUT_SECONDS) -> Iterator[World]:
    """Join the other ranks (gloo on CPU, nccl on GPUs); leave them in order at the end.

    Args:
        device: "auto" (a GPU where there is one), "cpu" or "cuda".
        timeout_seconds: how long another rank may be waited for, other than where it is said to be at work.

    Raises:
        UserError: "cuda" without a GPU, or fewer GPUs than ranks on this node.
        RestartError: another rank did not come, or was lost.
    """
    rank, size, local_rank = launched()
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    require(device != "cuda" or gpus > 0, "device=cuda, but torch finds no GPU here; use device=auto or cpu")
    on_gpu = gpus > 0 and device != "cpu"
    gpu = 0 if gpus == 1 and "RANK" not in os.environ else local_rank  # srun may show each task its own GPU only
    if on_gpu:
        require(
            gpu < gpus,
            f"local rank {local_rank} has no GPU of its own on {socket.gethostname()}; start "
            f"{counted(gpus, 'rank')} a node",
        )
        torch.cuda.set_device(gpu)
    where = torch.device("cuda", gpu) if on_gpu else torch.device("cpu")
    if size == 1:
        yield World(rank, size, local_rank, where)
        return
    timeout = timedelta(seconds=timeout_seconds)
    meeting = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    with _lost_peers(f"rank {rank} did not meet the other ranks of {size} at {meeting}"):
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=_store(rank, size, timeout),
            rank=rank,
            world_size=size,
            timeout=timeout,
            device_id=where if on_gpu else None,
            pg_options=nccl_options(timeout) if on_gpu else None,
        )
        control = dist.new_group(backend="gloo", timeout=timeout)
        patient = dist.new_group(backend="gloo", timeout=timedelta(days=7))  # indexing on rank 0 may take hours
    try:
        with _lost_peers(f"rank {rank} lost another rank"):
            yield World(rank, size, local_rank, where, control, patient)
            dist.barrier()  # leaving while another rank still talks to this one aborts that rank
    except SharedError:
        dist.destroy_process_group()
        raise
    # Any other error is this rank's alone: destroying nccl's group would wait for ranks that wait for this one, so the
    # end of the process tells them.
    dist.destroy_process_group()
