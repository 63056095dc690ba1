"""Work shared out to processes: results in the order of the items, memory bounded, nothing left running.

    for report in map_in_processes(check_shard, paths, 8, settings):     # check_shard(path, settings), in 8 processes
        ...

Processes come from a fork server: they hold none of the caller's threads, locks or GPU contexts, and signals to the
caller's process group do not reach them. Each has a pipe of its own: one that dies ends the work with a `UserError`;
one whose caller is gone, or wants no more, is interrupted as if by Ctrl-C, so that it clears up, and ends.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from types import ModuleType
from typing import Any, NamedTuple

from clipscale.errors import UserError

_QUEUED = 2  # items sent to each process: the one it works on, and the next
_AHEAD = 4  # items begun for each process, beyond the oldest that is not done
_CLEAR_UP_SECONDS = 5.0
_HELD_BACK = (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


def cores() -> int:
    """Those that this process may run on."""
    return len(os.sched_getaffinity(0))


class WorkerDied(UserError):
    """A process ended by itself. `item`: what it was at work on, None while it started; `how` it ended."""

    def __init__(self, process: multiprocessing.process.BaseProcess, item: Any) -> None:
        code = process.exitcode
        killed = code is not None and code < 0
        self.item = item
        self.how = f"was killed by {signal.Signals(-code).name}" if killed else f"ended with status {code}"
        fix = "most often for want of memory; use fewer processes" if killed else "its own message stands above"
        super().__init__(f"worker process {process.pid} {self.how}: {fix}")


class _Worker(NamedTuple):
    process: multiprocessing.process.BaseProcess
    connection: Connection
    sent: deque[tuple[int, Any]]  # the items it has not answered yet, and their numbers


def map_in_processes(function: Callable, items: Iterable, jobs: int, *arguments: Any) -> Iterator[Any]:
    """function(item, *arguments) for each item, in the order of `items`. One job: in this process, without any other.

    Args:
        function: at the top level of a module that can be imported (never the main one); what it raises is raised here.

    Raises:
        WorkerDied: a process was killed, or ended by itself.
    """
    if jobs == 1:
        yield from (function(item, *arguments) for item in items)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([function.__module__])
    workers: list[_Worker] = []
    try:
        for _ in range(jobs):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, function, arguments), daemon=True)
            with _without_main(), _signals_held_back():
                process.start()
            theirs.close()
            workers.append(_Worker(process, ours, deque()))
        for worker in workers:
            _receive(worker)  # it has left the caller's group: signals to that reach it no more
        yield from _in_order(workers, iter(items))
    finally:  # also where the caller wants no more
        _end(workers)


@contextmanager
def _without_main() -> Iterator[None]:
    """So that a new process does not import the program again: seconds of each, and no `if __name__` is forgotten."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """For the life of the fork server, if it begins here; the caller takes them in afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _HELD_BACK)
    try:
        resource_tracker.ensure_running()  # the fork server would start it, and it may end with SIGINT let through
        signal.pthread_sigmask(signal.SIG_BLOCK, _HELD_BACK)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _in_order(workers: list[_Worker], items: Iterator) -> Iterator[Any]:
    begun, given, done, more = 0, 0, {}, True
    while True:
        for depth in range(1, _QUEUED + 1):
            for worker in workers:
                if more and len(worker.sent) < depth and begun - given < _AHEAD * len(workers):
                    try:
                        item = next(items)
                    except StopIteration:
                        more = False
                        break
                    worker.sent.append((begun, item))
                    _send(worker, item)
                    begun += 1
        if given in done:
            yield done.pop(given)
            given += 1
            continue
        if begun == given:
            return
        ready = wait([worker.connection for worker in workers if worker.sent])
        for worker in workers:
            if worker.connection in ready:
                value, error = _receive(worker)
                if error is not None:
                    raise error
                done[worker.sent.popleft()[0]] = value


def _send(worker: _Worker, item: Any) -> None:
    try:
        worker.connection.send(item)
    except OSError as error:
        raise _died(worker) from error


def _receive(worker: _Worker) -> tuple[Any, Exception | None]:
    try:
        return worker.connection.recv()
    except (EOFError, OSError) as error:
        raise _died(worker) from error


def _died(worker: _Worker) -> WorkerDied:
    worker.process.join(5)
    return WorkerDied(worker.process, worker.sent[0][1] if worker.sent else None)


def _end(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.connection.close()
    give_up = time.monotonic() + _CLEAR_UP_SECONDS
    for worker in workers:
        worker.process.join(max(0.0, give_up - time.monotonic()))
        worker.process.kill()
        worker.process.join()


def _work(connection: Connection, function: Callable, arguments: tuple) -> None:
    """One process: answers every item with (value, None) or (None, exception), until the caller closes the pipe."""
    os.setsid()  # Ctrl-C and a scheduler's signals reach the caller's whole group; the caller decides
    items: queue.SimpleQueue = queue.SimpleQueue()
    try:
        connection.send((None, None))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        # Items are taken in by a thread, so that sending one never waits for a result that waits to be taken.
        threading.Thread(target=_take_in, args=(connection, items), daemon=True).start()
        while True:
            item = items.get()
            try:
                answer = function(item, *arguments), None
            except Exception as error:  # the caller raises it
                answer = None, error
            connection.send(answer)
    except (KeyboardInterrupt, ConnectionError):  # `_take_in` has seen the end, or not yet
        os._exit(0)


def _take_in(connection: Connection, items: queue.SimpleQueue) -> None:
    try:
        while True:
            items.put(connection.recv())
    except (EOFError, OSError):  # the caller has closed the pipe, or is gone
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        time.sleep(_CLEAR_UP_SECONDS)
        os._exit(0)
