"""pipe: what a shell command writes.

    body = open_body("pipe:cat x-00.tar", start=0, version=None, stall_seconds=30.0)         # see `streams.open_body`

A command has no versions and no ranges: its output always begins at 0, and cannot be resumed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import suppress

from clipscale.data.fetch.streams import BLOCK_BYTES, Body, Refused, Seen, TryAgain


def open_body(url: str, start: int, version: str | None, stall_seconds: float) -> Body:
    """The output of a shell command, in a session of its own, so that all of it can be ended."""
    errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed when the blocks end)
    process = subprocess.Popen(
        url.partition(":")[2],
        shell=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=errors,
        start_new_session=True,
    )

    def cancel() -> None:
        if process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def blocks() -> Iterator[bytes]:
        silent = True
        try:
            while block := process.stdout.read1(BLOCK_BYTES):
                silent = False
                yield block
            status = process.wait()
            errors.seek(0)
            last = errors.read().decode(errors="replace").strip().rpartition("\n")[2]
        finally:
            cancel()
            process.stdout.close()
            process.wait()
            errors.close()
        if status or silent:
            cause = f"the command ended with status {status}" if status else "the command wrote nothing"
            kind = Refused if status in (126, 127) else TryAgain  # not to be run, not found
            raise kind(f"{cause}: {last}" if last else cause)

    return Body(0, None, None, blocks(), cancel, said="the output of a command")


def look(url: str, etag: str | None, stall_seconds: float) -> Seen:
    """Nothing: what a command would write is known once it has."""
    return Seen()
