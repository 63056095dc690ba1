"""Many shards at once: what has no current sidecar is indexed, in processes of their own where that is worth it.

    shards = index_shards(urls, Index(), cache, jobs=8, track=track, label="indexing train")

A worker is a plain subprocess that is handed one shard after the other, a line of JSON each way: it imports nothing of
the main program's, signals to the program's process group do not reach it, and it ends with the program, however that
ends. One that is killed ends its pipe, and so is an error at once.
"""

from __future__ import annotations

import dataclasses
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import Any

from clipscale.data.cache import ShardCache
from clipscale.data.index import Index, Shard
from clipscale.data.select import Rules
from clipscale.data.shards import is_local, masked
from clipscale.errors import UserError

Track = Callable[[Iterable[str], str], Iterable[str]]

_LOOK_UPS = 8  # sidecars read at once: on a network's file system each takes milliseconds
_INLINE_BYTES = {"fast": 1 << 29, "decode": 1 << 24}  # less than this is indexed sooner than a worker has started
_WORKER = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from clipscale.data.indexing import serve
serve()
"""


def index_shards(
    urls: list[str],
    index: Index,
    cache: ShardCache | None,
    *,
    jobs: int | None = None,
    track: Track | None = None,
    label: str = "indexing",
) -> list[Shard]:
    """The index of every shard, in the order of `urls`. Remote ones come through `cache`.

    Raises:
        UserError: shards that cannot be read, named once all others are indexed; a worker that died.
    """
    shards: dict[str, Shard | None] = {}
    unreadable: dict[str, str] = {}
    with ThreadPoolExecutor(_LOOK_UPS) as pool:
        for url, found in zip(urls, pool.map(lambda url: _or_error(index.known, url), urls), strict=True):
            if isinstance(found, OSError):
                unreadable[url] = str(found)
            else:
                shards[url] = found
    missing = [url for url, shard in shards.items() if shard is None]
    jobs = min(jobs or os.cpu_count() or 1, len(missing))
    if missing:
        with _Builders(index, cache, jobs, inline=_is_little(missing, index)) as builders:
            futures = {builders.submit(url): url for url in missing}
            shown = track(missing, label) if track else missing
            for _, future in zip(shown, as_completed(futures), strict=True):
                url, found = futures[future], future.result()
                if isinstance(found, OSError):
                    unreadable[url] = str(found)
                else:
                    shards[url] = found
    if unreadable:
        url, error = next(iter(unreadable.items()))
        more = f" (and {len(unreadable) - 1} more of {len(urls)} shards)" if len(unreadable) > 1 else ""
        raise UserError(f"shard {masked(url)!r}: {error}{more}; mend it, or take it out of the config")
    return [shards[url] for url in urls]


def _or_error(function: Callable[[str], Any], url: str) -> Any:
    try:
        return function(url)
    except OSError as error:
        return error


def _is_little(urls: list[str], index: Index) -> bool:
    """Whether the shards are read in less time than a worker takes to start."""
    limit = _INLINE_BYTES["decode" if index.rules.looks_into_pictures else "fast"]
    return all(map(is_local, urls)) and sum(os.path.getsize(url) for url in urls) < limit


class _Builders:
    """Threads, each of which fetches a shard where it is remote and has it indexed: here, or by a worker."""

    def __init__(self, index: Index, cache: ShardCache | None, jobs: int, inline: bool) -> None:
        self._index, self._cache, self._inline = index, cache, inline
        self._pool = ThreadPoolExecutor(jobs)
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._workers: list[_Worker] = []
        self._lock, self._ended = threading.Lock(), False

    def __enter__(self) -> _Builders:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        """Also in the middle, after an error or an interrupt: nothing goes on behind it."""
        with self._lock:
            self._ended = True  # no further worker is started
        for worker in self._workers:
            worker.end()
        if error and self._cache is not None:
            self._cache.close()  # ends the waiting for downloads
        self._pool.shutdown(cancel_futures=True)

    def submit(self, url: str) -> Future:
        return self._pool.submit(_or_error, self._build, url)

    def _build(self, url: str) -> Shard:
        if is_local(url):
            return self._build_file(url, None)
        file = self._cache.open(url)
        try:
            return self._build_file(url, file)
        finally:
            os.close(file)

    def _build_file(self, url: str, file: int | None) -> Shard:
        if self._inline:
            return self._index.build(url, file)
        try:
            worker = self._idle.get_nowait()
        except queue.Empty:
            with self._lock:
                if self._ended:
                    raise UserError("the indexing was ended") from None
                worker = _Worker(self._index)
                self._workers.append(worker)
        shard = worker.build(url, None if file is None else f"/proc/{os.getpid()}/fd/{file}")
        self._idle.put(worker)
        return shard


class _Worker:
    """One subprocess that indexes one shard at a time."""

    def __init__(self, index: Index) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _WORKER, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        self._index = dataclasses.asdict(index) | {"rules": index.rules.to_dict()}

    def build(self, url: str, file: str | None) -> Shard:
        try:
            print(json.dumps([self._index, url, file]), file=self._process.stdin, flush=True)
            answer = self._process.stdout.readline()
        except (OSError, ValueError):  # its end of the pipe, or ours, is closed
            answer = ""
        if not answer.endswith("\n"):
            status = self._process.wait()
            how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
            raise UserError(
                f"shard {masked(url)!r}: the process that indexed it {how}; if memory is short, set fewer "
                "data.index_jobs (--jobs)"
            )
        kind, value = json.loads(answer)
        if kind == "shard":
            return Shard(**value)
        raise {"OSError": OSError, "UserError": UserError}[kind](value)

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


def serve() -> None:
    """A worker's life: a shard's index for each line that comes in, until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever prints does not disturb the answers
    for line in sys.stdin:
        facts, url, file = json.loads(line)
        index = Index(**facts | {"rules": Rules.from_dict(facts["rules"])})
        try:
            answer = ("shard", dataclasses.asdict(index.build(url, file)))
        except OSError as error:
            answer = ("OSError", str(error))
        except UserError as error:
            answer = ("UserError", str(error))
        print(json.dumps(answer), file=answers, flush=True)
