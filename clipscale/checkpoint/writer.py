"""Checkpoints written while training goes on: a step waits for a copy in host memory, a thread does the rest.

    writer = CheckpointWriter(publish)               # publish(snapshot) writes, syncs, hashes and renames
    tell(writer.prepare(state_bytes(model, optimizer), device))
    writer.save(snapshot)                            # as long as the copy takes; then the thread publishes it
    writer.wait()                                    # until it is published: at the end, and before leaving
    writer.close()

One is in flight at a time, and a checkpoint is found by nobody before it is durable (save.py). What fails in the thread
is raised by the next `save` or `wait`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from clipscale.checkpoint.snapshot import Snapshot
from clipscale.checkpoint.staging import Staging
from clipscale.data.load.replay_plan import host_memory
from clipscale.errors import reason, require
from clipscale.telemetry.faults import report_fault
from clipscale.tell import tell
from clipscale.words import counted, short

_LONG_WAIT_SECONDS = 1.0  # worth a line


class CheckpointWriter:
    """The main rank's; before `prepare`, what it saves is published at once.

    Args:
        publish: makes a checkpoint of a snapshot, durably; raises where it cannot.
    """

    def __init__(self, publish: Callable[[Snapshot], Any]) -> None:
        self._publish = publish
        self._staging: Staging | None = None
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None
        self._waits, self._waited_seconds = 0, 0.0

    def prepare(self, nbytes: int, device: torch.device) -> str:
        """Allocate the staging memory, so that checkpoints are written in the background; what to tell of it.

        Args:
            nbytes: of a state (staging.py).
            device: where it is.

        Raises:
            UserError: this node has not so much memory left.
        """
        left = host_memory().left
        require(
            nbytes <= left,
            f"checkpoint.background=true needs {short(nbytes)}B of host memory for a copy of the state, and "
            f"{short(left)}B are left; free memory, or set checkpoint.background=false (steps then wait for the disk)",
        )
        self._staging = Staging(nbytes, device)
        return f"checkpoints are written in the background, from a copy in {short(nbytes)}B of host memory"

    def save(self, snapshot: Snapshot) -> None:
        """Stage a snapshot and have it published. Waits for the one before, if that is still being written.

        Raises:
            Exception: why the one before could not be published; this one is under way all the same.
        """
        if self._staging is None:
            self._publish(snapshot)
            return
        self._count_wait(snapshot.step, self.join())
        failure, self._failure = self._failure, None
        staged = self._staging.take(snapshot)
        self._thread = threading.Thread(target=self._work, args=(staged,), name="checkpoint")
        self._thread.start()
        if failure is not None:
            raise failure

    def join(self) -> float:
        """Until nothing is being written; seconds that it took. A failure stays for the next `save` or `wait`."""
        begin = time.perf_counter()
        if self._thread is None or not self._thread.is_alive():
            return 0.0
        self._thread.join()
        return time.perf_counter() - begin

    def wait(self) -> None:
        """Until everything that was saved is published. Raises why it could not be."""
        self.join()
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def close(self) -> None:
        """As `wait`, for a run that is ending anyhow: a failure is reported."""
        try:
            self.wait()
        except Exception as error:
            report_fault("checkpoint", reason(error), action="the run is ending; older checkpoints stay")

    def _work(self, snapshot: Snapshot) -> None:
        try:
            self._publish(snapshot)
        except Exception as error:  # whatever it is: it is the main thread's to raise
            self._failure = error

    def _count_wait(self, step: int, seconds: float) -> None:
        if not seconds:
            return
        self._waits += 1
        self._waited_seconds += seconds
        if seconds >= _LONG_WAIT_SECONDS:
            tell(
                f"step {step}: waited {seconds:.1f} s for the checkpoint before this one to be written "
                f"({counted(self._waits, 'wait')} of {self._waited_seconds:.1f} s in all); raise checkpoint.every_steps"
            )
