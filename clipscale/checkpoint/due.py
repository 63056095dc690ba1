"""When a checkpoint is due by the clock, and that a run's first one comes early.

    clock = SaveClock(config.checkpoint, step=0)
    if clock.wants(step=7): ...; clock.saved(step=7)

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
        step: after which the run goes on; 0: it has no checkpoint yet.
    """

    def __init__(self, settings: Checkpoint, *, step: int) -> None:
        self._minutes, self._first = settings.every_minutes, step == 0
        self._since = time.monotonic()

    def wants(self, *, step: int) -> bool:
        """Whether one is due after this step."""
        minutes = (time.monotonic() - self._since) / 60
        if self._first and (step >= _FIRST_STEPS or minutes >= _FIRST_MINUTES):
            return True
        return 0 < self._minutes <= minutes

    def saved(self) -> None:
        """One has been written, for whatever reason."""
        self._first, self._since = False, time.monotonic()
