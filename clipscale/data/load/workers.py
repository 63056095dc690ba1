"""Where jobs are done: in threads of this process, or in a process of its own. Both do the same, to the bit.

    workers = LoaderProcess(pipeline, share, blocks, threads=8)      # or InlineWorkers(...), to set breakpoints in
    workers.submit(job)
    workers.wait(job.number).skips
    workers.close()

Decode threads in the training process would fight it for the GIL. The loader's process ignores the signals that a
scheduler sends to a whole job, ends when the training process ends, however that comes, and is missed at once if it
ends first.
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import struct
import subprocess
import sys
from concurrent.futures import Future
from multiprocessing import Pipe
from typing import Any, NamedTuple

from clipscale.data.load.blocks import Blocks
from clipscale.data.load.fill import Done, Filler, Job
from clipscale.data.pipeline import Pipeline, Share
from clipscale.errors import UserError
from clipscale.tell import tell

SHIELDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
_CHECK_SECONDS = 1.0
_SILENCE_SECONDS = 120  # the loader's process sends a sign of life every few seconds
_START = "import sys; sys.path[:] = sys.argv[3:]; from clipscale.data.load.worker_main import main; main()"


class Told(NamedTuple):
    """What the loader's process has to tell (clipscale/tell.py)."""

    line: str
    every_rank: bool


class LoaderError(UserError):
    """The loader cannot go on; says what became of it."""


class InlineWorkers:
    """Threads of this process."""

    def __init__(self, pipeline: Pipeline, share: Share, blocks: Blocks, threads: int) -> None:
        self._filler = Filler(pipeline, share, blocks, threads)
        self._jobs: dict[int, Future[Done]] = {}

    def submit(self, job: Job) -> None:
        self._jobs[job.number] = self._filler.submit(job)

    def wait(self, number: int) -> Done:
        return self._jobs.pop(number).result()

    def close(self) -> None:
        self._filler.close()


class LoaderProcess:
    """Threads of a process of its own."""

    def __init__(self, pipeline: Pipeline, share: Share, blocks: Blocks, threads: int) -> None:
        self._wire, theirs = Pipe()
        self._done: dict[int, Done] = {}
        with socket.socket(fileno=os.dup(self._wire.fileno())) as wire:
            wire.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", _SILENCE_SECONDS, 0))
        # Not 0, 1 or 2, which this process may have been started without.
        inherited = [fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, 3) for file in (theirs.fileno(), blocks.file)]
        environment = os.environ | {
            "CUDA_VISIBLE_DEVICES": "",  # its torch works on the CPU and must not open a context on the GPU
            "OMP_NUM_THREADS": "1",
        }
        # Signals wait until the child has said that it ignores them: a mask is inherited, a handler is not.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SHIELDED)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _START, *map(str, inherited), *sys.path],
                pass_fds=inherited,
                env=environment,
                stdin=subprocess.DEVNULL,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()
            for file in inherited:
                os.close(file)
        self._send((pipeline, share, blocks.layout, threads))

    @property
    def pid(self) -> int:
        return self._process.pid

    def submit(self, job: Job) -> None:
        self._send(job)

    def wait(self, number: int) -> Done:
        """Blocks until the job is done.

        Raises:
            LoaderError: the process has ended, is silent, or failed at a job.
        """
        silent_seconds = 0.0  # by checks, not by the clock: all processes may have been suspended together
        while number not in self._done:
            try:
                message = self._wire.recv() if self._wire.poll(_CHECK_SECONDS) else None
            except (EOFError, OSError):
                raise LoaderError(self._ending()) from None
            silent_seconds = silent_seconds + _CHECK_SECONDS if message is None else 0.0
            if isinstance(message, Done):
                self._done[message.number] = message
            elif isinstance(message, Told):
                tell(message.line, every_rank=message.every_rank)
            elif message:
                raise LoaderError(f"the loader failed: {message.splitlines()[-1]}; {message}")
            elif silent_seconds > _SILENCE_SECONDS:
                raise LoaderError(self._silence())
        return self._done.pop(number)

    def close(self) -> None:
        self._wire.close()  # what the process ends by
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _send(self, message: Any) -> None:
        try:
            self._wire.send(message)
        except BlockingIOError:
            raise LoaderError(self._silence()) from None
        except OSError:
            pass  # it has ended: `wait` reads its last words, and says so

    def _silence(self) -> str:
        return f"the loader (process {self.pid}) has been silent for {_SILENCE_SECONDS} s"

    def _ending(self) -> str:
        """What became of the process, now that its end of the wire is closed."""
        try:
            code = self._process.wait(5)
        except subprocess.TimeoutExpired:
            return f"the loader (process {self.pid}) closed its connection"
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        hint = "; the system may have run out of memory" if code == -signal.SIGKILL else ""
        return f"the loader (process {self.pid}) {how}{hint}; the same command resumes from the newest checkpoint"
