"""A run's folder, held by one process at a time.

with closing(RunFolder("runs/a")) as folder:
    folder.keep()                              # the run begins
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from clipscale.errors import UserError, reason
from clipscale.files import lock_file


class RunFolder:
    """A run's folder, made where there is none, and held for this process until `close` (or its end, however).

    What was made here and never kept is removed at `close`: a run that is refused leaves nothing behind.

    Raises:
        UserError: it cannot be made, or another process holds it.
    """

    def __init__(self, run_dir: str) -> None:
        self._path, self._keeps = Path(run_dir), False
        above = [self._path, *self._path.parents]
        self._made = above[: next(i for i, place in enumerate(above) if os.path.exists(place))]
        self._new = [
            path for name in (".lock", "run.log", "faults.jsonl") if not os.path.exists(path := self._path / name)
        ]
        try:
            self._path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self._path / ".lock", "w")  # noqa: SIM115
        except OSError as error:
            raise UserError(
                f"run.dir={run_dir!r} cannot be made: {reason(error)}; choose a folder that can be written"
            ) from error
        if not self._hold():
            self._lock.close()
            raise UserError(f"run.dir={run_dir!r} is in use by another process; end it, or set another run.dir")

    def keep(self) -> None:
        """The run begins: from here on the folder stays."""
        self._keeps = True

    def close(self) -> None:
        if not self._keeps:
            with suppress(OSError):  # somebody else has put something there
                for path in self._new:
                    path.unlink(missing_ok=True)
                for folder in self._made:
                    folder.rmdir()
        self._lock.close()

    def _hold(self) -> bool:
        try:
            return lock_file(self._lock.fileno(), self._path / ".lock")
        except OSError:  # a file system without locks
            return True
