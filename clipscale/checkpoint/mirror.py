"""Copies of a run's checkpoints in remote storage, and the way back from there.

    mirror = Mirror("s3://bucket/runs/a", "runs/a", keep=2)
    mirror.offer(path)               # a checkpoint that has just been published; returns at once
    mirror.wait()                    # until the newest is copied, or given up: at the end of a run
    mirror.close()                   # what is being copied is left as it is

    fetch_from_mirror("s3://bucket/runs/a", "runs/a", "auto")       # into a run's folder that has no checkpoint

A thread copies, one checkpoint at a time; where several wait, the newest. Of each file what arrived is read back and
hashed, and the manifest comes last: what was cut short is not found. Any scheme that fsspec opens will do; credentials
and endpoints are what its clients read from the environment and their own files.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from clipscale.checkpoint.find import candidates, verify
from clipscale.data.fetch.urls import masked
from clipscale.errors import UserError, reason, require
from clipscale.files import sync_file, sync_folder
from clipscale.telemetry.faults import report_fault

_MANIFEST = "manifest.json"
_HELD = ".mirror"  # beside the checkpoints: what is being copied
_BLOCK_BYTES = 2**22
_PATIENCE_SECONDS = 10.0  # with a transfer, once the run ends
_NAME = re.compile(r"step-\d{9}")


class Mirror:
    """Keeps the `keep` newest, as the run's folder does, and none of later steps, which a rewind has left behind.

    Args:
        url: of the folder that the checkpoints' folders lie in.
        tries: of one checkpoint, before it is given up; the first pause is `pause_seconds`, the next twice as long.
    """

    def __init__(self, url: str, run_dir: str, keep: int, *, tries: int = 6, pause_seconds: float = 1.0) -> None:
        self._url, self._keep, self._tries, self._pause_seconds = url, keep, tries, pause_seconds
        shutil.rmtree(Path(run_dir, "checkpoints", _HELD), ignore_errors=True)  # of a run that was killed
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._next: Path | None = None
        self._thread: threading.Thread | None = None

    def offer(self, path: Path) -> None:
        """Copy this checkpoint, instead of one that still waits. It may be dropped meanwhile: its files are held."""
        held = _hold(path)
        with self._lock:
            passed, self._next = self._next, held
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
                self._thread.start()
        if passed is not None:
            _let_go(passed)

    def wait(self, seconds: float | None = None) -> None:
        """At most so long."""
        thread = self._thread
        if thread is not None:
            thread.join(seconds)

    def close(self) -> None:
        """A transfer that stalls ends with the process."""
        self._stop.set()
        self.wait(_PATIENCE_SECONDS)

    def _work(self) -> None:
        while True:
            with self._lock:
                path, self._next = self._next, None
                if path is None or self._stop.is_set():
                    self._thread = None  # seen by `offer`, which holds the lock: it starts another
                    break
            self._copy(path)
            _let_go(path)
        if path is not None:
            _let_go(path)

    def _copy(self, path: Path) -> None:
        """With pauses between the tries; a newer one that waits ends them."""
        for again in range(self._tries):
            try:
                upload(self._url, path, self._keep, self._stop.is_set)
                return
            except Exception as error:  # the clients raise whatever they like
                problem = masked(reason(error))
            if self._next is not None or self._stop.wait(self._pause_seconds * 2**again):
                break
        if not self._stop.is_set():
            what = f"{path.name} was not copied to {masked(self._url)}: {problem}"
            report_fault("checkpoint", what, action="it stays in the run's folder, the next one is copied again")


def upload(url: str, path: Path, keep: int, stopped: Callable[[], bool] = lambda: False) -> None:
    """Copy a checkpoint, read it back, then drop others. Raises OSError, and what else the client of the URL raises."""
    files, root = _open(url)
    target, manifest = f"{root}/{path.name}", (path / _MANIFEST).read_bytes()
    if not (files.exists(f"{target}/{_MANIFEST}") and files.cat_file(f"{target}/{_MANIFEST}") == manifest):
        _remove(files, target)  # cut short, or of another time
        files.makedirs(target, exist_ok=True)
        for name, facts in json.loads(manifest).items():
            with open(path / name, "rb") as source, files.open(f"{target}/{name}", "wb") as there:
                _pass_on(source, there.write, stopped)
            sha = hashlib.sha256()
            with files.open(f"{target}/{name}", "rb", block_size=_BLOCK_BYTES, cache_type="none") as there:
                _pass_on(there, sha.update, stopped)
            if sha.hexdigest() != facts["sha256"]:
                raise OSError(f"{name} came back with another hash")
        files.pipe_file(f"{target}/{_MANIFEST}", manifest)
    names = sorted(_names(files, root), reverse=True)
    older = [name for name in names if name < path.name]
    whole = [name for name in older if files.exists(f"{root}/{name}/{_MANIFEST}")]
    for name in names:
        if name > path.name or name in set(older) - set(whole[: keep - 1]):
            _remove(files, f"{root}/{name}")


def fetch_from_mirror(url: str | None, run_dir: str, resume: str) -> str:
    """The newest checkpoint of the mirror that is whole, into a run's folder that has none; what to tell of it.

    Raises:
        UserError: the mirror cannot be read, it has checkpoints and none is whole, or the run is to begin anew.
    """
    if url is None:
        return ""
    folder = Path(run_dir, "checkpoints")
    try:
        files, root = _open(url)
        if candidates(folder):
            return ""
        names = sorted(_names(files, root), reverse=True)
        names = [name for name in names if files.exists(f"{root}/{name}/{_MANIFEST}")]
        require(
            not names or resume == "auto",
            f"resume={resume}, but checkpoint.mirror={masked(url)} holds {names[0] if names else ''} of a run; set "
            "resume=auto to go on from there, or another checkpoint.mirror",
        )
        damage = []
        for name in names:
            if not (problem := _download(files, f"{root}/{name}", folder / name)):
                for line in damage:
                    report_fault("damage", f"damaged checkpoint in the mirror: {line}", action="passing over it")
                return f"{run_dir} has no checkpoint: {name} was fetched from {masked(url)}"
            damage.append(f"{name}: {problem}")
    except UserError:
        raise
    except Exception as error:  # the clients raise whatever they like
        raise UserError(
            f"checkpoint.mirror={masked(url)} cannot be read ({masked(reason(error))}), and {run_dir} may have "
            "checkpoints there; mend that, or set checkpoint.mirror=null"
        ) from error
    require(not damage, f"no checkpoint of checkpoint.mirror={masked(url)} verifies ({'; '.join(damage)})")
    return ""


def _download(files: Any, source: str, target: Path) -> str:
    """'' once the checkpoint is whole and has its name; else what is wrong with it."""
    aside = target.with_name(f"{target.name}.tmp-{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        for name in (*json.loads(files.cat_file(f"{source}/{_MANIFEST}")), _MANIFEST):
            require("/" not in name, f"{source}/{_MANIFEST} names {name!r}")
            with files.open(f"{source}/{name}", "rb", block_size=_BLOCK_BYTES, cache_type="none") as there:
                with open(aside / name, "wb") as file:
                    _pass_on(there, file.write)
                sync_file(aside / name)
        problem = verify(aside)
        if not problem:
            sync_folder(aside)
            aside.rename(target)
            sync_folder(target.parent)
    except (FileNotFoundError, ValueError) as error:
        problem = reason(error)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return problem


def _open(url: str) -> tuple[Any, str]:
    import fsspec

    files, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
    return files, root.rstrip("/")


def _names(files: Any, root: str) -> list[str]:
    """Of the checkpoints' folders there, whole or not."""
    try:
        names = (place.rstrip("/").rsplit("/", 1)[-1] for place in files.ls(root, detail=False, refresh=True))
        return [name for name in names if _NAME.fullmatch(name)]
    except FileNotFoundError:
        return []


def _remove(files: Any, folder: str) -> None:
    """Its manifest first: half removed, it is not found."""
    with suppress(FileNotFoundError):
        files.rm_file(f"{folder}/{_MANIFEST}")
    with suppress(FileNotFoundError):
        files.rm(folder, recursive=True)


def _pass_on(source: Any, take: Callable[[bytes], Any], stopped: Callable[[], bool] = lambda: False) -> None:
    while block := source.read(_BLOCK_BYTES):
        if stopped():
            raise InterruptedError("the run ends")
        take(block)


def _hold(path: Path) -> Path:
    """The checkpoint's files under other names, so that they stay while they are copied."""
    held = path.parent / _HELD / path.name
    shutil.rmtree(held, ignore_errors=True)
    try:
        held.mkdir(parents=True)
        for file in path.iterdir():
            os.link(file, held / file.name)
    except OSError:  # a file system without links: the checkpoint itself, as long as it stays
        shutil.rmtree(held, ignore_errors=True)
        return path
    return held


def _let_go(held: Path) -> None:
    if held.parent.name == _HELD:
        shutil.rmtree(held, ignore_errors=True)
        with suppress(OSError):  # another is in it
            held.parent.rmdir()
