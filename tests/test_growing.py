"""Logs, rows and curves on a full disk: a fault told once, never a traceback; and they go on when there is room."""

from __future__ import annotations

import errno
import io
import json
import os
import resource
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from clipscale.telemetry import growing
from clipscale.telemetry.faults import recording
from clipscale.telemetry.growing import GrowingFile, append_whole
from clipscale.telemetry.runlog import RunLog
from clipscale.tell import tell


def in_a_child(work) -> None:
    """Run `work` in a fork of this process, which may be limited; its output goes with it."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            sys.stderr = sys.stdout = io.StringIO()
            work()
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_and_curves_outlive_a_real_limit(tmp_path):
    """No file may grow beyond 2,000 bytes for a while; every row and every point is there at the end."""

    def work() -> None:
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        with RunLog(str(tmp_path)) as log:
            log.begin(0, 40)
            for step in range(1, 41):
                if step == 10:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
                if step == 30:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
                log.metrics({"step": step, "loss": 5.5, "lr": 1e-3, "grad_norm": 1.25, "note/long": 1 / 3})
                tell(f"step {step}: " + 60 * "x")

    in_a_child(work)
    assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == [*range(1, 41)]
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("train/loss")] == [*range(1, 41)]
    log = (tmp_path / "run.log").read_text()
    faults = [row for row in rows(tmp_path / "faults.jsonl") if row["kind"] == "disk"]
    for name in ("metrics.jsonl", "run.log", "events.out.tfevents"):
        (fault,) = [row for row in faults if name in row["what"]]
        assert "File too large" in fault["what"]
        assert sum(name in line and "cannot be written: File too large" in line for line in log.splitlines()) == 1
        assert sum(name in line and "is written again" in line for line in log.splitlines()) == 1
    assert len([line for line in log.splitlines() if " step " in line]) == 40
    assert "Traceback" not in log


class FullDisk:
    """os.write that takes `room` bytes in all, and then none."""

    def __init__(self, monkeypatch, room: int, code: int = errno.ENOSPC) -> None:
        self.room, self._code, self._write = room, code, os.write
        monkeypatch.setattr(growing.os, "write", self)

    def __call__(self, file: int, data: bytes) -> int:
        if self.room == 0:
            raise OSError(self._code, os.strerror(self._code))
        done = self._write(file, data[: self.room])
        self.room -= done
        return done


def test_a_piece_is_there_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "rows"
    append_whole(path, b"first\n")
    FullDisk(monkeypatch, room=3)
    with pytest.raises(OSError, match="No space left"):
        append_whole(path, b"second\n")
    assert path.read_bytes() == b"first\n"


@pytest.mark.parametrize(("code", "kind"), [(errno.ENOSPC, "disk"), (errno.EDQUOT, "disk"), (errno.EIO, "telemetry")])
def test_the_fault_is_told_once_and_what_waits_is_written_later(tmp_path, monkeypatch, told, code, kind):
    monkeypatch.setattr(growing, "_MOST_WAITING", 3)
    file, found, disk = GrowingFile(tmp_path / "rows"), [], FullDisk(monkeypatch, room=4, code=code)
    with recording(found.append):
        for number in range(6):
            file.add(b"%d\n" % number)
        assert (tmp_path / "rows").read_bytes() == b"0\n1\n"
        disk.room = 1000
        file.add(b"6\n")
    assert (tmp_path / "rows").read_bytes() == b"0\n1\n2\n3\n4\n6\n"
    (fault,) = found
    assert (fault["kind"], fault["what"]) == (kind, f"{tmp_path}/rows cannot be written: {os.strerror(code)}")
    assert told[1:] == [f"{tmp_path}/rows is written again, 1 entry lost"]
    disk.room = 0
    file.add(b"7\n")
    file.close()
    assert told[-1] == f"warning: {tmp_path}/rows lacks its last 1 entry"


def test_a_line_that_a_crash_cut_short_is_not_joined(tmp_path):
    (tmp_path / "faults.jsonl").write_text('{"kind": "a"}\n{"ki')
    file = GrowingFile(tmp_path / "faults.jsonl", lines=True)
    file.add(b'{"kind": "b"}\n')
    file.add(b'{"kind": "c"}\n')
    assert (tmp_path / "faults.jsonl").read_text() == '{"kind": "a"}\n{"ki\n{"kind": "b"}\n{"kind": "c"}\n'


def test_a_screen_that_leads_to_a_full_disk_ends_nothing(tmp_path, monkeypatch):
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(sys, "stderr", Full())
    with RunLog(str(tmp_path)) as log:
        log.begin(0, 3)
        tell("it goes on")
    assert "it goes on" in (tmp_path / "run.log").read_text()
