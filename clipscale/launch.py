"""Which rank of how many this process is, as torchrun, Slurm's srun or nobody told it. No torch import.

rank, size, local_rank = launched()  # (0, 1, 0) for a process alone
"""

from __future__ import annotations

import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

from clipscale.errors import RESTART, SharedError, UserError

_LOOK_SECONDS = 0.5


class Place(NamedTuple):
    rank: int
    size: int
    local_rank: int  # among the ranks of this node


def launched() -> Place:
    """Of this process, before any group of ranks is formed.

    Under srun the place where the ranks meet is put into MASTER_ADDR and MASTER_PORT, unless they are set.
    """
    env = os.environ
    if "RANK" in env:
        return Place(int(env["RANK"]), int(env.get("WORLD_SIZE", 1)), int(env.get("LOCAL_RANK", 0)))
    if "SLURM_PROCID" in env and int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        if "MASTER_ADDR" not in env:
            env["MASTER_ADDR"] = first_host(env["SLURM_STEP_NODELIST"])
        env.setdefault("MASTER_PORT", str(_port(env)))
        return Place(int(env["SLURM_PROCID"]), int(env["SLURM_STEP_NUM_TASKS"]), int(env.get("SLURM_LOCALID", 0)))
    return Place(0, 1, 0)


def first_host(nodes: str) -> str:
    """The first of Slurm's list of nodes ("gpu[07-09]-ib,x2" -> "gpu07-ib"): task 0 runs there.

    Raises:
        UserError: no address is known by that name, and the ranks would wait for it in vain.
    """
    name = re.sub(r"\[(\d+)[^\]]*\]", r"\1", nodes).split(",")[0]
    try:
        socket.getaddrinfo(name, None)
    except OSError as error:
        fix = "export MASTER_ADDR, the address of the job's first node (slurm/site.sh)"
        raise UserError(f"Slurm's node {name} has no address on {socket.gethostname()}: {fix}") from error
    return name


def _port(env: Mapping[str, str]) -> int:
    """Another one for each step and each restart: a rank of before may still hold the last one."""
    numbers = (int(env.get(name) or 0) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"))
    job, step, restart = numbers
    return 20000 + (job + 101 * step + 1009 * restart) % 10000


def under_launcher() -> bool:
    """Whether torchrun or srun started this process: they take any exit status but 0 for a failure, and end the other
    ranks."""
    return "RANK" in os.environ or "SLURM_STEP_ID" in os.environ


def launched_by() -> tuple[str, int]:
    """The scheduler's name for this job ("" where there is none), and how often it has been started again.

    A task of an array goes by the array's name: its own number may be another's.
    """
    env = os.environ
    job = env.get("SLURM_JOB_ID", "")
    if "SLURM_ARRAY_JOB_ID" in env:
        job = f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    return job, int(env.get("SLURM_RESTART_COUNT") or env.get("TORCHELASTIC_RESTART_COUNT") or 0)


def end_with_parent() -> None:
    """Under torchrun: end when it is gone. Killed, it cannot end its ranks, and they would train on."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=_wait_for_parent, args=(os.getppid(),), name="parent", daemon=True).start()


def _wait_for_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_LOOK_SECONDS)
    print("clipscale: torchrun is gone: this rank ends", file=sys.stderr, flush=True)
    os._exit(RESTART)


@contextmanager
def told_once() -> Iterator[None]:
    """The ranks of a node read the same words and files: its first one tells what is wrong with them."""
    try:
        yield
    except UserError as error:
        if launched().local_rank:
            raise SharedError(str(error)) from error
        raise


def check_ranks(global_batch: int, size: int) -> None:
    """Raise SharedError unless every rank gets the same number of pairs."""
    if global_batch % size:
        raise SharedError(
            f"train.global_batch={global_batch} is not divisible by the {size} ranks; choose a multiple of {size}"
        )
