"""The other end of `LoaderProcess`: takes jobs from the wire, does them in threads, says when they are done.

Ends when the wire does, that is with the training process, however that ends.
"""

from __future__ import annotations

import os
import queue
import resource
import signal
import sys
import threading
import time
import traceback
from concurrent.futures import Future
from multiprocessing.connection import Connection

from clipscale.data.load.blocks import Blocks
from clipscale.data.load.fill import Filler
from clipscale.data.load.workers import SHIELDED, Told
from clipscale.tell import listening

_SIGN_OF_LIFE_SECONDS = 5.0


class _Voice:
    """The wire, for several threads that speak. None of them is the one that listens: it would wait for the training
    process to read, which may wait for it to read."""

    def __init__(self, wire: Connection) -> None:
        self._wire, self._lock = wire, threading.Lock()
        self.results: queue.SimpleQueue[Future] = queue.SimpleQueue()
        for work in (self._live, self._tell_results):
            threading.Thread(target=work, daemon=True).start()

    def tell(self, message: object) -> None:
        try:
            with self._lock:
                self._wire.send(message)
        except OSError:  # nobody listens any more
            os._exit(0)

    def _tell_results(self) -> None:
        while True:
            future = self.results.get()
            try:
                self.tell(future.result())
            except BaseException:
                self.tell(traceback.format_exc())

    def _live(self) -> None:
        while True:
            self.tell("")
            time.sleep(_SIGN_OF_LIFE_SECONDS)


def main() -> None:
    """argv: the descriptors of the wire and of the shared memory."""
    for number in SHIELDED:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SHIELDED)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # each source keeps many shards open
    wire, memory = Connection(int(sys.argv[1])), int(sys.argv[2])
    voice = _Voice(wire)
    try:
        with listening(lambda line, every_rank: voice.tell(Told(line, every_rank))):
            _serve(wire, memory, voice)
    except EOFError:
        os._exit(0)  # threads may be in the middle of a picture
    except BaseException:
        voice.tell(traceback.format_exc())
        os._exit(1)


def _serve(wire: Connection, memory: int, voice: _Voice) -> None:
    """Raises EOFError at the end of the wire."""
    pipeline, share, layout, threads = wire.recv()
    filler = Filler(pipeline, share, Blocks(layout, memory), threads)
    while True:
        filler.submit(wire.recv()).add_done_callback(voice.results.put)
