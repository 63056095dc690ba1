"""When a checkpoint is due by the clock, and that a run's first one comes early.

    clock = SaveClock(config.checkpoint, first=True)
    if clock.wants(): ...; clock.saved()         # after each step

By the clock of one rank: the others must be told.
"""

from __future__ import annotations

import time

from clipscale.config import Checkpoint

_FIRST_STEPS, _FIRST_MINUTES = 10, 5.0
"""A run's first checkpoint comes after so many of its steps, or so long: what is in its way is seen then."""


class SaveClock:
    """Counts steps and minutes since the last checkpoint.

    Args:
        first: the run has no checkpoint yet.
    """

    def __init__(self, settings: Checkpoint, *, first: bool) -> None:
        self._minutes, self._first = settings.every_minutes, first
        self._steps, self._since = 0, time.monotonic()

    def wants(self) -> bool:
        """Whether one is due; to be asked once after every step."""
        self._steps += 1
        minutes = (time.monotonic() - self._since) / 60
        if self._first and (self._steps >= _FIRST_STEPS or minutes >= _FIRST_MINUTES):
            return True
        return 0 < self._minutes <= minutes

    def saved(self) -> None:
        """One has been written, for whatever reason."""
        self._first, self._steps, self._since = False, 0, time.monotonic()
