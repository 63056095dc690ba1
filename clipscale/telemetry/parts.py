"""Where a step's time goes, part by part, so that nothing is counted twice and nothing is left out.

    parts = Parts(device)
    with parts.part("image forward"):
        for start, images in parts.walk("copies", chunks):   # getting the next chunk is a part of its own,
            tower(images)                                    # and so is whatever opens a part inside
    parts.take()              # {'copies': 0.2, 'image forward': 1.4, 'other': 0.1}: seconds since the last take

At any moment one part runs: the innermost that is open, or "other" where none is. So the seconds of `take` add up to
all the time since the one before.

On a CPU the time is that of the clock. On a GPU it is that of the current stream, cut by events where parts begin and
end: a part lasts from the end of the work before it to the end of its own work, whenever the host asked for that.
Where the host waits (for data, for a file), the stream goes on with what it has, and the wait counts only for as long
as the stream then stands idle; a tower whose kernels take longer to launch than to run is counted as long as it takes.

A part costs a CPU about one microsecond.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
OTHER = "other"
PARTS = (  # in the order of a step
    *("data wait", "copies", "image forward", "text forward", "loss", "image backward", "text backward"),
    *("communication", "optimizer", "evaluation", "checkpoint", OTHER),
)
_PREFIX = "seconds/"  # of a column of a run's metrics
_HELD_EVENTS = 256  # from here on those that the GPU has passed are read in between


class Clock(Protocol):
    def turn_to(self, name: str) -> None:
        """What ran so far has ended, `name` begins."""

    def read(self) -> dict[str, float]:
        """Seconds by name since the last read; what runs goes on."""


class HostClock:
    """The time of the thread that asks."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._name, self._since = OTHER, time.perf_counter()

    def turn_to(self, name: str) -> None:
        now = time.perf_counter()
        self._seconds[self._name] += now - self._since
        self._name, self._since = name, now

    def read(self) -> dict[str, float]:
        self.turn_to(self._name)
        seconds, self._seconds = self._seconds, defaultdict(float)
        return seconds


class StreamClock:
    """The time of a GPU's current stream. `read` waits for the stream once: call it where the step has waited already.

    Args:
        new_event: makes a `torch.cuda.Event` with timing, or what acts like one.
    """

    def __init__(self, new_event: Callable[[], Any]) -> None:
        self._new_event, self._spare = new_event, []
        self._seconds: dict[str, float] = defaultdict(float)
        self._turns: deque[tuple[Any, str]] = deque()  # from this event of the stream on, that part
        self.turn_to(OTHER)

    def turn_to(self, name: str) -> None:
        event = self._spare.pop() if self._spare else self._new_event()
        event.record()
        self._turns.append((event, name))
        while len(self._turns) > _HELD_EVENTS and self._turns[1][0].query():
            self._count_first()

    def read(self) -> dict[str, float]:
        self.turn_to(self._turns[-1][1])
        self._turns[-1][0].synchronize()
        while len(self._turns) > 1:
            self._count_first()
        seconds, self._seconds = self._seconds, defaultdict(float)
        return seconds

    def _count_first(self) -> None:
        event, name = self._turns.popleft()
        self._seconds[name] += event.elapsed_time(self._turns[0][0]) / 1000
        self._spare.append(event)


class Parts:
    """The time by part of one thread's steps on `device`."""

    def __init__(self, device: torch.device) -> None:
        self._clock = _clock_of(device)
        self._open: list[str] = [OTHER]
        self.turns = 0
        """How many parts have begun: a sign of life."""
        self._parts = {name: _Part(self, name) for name in PARTS}

    def part(self, name: str) -> AbstractContextManager[None]:
        """Meanwhile `name`, one of PARTS, runs, where no other part is opened inside."""
        return self._parts[name]

    def walk(self, name: str, items: Iterable[T]) -> Iterator[T]:
        """The same items; getting each is counted under `name`, and what is done with it is not."""
        items = iter(items)
        while True:
            with self.part(name):
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item

    def take(self) -> dict[str, float]:
        """Seconds of each part that ran since the last `take`, in the order of PARTS; they start again from zero."""
        seconds = self._clock.read()
        return {name: seconds[name] for name in PARTS if name in seconds}

    @property
    def running(self) -> str:
        """The part that runs; for any thread."""
        return self._open[-1]

    def enter(self, name: str) -> None:
        self._open.append(name)
        self.turns += 1
        self._clock.turn_to(name)

    def leave(self) -> None:
        self._open.pop()
        self._clock.turn_to(self._open[-1])


class Untimed(Parts):
    """For those who do not ask: nothing is counted, and nothing costs anything."""

    def __init__(self) -> None:
        self._nothing = nullcontext()

    def part(self, name: str) -> AbstractContextManager[None]:
        return self._nothing

    def walk(self, name: str, items: Iterable[T]) -> Iterator[T]:
        return iter(items)

    def take(self) -> dict[str, float]:
        return {}


UNTIMED = Untimed()


def to_columns(seconds: dict[str, float]) -> dict[str, float]:
    """{'image forward': 1.4} -> {'seconds/image_forward': 1.4}: columns of a row of metrics, to the microsecond."""
    return {_PREFIX + name.replace(" ", "_"): round(value, 6) for name, value in seconds.items()}


def from_row(row: dict[str, Any]) -> dict[str, float]:
    """The seconds by part that are in a row of metrics, in the order of PARTS; none in a row from before there were."""
    return {name: row[key] for name, key in _COLUMNS.items() if key in row}


_COLUMNS = {name: key for name in PARTS for key in to_columns({name: 0.0})}


class _Part:
    """`with` it, the part runs; there is one for each name, made once, since making one costs more than entering it."""

    def __init__(self, parts: Parts, name: str) -> None:
        self._parts, self._name = parts, name

    def __enter__(self) -> None:
        self._parts.enter(self._name)

    def __exit__(self, *error: object) -> None:
        self._parts.leave()


def _clock_of(device: torch.device) -> Clock:
    if device.type != "cuda":
        return HostClock()
    import torch

    return StreamClock(partial(torch.cuda.Event, enable_timing=True))
