"""One way to tell a person something, from any module, thread or process: `tell` says it, whoever listens passes it on.

    with listening(print):
        tell("a.tar is damaged, 12 samples are usable")           # every rank finds out the same: rank 0 tells
        tell("b.tar: 3 samples stay unused", every_rank=True)     # what only this rank may know
    say("2 shards, 400 usable pairs")                             # a command's result, on standard output

A run listens for run.log and the screen, the loader's process for the training process, the command line for the
screen. Where nobody listens, a line goes the way of Python's logging, as a record of the logger "clipscale". What is
told or said is one line, whatever the keys and paths in it hold: `escaped`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from clipscale.escape import escaped

_LOGGER = logging.getLogger("clipscale")
Listener = Callable[[str, bool], None]  # (line, every_rank)


def tell(line: str, *, every_rank: bool = False) -> None:
    """One line for whoever runs this. `every_rank`: not only rank 0 passes it on."""
    _LOGGER.warning("%s", escaped(line), extra={"every_rank": every_rank})


def say(line: str) -> None:
    """One line of a command's result."""
    print(escaped(line))


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """What is told meanwhile goes to `listener` alone; listeners inside one another take turns, the last one hears."""
    handler = _Handler(listener)
    before, propagates = _LOGGER.handlers[:], _LOGGER.propagate
    _LOGGER.handlers, _LOGGER.propagate = [handler], False
    try:
        yield
    finally:
        _LOGGER.handlers, _LOGGER.propagate = before, propagates


class _Handler(logging.Handler):
    def __init__(self, listener: Listener) -> None:
        super().__init__()
        self._listener = listener

    def emit(self, record: logging.LogRecord) -> None:
        self._listener(record.getMessage(), getattr(record, "every_rank", False))
