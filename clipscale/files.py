"""Files that are whole or not there, rows of JSON, hashes, and where copies are kept.

write_file("runs/a/config.yaml", text)                       # under another name first, synced, then renamed
with whole_file("sizes.json") as file: ...                   # the same, piece by piece
append_rows("runs/a/skipped.jsonl", [{"position": 7}])
hash_file("train-0000.tar", crc32=True)                      # {'bytes': 43110400, 'crc32': 2870425, ...}
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Literal

from clipscale.errors import UserError

_READ_BYTES = 1 << 20
_Path = str | os.PathLike


@contextmanager
def whole_file(path: _Path, mode: Literal["w", "wb"] = "w", *, sync: bool = True) -> Iterator[IO]:
    """A file to write to, text in UTF-8 or bytes, which gets its name once all is written.

    sync: wait until file and name are on the disk; what can be made again at any time does without.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")  # of its own: several may write at once
    try:
        with synced_file(partial, mode, sync=sync) as file:
            yield file
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    if sync:
        sync_folder(path.parent)


@contextmanager
def synced_file(path: _Path, mode: Literal["w", "wb"] = "w", *, sync: bool = True) -> Iterator[IO]:
    """A new file, under its own name at once; on the disk when the block ends.

    Raises:
        FileExistsError: there is one of that name.
    """
    with open(path, mode.replace("w", "x"), encoding=None if "b" in mode else "utf-8") as file:
        yield file
        file.flush()
        if sync:
            os.fsync(file.fileno())


def write_file(path: _Path, text: str, *, sync: bool = True) -> None:
    """A small text file, whole or not at all."""
    with whole_file(path, sync=sync) as file:
        file.write(text)


def sync_file(path: _Path) -> None:
    """Make what has been written to a file durable."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: _Path) -> None:
    """Make new names inside `folder` durable. Windows cannot open a folder and has no such call."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def keep_rows(path: _Path, keep: Callable[[dict[str, Any]], bool]) -> int:
    """Drop the rows of a JSONL file that are not wanted, and lines that a crash cut short; how many were no rows."""
    path = Path(path)
    if not path.exists():
        return 0
    with open(path, "rb") as file:
        lines = sum(1 for _ in file)
    with whole_file(path) as kept:
        for row in read_rows(path):
            lines -= 1
            if keep(row):
                kept.write(json.dumps(row) + "\n")
    return lines


def read_rows(path: _Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSONL file, without one that a crash cut short; none where there is no file."""
    if not os.path.exists(path):
        return
    with open(path, "rb") as file:
        yield from _rows_of(file)


def last_rows(path: _Path, most_bytes: int = 1 << 20) -> list[dict[str, Any]]:
    """The rows in the last bytes of a JSONL file; none where there is no file."""
    if not os.path.exists(path):
        return []
    with open(path, "rb") as file:
        begin = max(0, file.seek(0, os.SEEK_END) - most_bytes)
        file.seek(begin)
        return list(_rows_of(file.read().split(b"\n")[begin > 0 :]))  # the first one may begin in the middle


def _rows_of(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    for line in lines:
        row = None
        with suppress(ValueError):  # also where a bad disk left bytes that are no text
            row = json.loads(line)
        if isinstance(row, dict):
            yield row


def read_numbers(path: _Path, names: Iterable[str]) -> Iterator[dict[str, float | None]]:
    """Some columns of the rows of a JSONL file that json.dumps wrote, numbers or null: a quarter of the time that
    `read_rows` takes where rows have many columns."""
    if not os.path.exists(path):
        return
    column = re.compile(b'"(%s)": (null|[-+.0-9eE]+)' % "|".join(map(re.escape, names)).encode())
    with open(path, "rb") as file:
        for line in file:
            if line.endswith(b"}\n"):
                yield {
                    name.decode(): None if value == b"null" else float(value) for name, value in column.findall(line)
                }


def append_rows(path: _Path, rows: Iterable[dict[str, Any]], *, sync: bool = False) -> None:
    """Add rows to a JSONL file; its folder is made. `sync`: wait until they are on the disk."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
        if sync:
            file.flush()
            os.fsync(file.fileno())


def hash_file(file: _Path | int, *, crc32: bool = False, sha256: bool = False) -> dict[str, Any]:
    """`bytes`, and those asked for of `crc32` (int) and `sha256` (hexadecimal); the others are None.

    `file`: a path, or a descriptor, whose place is left alone. Read through one buffer that fits a processor's cache,
    not through a map, whose pages would count as this process's memory.
    """
    crc, sha, done, buffer = 0, hashlib.sha256(), 0, memoryview(bytearray(_READ_BYTES))
    with open(file, "rb", buffering=0, closefd=not isinstance(file, int)) as opened:
        while size := os.preadv(opened.fileno(), [buffer], done):
            done += size
            if crc32:
                crc = zlib.crc32(buffer[:size], crc)
            if sha256:
                sha.update(buffer[:size])
    return {"bytes": done, "crc32": crc if crc32 else None, "sha256": sha.hexdigest() if sha256 else None}


def why_unreadable(path: str, error: Exception) -> str:
    """What to tell of a file that a setting names; one that is missing, with both places it was looked for in."""
    if isinstance(error, FileNotFoundError) and not os.path.isabs(path):
        return f"no such file in {os.getcwd()}, nor beside the YAML that names it"
    return str(error)


def lock_file(file: int, path: _Path) -> bool:
    """Whether this process holds the lock of the file open as `file` from now on: nobody else does, and `path` is still
    its name.

    Raises:
        OSError: the file system has no locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(file), os.stat(path))
    except (BlockingIOError, FileNotFoundError):  # held, or just removed by the one that held it
        return False


def is_locked(path: _Path) -> bool:
    """Whether a process holds the lock of this file, as far as this machine can see. For an instant this process shares
    it, so ask for a person, not in a loop."""
    try:
        with open(path) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no such file, or a file system without locks
        pass
    return False


def cache_folder(cache_dir: str | None) -> Path:
    """`cache_dir` (a setting), else the user's cache folder for clipscale.

    Raises:
        UserError: this user has no home folder.
    """
    if cache_dir is not None:
        return Path(cache_dir)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "clipscale"
    except RuntimeError as error:
        raise UserError(
            "there is no home folder to keep copies in: HOME is not set, and this user has no entry in the system's "
            "list of users; set data.cache_dir to a folder, or the variable XDG_CACHE_HOME"
        ) from error
