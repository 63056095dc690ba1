"""What was measured once on a machine and later runs go by: records in a JSON file of the user's cache folder.

    kernels = Remembered("kernels.json", "loss kernels", check=lambda record: Shape(*record["shape"]))
    kernels.find(key)                        # its record, or None
    kernels.keep(key, record)                # what the file holds from now on: the first to come is right

The folder is $XDG_CACHE_HOME/clipscale, else ~/.cache/clipscale. A key names all that its record depends on.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipscale.errors import UserError, reason
from clipscale.files import cache_folder, write_file
from clipscale.tell import tell


@dataclass(frozen=True)
class Remembered:
    """One file.

    Args:
        name: of the file.
        what: is measured, in the plural.
        check: raises ValueError, TypeError, KeyError or AttributeError for a record that is damaged.
    """

    name: str
    what: str
    check: Callable[[Any], object]

    def find(self, key: str) -> dict[str, Any] | None:
        return self._read().get(key)

    def keep(self, key: str, record: dict[str, Any]) -> dict[str, Any]:
        """Write the record down, unless there is one: ranks that measured at the same time go by the same one."""
        try:
            path = self._path()
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path.with_suffix(".lock"), "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                records = self._read()
                record = records.setdefault(key, record)
                write_file(path, json.dumps(records, indent=1))
        except (OSError, UserError) as error:
            tell(f"the choice of {self.what} is not remembered, and a restart may choose others: {reason(error)}")
        return record

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            records = json.loads(self._path().read_text())
            for record in records.values():
                self.check(record)
            return records
        except (FileNotFoundError, UserError):  # none yet, or no place for one
            return {}
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            tell(f"{self._path()} is not readable, {self.what} are tuned anew: {error}")
            return {}

    def _path(self) -> Path:
        return cache_folder(None) / self.name
