"""Runs a function on several gloo ranks, each a process of its own."""

import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from forks import Child, start

# How long the other ranks may take to fail too once one has: their tracebacks often tell less, but never nothing.
_GRACE_SECONDS = 2.0


def run_ranks(fn: Callable, world: int, *args, timeout: float = 300.0) -> list[Any]:
    """The results of `fn(rank, world, *args)`, by rank, each from a process in a default gloo group of `world` ranks.

    `fn` is a function of a module; arguments and results are pickled. `timeout` is in seconds.

    RuntimeError when a rank fails or is still running when the time is up, with the tracebacks of those that failed,
    earliest first; the others are killed then.
    """
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        Path(folder, "work").write_bytes(pickle.dumps((fn, args)))
        code = "import spawn; spawn._rank_main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))"
        ranks = [stack.enter_context(start(code, folder, r, world, modules=(fn.__module__,))) for r in range(world)]
        _wait(ranks, timeout)
        exitcodes = [rank.status for rank in ranks]
        for rank in ranks:
            if rank.status is None:
                rank.kill()
        _raise_failure(exitcodes, Path(folder), timeout)
        return [pickle.loads(Path(folder, f"result-{rank}").read_bytes()) for rank in range(world)]


def _rank_main(folder: str, rank: int, world: int) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    try:
        fn, args = pickle.loads(Path(folder, "work").read_bytes())
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timedelta(seconds=300)
        )
        Path(folder, f"result-{rank}").write_bytes(pickle.dumps(fn(rank, world, *args)))
        dist.barrier()  # nobody leaves while another may still need it
    except BaseException:
        Path(folder, f"error-{rank}").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        os._exit(1)
    os._exit(0)  # gloo's threads now and then abort an orderly exit ("terminate called without an active exception")


def _wait(ranks: list[Child], timeout: float) -> None:
    """Until all have ended, the time is up, or one has failed and the others have had their grace."""
    deadline = time.monotonic() + timeout
    while [rank for rank in ranks if not rank.ended()] and time.monotonic() < deadline:
        if any(rank.status for rank in ranks):
            deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
        time.sleep(0.02)


def _raise_failure(exitcodes: list[int | None], folder: Path, timeout: float) -> None:
    if not any(code != 0 for code in exitcodes):
        return
    errors = sorted(folder.glob("error-*"), key=lambda path: path.stat().st_mtime_ns)
    told = "\n".join(path.read_text() for path in errors)
    raise RuntimeError(f"exit codes by rank {exitcodes} (None: still running, limit {timeout:g} s)\n{told}")
