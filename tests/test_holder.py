"""One run, one writer: who holds a run's folder is named, and a dead holder lets go."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from processes import wait_until

from clipscale.checkpoint import RunFolder, holder, refuse_held
from clipscale.errors import UserError
from clipscale.telemetry.faults import recording

HOLD = """
import errno, fcntl, sys, time
from clipscale.checkpoint import RunFolder, holder
if sys.argv[2] == "heartbeat":
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")
    fcntl.flock, holder.BEAT_SECONDS = none, 0.1
folder = RunFolder(sys.argv[1])
folder.keep()
print("held", flush=True)
time.sleep(600)
"""
BEAT, STILL = 0.1, 1.5


@contextmanager
def held_elsewhere(folder: Path, how: str) -> Iterator[subprocess.Popen]:
    """Another process (no torch) that holds the folder."""
    command = [sys.executable, "-c", HOLD, str(folder), how]
    environment = {**os.environ, "SLURM_JOB_ID": "88", "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


@pytest.fixture
def no_locks(monkeypatch) -> None:
    """A file system without them, and hearts that beat faster."""

    def none(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    monkeypatch.setattr(holder, "BEAT_SECONDS", BEAT)
    monkeypatch.setattr(holder, "STILL_SECONDS", STILL)


def refusal(folder: Path, take=RunFolder) -> str:
    """What a second start is told, within 5 s."""
    begin = time.monotonic()
    with pytest.raises(UserError) as error:
        take(str(folder))
    assert time.monotonic() - begin < 5
    return str(error.value)


@pytest.mark.parametrize("how", ["lock", "heartbeat"])
def test_a_second_start_is_refused_and_names_the_first_which_lets_go_when_killed(tmp_path, request, how):
    if how == "heartbeat":
        request.getfixturevalue("no_locks")
    with held_elsewhere(tmp_path, how) as process:
        wanted = (
            rf"run\.dir='.*' is in use by another process: process {process.pid} on {re.escape(socket.gethostname())} "
            r"\(job 88\), since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d; end it, or set another run\.dir"
        )
        assert re.fullmatch(wanted, refusal(tmp_path))
        assert re.fullmatch(wanted, refusal(tmp_path, refuse_held))
        process.send_signal(signal.SIGKILL)
        process.wait(10)
        begin = time.monotonic()
        refuse_held(str(tmp_path))
        RunFolder(str(tmp_path)).close()
        assert time.monotonic() - begin < 10 * STILL


def test_a_lock_names_its_holder_and_nothing_of_the_one_before(tmp_path, monkeypatch):
    (tmp_path / ".lock").write_text("x" * 1000)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    folder = RunFolder(str(tmp_path))
    found = json.loads((tmp_path / ".lock").read_text())
    assert (found["host"], found["job"], found["pid"]) == (socket.gethostname(), "", os.getpid())
    assert " (job" not in refusal(tmp_path)
    assert json.loads((tmp_path / ".lock").read_text()) == found  # a refused start leaves it alone
    folder.close()


def test_a_file_system_without_locks_is_told_and_leaves_nothing(tmp_path, no_locks, told):
    folder = RunFolder(str(tmp_path / "new" / "run"))
    (line,) = told
    assert line.startswith(f"warning: run.dir='{tmp_path}/new/run': its file system has no locks (No locks available)")
    first = (tmp_path / "new" / "run" / ".heartbeat").read_bytes()
    wait_until(lambda: (tmp_path / "new" / "run" / ".heartbeat").read_bytes() != first)
    folder.close()
    assert os.listdir(tmp_path) == []


def test_a_heartbeat_of_the_past_is_waited_for_by_the_hosts_own_clock(tmp_path, no_locks):
    """Its time of writing may lie in the future of this host, or long ago."""
    for age in (-1e6, 1e6):
        (tmp_path / ".heartbeat").write_text('{"host": "n9", "pid": 3, "token": "theirs", "beat": 7}\n')
        os.utime(tmp_path / ".heartbeat", (time.time() - age,) * 2)
        begin = time.monotonic()
        RunFolder(str(tmp_path)).close()
        assert time.monotonic() - begin >= STILL
        assert not (tmp_path / ".heartbeat").exists()


def test_of_two_that_find_the_same_heart_still_one_gets_the_folder(tmp_path, no_locks, monkeypatch):
    path = tmp_path / ".heartbeat"
    path.write_text('{"host": "n9", "pid": 3, "token": "theirs", "beat": 7}\n')
    write = holder.write_file

    def overtaken(*words, **more):
        write(*words, **more)
        write(path, '{"host": "n2", "pid": 5, "since": "today", "token": "the other", "beat": 1}\n')

    monkeypatch.setattr(holder, "write_file", overtaken)
    assert "process 5 on n2, since today" in refusal(tmp_path)


def test_a_folder_that_was_taken_away_is_a_fault(tmp_path, no_locks):
    found: list[dict] = []
    with recording(found.append):
        folder = RunFolder(str(tmp_path))
        (tmp_path / ".heartbeat").write_text('{"host": "n2", "pid": 5, "since": "today", "token": "the other"}\n')
        wait_until(lambda: found)
        folder.close()
    assert found[0]["kind"] == "lock"
    assert found[0]["what"] == f"another process has taken {tmp_path}: process 5 on n2, since today"
    assert (tmp_path / ".heartbeat").exists()  # theirs
