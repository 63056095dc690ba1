"""The folder that holds copies of remote shards: names, locks, room and eviction.

    <folder>/<key>.tar                      a whole copy; its access time says when it was opened last
             <key>.json                     its facts: size, hashes, etag, the URL without secrets
             parts/<key>.<random>.<host>    a copy under way, as long from the start as it will be
             locks/<key>                    locked (flock) by whoever fetches this shard; after a failure it says why

The key is a hash of the URL. A lock is let go when its process dies, however it dies; parts whose lock is free are
leftovers, and go when room is made next.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import threading
import time
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from clipscale.data.fetch.download import Check, Expected, Facts, FetchError, Stopped
from clipscale.data.fetch.urls import masked
from clipscale.errors import UserError
from clipscale.files import hash_file, write_file

_STEP_BYTES = 2**26  # reserved at a time where a shard's size is not known
_OLD_SECONDS = 3600.0  # a part of another host (whose locks may not be seen here) is a leftover only after this
_PATIENCE_SECONDS = 600.0  # with other downloads that hold the room
_POLL_SECONDS = 0.05
_HASH_BYTES = 2**20


class Lock:
    """An flock on a file of its own. The file goes away when it is released, unless it is to say something."""

    def __init__(self, path: Path, file: int) -> None:
        self._path, self._file = path, file

    @classmethod
    def take(cls, path: Path) -> Lock | None:
        """None: another thread or process has it."""
        while True:
            try:
                file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            except OSError as error:
                raise UserError(f"{path}: {error.strerror}; let data.cache_dir name a folder to write to") from error
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(file), os.stat(path)):
                    return cls(path, file)
            except BlockingIOError:
                os.close(file)
                return None
            except FileNotFoundError:  # released, and so removed, since it was opened
                pass
            except OSError as error:
                os.close(file)
                raise UserError(
                    f"{path}: {error.strerror}; files cannot be locked there: let data.cache_dir name a local disk"
                ) from error
            os.close(file)

    def note(self, since: float) -> str:
        """What a holder wrote after this time."""
        return os.pread(self._file, os.fstat(self._file).st_size, 0).decode() if self.written() > since else ""

    def written(self) -> float:
        """When the note was."""
        return os.fstat(self._file).st_mtime

    def write_note(self, note: str) -> None:
        with suppress(OSError):  # such as on a full disk
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, note.encode(), 0)

    def release(self, *, keep_note: bool = False) -> None:
        if not keep_note:
            self._path.unlink(missing_ok=True)
        os.close(self._file)


class Copy(NamedTuple):
    used_ns: int  # when it was opened last
    bytes: int
    path: str


class Copies:
    """The folder and its bound. Made when first written to."""

    def __init__(self, folder: Path, bound_bytes: int | None) -> None:
        self.folder, self.parts, self.locks = folder, folder / "parts", folder / "locks"
        if bound_bytes is None:  # what is there already may stay
            bound_bytes = int(0.8 * (self.free_bytes() + sum(copy.bytes for copy in self.copies())))
        self.bound_bytes = bound_bytes

    def make(self) -> None:
        try:
            self.parts.mkdir(parents=True, exist_ok=True)
            self.locks.mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"data.cache_dir: {self.folder} cannot be made ({error.strerror}); name another") from error

    def copy(self, key: str) -> Path:
        return self.folder / f"{key}.tar"

    def open(self, key: str, expect: Expected, check: Check | None, *, holder: bool = False) -> int | None:
        """A descriptor of the copy, None where there is none that is as expected and passes the check. The `holder` of
        its lock computes what is expected and not known of it, and removes one that fails."""
        try:
            file = os.open(self.copy(key), os.O_RDONLY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            return None
        state = os.fstat(file)
        found: Facts = {"bytes": state.st_size}
        if expect.crc32 is not None or expect.sha256 is not None or check:
            found = self.facts(key) | found
            missing = (expect.crc32 is not None and "crc32" not in found) or (expect.sha256 and not found.get("sha256"))
            if missing and holder:
                found |= hash_file(file, crc32=True, sha256=True)
                self.write_facts(key, found)
        unfit = check and expect.crc32 is None and check(file, bool(found.get("vouched")))
        if unfit or expect.differs(found):
            os.close(file)
            if unfit and holder:
                self.remove(key)
            return None
        with suppress(PermissionError):  # another user's copy
            os.utime(file, ns=(time.time_ns(), state.st_mtime_ns))
        return file

    def remove(self, key: str) -> None:
        for path in (self.copy(key), self.folder / f"{key}.json"):
            path.unlink(missing_ok=True)

    def facts(self, key: str) -> Facts:
        """Of the copy, as far as they are known; those of an earlier version lack `etag` and `vouched`."""
        try:
            return json.loads((self.folder / f"{key}.json").read_bytes())
        except (FileNotFoundError, ValueError):
            return {}

    def write_facts(self, key: str, facts: Facts) -> None:
        """For the holder of the key's lock."""
        write_file(self.folder / f"{key}.json", json.dumps(facts), sync=False)

    def part(self, key: str) -> Path:
        """A new name for what is under way."""
        return self.parts / f"{key}.{uuid.uuid4().hex[:12]}.{socket.gethostname()}"

    def progress(self, key: str) -> int:
        """Changes while the holder of the key's lock gets on."""
        times = [0]
        for path in self.parts.glob(f"{key}.*"):
            with suppress(FileNotFoundError):
                times.append(path.stat().st_mtime_ns)
        return max(times)

    # --- room ---------------------------------------------------------------------------------------------------------

    def copies(self) -> list[Copy]:
        found = []
        with suppress(FileNotFoundError, NotADirectoryError), os.scandir(self.folder) as entries:
            for entry in entries:
                if entry.name.endswith(".tar"):
                    with suppress(FileNotFoundError):
                        state = entry.stat()
                        found.append(Copy(state.st_atime_ns, state.st_size, entry.path))
        return found

    def free_bytes(self) -> int:
        place = next(path for path in (self.folder, *self.folder.absolute().parents) if path.exists())
        return shutil.disk_usage(place).free

    def evict(self, wanted_bytes: int) -> int:
        """Remove copies, those opened longest ago first, until so many bytes are gone or none is left; returns how
        many are gone. Open descriptors stay good."""
        gone = 0
        for copy in sorted(self.copies()) if wanted_bytes > 0 else []:
            if gone >= wanted_bytes:
                break
            with suppress(FileNotFoundError):
                os.unlink(copy.path)
                gone += copy.bytes
            Path(copy.path).with_suffix(".json").unlink(missing_ok=True)
        return gone

    def sweep(self, mine: PartFile) -> None:
        """Remove the parts that dead processes left. The lock of `mine` is held."""
        for path in self.parts.iterdir():
            key, _, host = path.name.split(".", 2)
            if path == mine.path:
                continue
            lock = None if key == mine.key else Lock.take(self.locks / key)
            if lock is None and key != mine.key:
                continue
            with suppress(FileNotFoundError):
                if host == socket.gethostname() or time.time() - path.stat().st_mtime > _OLD_SECONDS:
                    path.unlink()
            if lock:
                lock.release()

    def make_room(self, part: PartFile, wanted_bytes: int, stop: threading.Event) -> None:
        """Evict copies until this part may grow to so many bytes, and let it; wait while other parts are in the way.

        Raises:
            FetchError: it will not fit the bound or the disk.
        """
        if wanted_bytes > self.bound_bytes:
            raise FetchError(
                f"{part.shown}: its {wanted_bytes:,} bytes are more than all copies may have together "
                f"({self.bound_bytes:,} bytes); raise data.cache_bytes"
            )
        give_up = time.monotonic() + _PATIENCE_SECONDS
        while True:
            with self.room_lock(stop):
                self.sweep(part)
                lacking, others = self._lacking(part, wanted_bytes)
                gone = self.evict(lacking)
                if gone:
                    lacking, others = self._lacking(part, wanted_bytes)  # a reader may keep what lay on the disk
                if lacking <= 0:
                    os.ftruncate(part.file, wanted_bytes)
                    return
            if not others and not gone:
                raise part.full(f"{wanted_bytes:,} bytes are needed", errno.ENOSPC)
            if time.monotonic() > give_up:
                raise FetchError(
                    f"{part.shown}: no room for {wanted_bytes:,} bytes: other downloads hold {others:,} of "
                    f"{self.bound_bytes:,} bytes; raise data.cache_bytes"
                )
            os.utime(part.file)
            if stop.wait(_POLL_SECONDS):
                raise Stopped

    def _lacking(self, part: PartFile, wanted_bytes: int) -> tuple[int, int]:
        """How many bytes must go so that this part may have so many, and how many belong to other parts."""
        others = coming = mine = 0
        for path in self.parts.iterdir():
            with suppress(FileNotFoundError):
                state = path.stat()
                there = state.st_blocks * 512
                if path == part.path:
                    mine = there
                else:
                    others += state.st_size
                    coming += max(0, state.st_size - there)
        used = sum(copy.bytes for copy in self.copies())
        over_bound = used + others + wanted_bytes - self.bound_bytes
        over_disk = wanted_bytes - mine - (self.free_bytes() - coming)
        return max(over_bound, over_disk), others

    @contextmanager
    def room_lock(self, stop: threading.Event) -> Iterator[None]:
        """While it is held nobody makes room, and no part becomes a copy."""
        give_up = time.monotonic() + _PATIENCE_SECONDS
        while (lock := Lock.take(self.locks / "room")) is None:
            if time.monotonic() > give_up:
                raise FetchError(f"{self.locks / 'room'} is locked by a process that does nothing; end it")
            if stop.wait(_POLL_SECONDS / 10):
                raise Stopped
        try:
            yield
        finally:
            lock.release()


