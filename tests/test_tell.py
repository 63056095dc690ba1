"""clipscale/tell.py: what is told reaches who listens, from any thread, and from the loader's process."""

from __future__ import annotations

import logging
import threading

import pytest

from clipscale.tell import listening, tell


def test_the_innermost_listener_hears_and_gives_way_afterwards():
    outer, inner = [], []

    def fail() -> None:
        with listening(lambda *heard: inner.append(heard)):
            tell("b 100%", every_rank=True)
            raise KeyError

    with listening(lambda *heard: outer.append(heard)):
        tell("a")
        with pytest.raises(KeyError):
            fail()
        tell("c")
    assert outer == [("a", False), ("c", False)]
    assert inner == [("b 100%", True)]


def test_threads_are_heard(told):
    thread = threading.Thread(target=tell, args=("from a thread",))
    thread.start()
    thread.join()
    assert told == ["from a thread"]


def test_where_nobody_listens_it_is_a_record_of_the_logger(caplog):
    tell("a {} % line")
    assert caplog.record_tuples == [("clipscale", logging.WARNING, "a {} % line")]
