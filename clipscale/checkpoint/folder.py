"""A run's folder, held by one process at a time.

with closing(RunFolder("runs/a")) as folder:
    folder.keep()                              # the run begins
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from clipscale.checkpoint.holder import LOCK, HeldError, look_at_holder, take_folder
from clipscale.errors import UserError, reason


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
        names = (LOCK, "run.log", "faults.jsonl")
        self._new = [path for name in names if not os.path.exists(path := self._path / name)]
        try:
            self._path.mkdir(parents=True, exist_ok=True)
            self._hold = take_folder(self._path)
        except HeldError as error:
            raise _in_use(run_dir, error) from error
        except OSError as error:
            raise UserError(
                f"run.dir={run_dir!r} cannot be made: {reason(error)}; choose a folder that can be written"
            ) from error

    def keep(self) -> None:
        """The run begins: from here on the folder stays."""
        self._keeps = True

    def close(self) -> None:
        with suppress(OSError):
            for path in () if self._keeps else self._new:
                path.unlink(missing_ok=True)
        self._hold.close()
        with suppress(OSError):  # somebody else has put something there
            for folder in () if self._keeps else self._made:
                folder.rmdir()


def refuse_held(run_dir: str) -> None:
    """Raise UserError where another process holds the folder now. A first look: `RunFolder` decides."""
    try:
        look_at_holder(Path(run_dir))
    except HeldError as error:
        raise _in_use(run_dir, error) from error


def _in_use(run_dir: str, error: HeldError) -> UserError:
    return UserError(f"run.dir={run_dir!r} is in use by another process: {error}; end it, or set another run.dir")
