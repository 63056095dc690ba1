"""Work shared out to processes: results in the order of the items, memory bounded, nothing left running.

    for report in map_in_processes(check_shard, paths, 8, settings):     # check_shard(path, settings), in 8 processes
        ...

Processes come from a fork server: they hold none of the caller's threads, locks or GPU contexts. Each has a pipe of its
own: one that dies ends the work with a `UserError`, and one whose caller is gone ends too.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from types import ModuleType
from typing import Any, NamedTuple

from clipscale.errors import UserError

_QUEUED = 2  # items sent to each process: the one it works on, and the next
_AHEAD = 4  # items begun for each process, beyond the oldest that is not done


class _Worker(NamedTuple):
    process: multiprocessing.process.BaseProcess
    connection: Connection
    sent: deque[int]  # numbers of the items it has not answered yet


def map_in_processes(function: Callable, items: Iterable, jobs: int, *arguments: Any) -> Iterator[Any]:
    """function(item, *arguments) for each item, in the order of `items`. One job: in this process, without any other.

    Args:
        function: at the top level of a module that can be imported (never the main one); what it raises is raised here.

    Raises:
        UserError: a process died.
    """
    if jobs == 1:
        yield from (function(item, *arguments) for item in items)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([function.__module__])
    workers = []
    try:
        for _ in range(jobs):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, function, arguments), daemon=True)
            with _without_main():
                process.start()
            theirs.close()
            workers.append(_Worker(process, ours, deque()))
        yield from _in_order(workers, iter(items))
    except BaseException:  # also GeneratorExit: the caller wants no more
        _end(workers, at_once=True)
        raise
    _end(workers, at_once=False)


@contextmanager
def _without_main() -> Iterator[None]:
    """So that a new process does not import the program again: seconds of each, and no `if __name__` is forgotten."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


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
                    _send(worker, item)
                    worker.sent.append(begun)
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
                done[worker.sent.popleft()] = value


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


def _died(worker: _Worker) -> UserError:
    worker.process.join(5)
    code = worker.process.exitcode
    fix = "most often for want of memory; use fewer processes" if code == -9 else "its own message stands above"
    return UserError(f"worker process {worker.process.pid} died with exit code {code}: {fix}")


def _end(workers: list[_Worker], at_once: bool) -> None:
    for worker in workers:
        if at_once:
            worker.process.kill()
        worker.connection.close()
    for worker in workers:
        worker.process.join()


def _work(connection: Connection, function: Callable, arguments: tuple) -> None:
    """One process: answers every item with (value, None) or (None, exception), until the caller closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the caller decides
    items: queue.SimpleQueue = queue.SimpleQueue()
    # Items are taken in by a thread, so that sending one never waits for a result that waits to be taken.
    threading.Thread(target=_take_in, args=(connection, items), daemon=True).start()
    while True:
        item = items.get()
        try:
            answer = function(item, *arguments), None
        except Exception as error:  # the caller raises it
            answer = None, error
        connection.send(answer)


def _take_in(connection: Connection, items: queue.SimpleQueue) -> None:
    while True:
        try:
            items.put(connection.recv())
        except (EOFError, OSError):  # the caller has closed the pipe, or is gone
            os._exit(0)