class PartFile:
    """A copy under way (remote.Part). `finish` makes it whole, `discard` removes what is left."""

    def __init__(self, copies: Copies, key: str, url: str, stop: threading.Event, *, sha256: bool) -> None:
        self.path, self.shown = copies.part(key), masked(url)
        self._copies, self.key, self._stop, self._with_sha256 = copies, key, stop, sha256
        self._begin()
        try:
            self.file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise self._said(error) from error

    def _begin(self) -> None:
        self.written_bytes = self._reserved_bytes = self._crc32 = 0
        self._sha256 = hashlib.sha256() if self._with_sha256 else None

    def restart(self) -> None:
        if self.written_bytes or self._reserved_bytes:
            os.ftruncate(self.file, 0)
            self._begin()

    def reserve(self, total_bytes: int) -> None:
        try:
            self._copies.make_room(self, total_bytes, self._stop)
        except OSError as error:
            raise self._said(error) from error
        self._reserved_bytes = total_bytes

    def write(self, block: bytes) -> None:
        end = self.written_bytes + len(block)
        if end > self._reserved_bytes:
            self.reserve(max(end, min(end + _STEP_BYTES, self._copies.bound_bytes)))
        view = memoryview(block)
        while view:
            try:
                count = os.pwrite(self.file, view, self.written_bytes)
            except OSError as error:
                full = error.errno in (errno.ENOSPC, errno.EDQUOT)
                if full and self._copies.evict(max(len(view), self._reserved_bytes - self.written_bytes)):
                    continue
                raise self._said(error) from error
            self.written_bytes += count
            view = view[count:]
        self._crc32 = zlib.crc32(block, self._crc32)
        if self._sha256:
            self._sha256.update(block)

    def facts(self) -> Facts:
        sha256 = self._sha256.hexdigest() if self._sha256 else None
        return {"bytes": self.written_bytes, "crc32": self._crc32, "sha256": sha256}

    def look_over(self, check: Check, vouched: bool) -> str:
        os.ftruncate(self.file, self.written_bytes)
        self._reserved_bytes = self.written_bytes
        return check(self.file, vouched)

    def finish(self, said: Facts) -> int:
        """Put the copy in its place, and return a descriptor that reads it. `said`: what the server told of it."""
        try:
            os.ftruncate(self.file, self.written_bytes)
            os.fsync(self.file)  # else a copy can have its name and size, and zeros, after a power cut
            self._copies.write_facts(self.key, {"url": self.shown} | self.facts() | said)
            with self._copies.room_lock(self._stop):
                file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
                self.path.rename(self._copies.copy(self.key))
        except OSError as error:
            raise self._said(error) from error
        return file

    def discard(self) -> None:
        self.path.unlink(missing_ok=True)
        os.close(self.file)

    def full(self, why: str, number: int) -> FetchError:
        free = self._copies.free_bytes()
        return FetchError(
            f"{self.shown}: {self.path.parent.parent}: {os.strerror(number)}: {why}, {free:,} bytes are free; free "
            "some, or let data.cache_dir name another disk"
        )

    def _said(self, error: OSError) -> OSError:
        if isinstance(error, FetchError):
            return error
        return self.full(f"{self.written_bytes:,} of {self._reserved_bytes:,} bytes are written", error.errno)
