"""Where new shards go: what lies there is kept or replaced, and what is new is added whole or not at all.

to = Destination(Path("shards"), "train", 10_000, overwrite=True)
with building(to.output, "train", to.old_shards()) as build:        # shards/.train.building
    ...                                                             # files are written to `build`
# now they lie in shards/, and no other train-<number>.tar
"""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from clipscale.errors import require
from clipscale.files import sync_folder
from clipscale.words import counted


@dataclass(frozen=True)
class Destination:
    output: Path
    prefix: str  # '': shards are called 00000.tar, as img2dataset's are
    samples_per_shard: int
    overwrite: bool

    def old_shards(self) -> list[Path]:
        """What is there under this prefix.

        Raises:
            UserError: something, without `overwrite`; or the folder cannot be one.
        """
        plain = "/" not in self.prefix and not self.prefix.startswith(".")
        require(plain, f"--prefix {self.prefix!r}: must be a plain file name, or empty")
        require(not self.output.exists() or self.output.is_dir(), f"{self.output} is a file: --output must be a folder")
        start = f"{self.prefix}-" if self.prefix else ""
        found = self.output.glob(f"{glob.escape(start)}*.tar")
        old = sorted(path for path in found if path.name[len(start) : -len(".tar")].isdigit())
        require(
            not old or self.overwrite,
            f"{self.output} already holds {counted(len(old), 'shard')} {start}*.tar: choose another --prefix "
            "or --overwrite",
        )
        return old


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
