"""A set of files in a folder, added whole or not at all.

with building(Path("shards"), "train") as build:      # shards/.train.building, empty
    ...                                               # files are written to `build`
                                                      # and now they lie in shards/
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from clipscale.files import sync_folder


@contextmanager
def building(output: Path, name: str, old: Iterable[Path] = ()) -> Iterator[Path]:
    """A new hidden folder in `output` (made if absent), whose files move into `output` when the block ends well.

    old: files in `output` that the new ones replace; they go, unless there is no new one.
    """
    output.mkdir(parents=True, exist_ok=True)
    build = output / f".{name}.building"
    shutil.rmtree(build, ignore_errors=True)
    build.mkdir()
    try:
        yield build
        names = sorted(path.name for path in build.iterdir())
        for new in names:
            os.replace(build / new, output / new)
        for path in old:
            if names and path.name not in names:
                path.unlink()
        sync_folder(output)
    finally:
        shutil.rmtree(build, ignore_errors=True)
