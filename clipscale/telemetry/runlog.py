"""What a run tells: log lines and a progress bar for people, metrics.jsonl and TensorBoard for tools.

    with RunLog("runs/a", rank=0) as log:
        log.begin(start_step=0, total_steps=400)            # a row of attempts.jsonl
        log.metrics({"step": 1, "loss": 5.5, ...})          # one row of metrics.jsonl, the same in TensorBoard
        tell("step 1/400 ...")                               # above the progress bar, and in run.log

Only the main rank writes; other ranks pass on what was told for every rank. Rows of steps that a resumed run does again
are moved to metrics.superseded.jsonl first, so every step stands once. All files: docs/reliability.md.
"""

from __future__ import annotations

import dataclasses
import json
import math
import resource
import socket
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import TextColumn

from clipscale import __version__
from clipscale.config import Config, flat
from clipscale.config.load import dump_config
from clipscale.files import append_rows, keep_rows, read_rows
from clipscale.launch import launched_by
from clipscale.progress import bar_on, time_left
from clipscale.telemetry.board import Board
from clipscale.telemetry.faults import recording, report_fault
from clipscale.telemetry.growing import GrowingFile
from clipscale.telemetry.parts import to_columns
from clipscale.tell import listening
from clipscale.words import counted

_RECENT_STEPS = 100  # whose mean is the pace that the time left is told by


class RunLog:
    """The one place a run writes to; on ranks other than 0 `begin`, `metrics` and `advance` do nothing.

    It hears what is told from the start; `begin` comes before the first row, when nothing can refuse the run any more.
    """

    def __init__(self, folder: str, *, rank: int = 0, ranks: int = 1) -> None:
        self._rank, self._ranks, self._folder, self._started = rank, ranks, Path(folder), _now()
        self._boards: list[Any] = []  # Board, WandbBoard
        self._files: dict[str, GrowingFile] = {}
        self._console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)
        self._open = ExitStack()
        self._open.enter_context(listening(self._hear))
        self._open.enter_context(recording(self._record, is_other_rank=rank > 0))

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def begin(
        self,
        start_step: int,
        total_steps: int,
        *,
        why: str = "started again",
        anew: bool = False,
        config: Config | None = None,
    ) -> None:
        """The run goes on after `start_step` of `total_steps`: later rows are set aside, with `why`; a row of
        attempts.jsonl, the progress bar, the boards, which describe the `config`.

        Args:
            anew: it has gone back, and its later curves are told apart from those before where a board can.
        """
        if self._rank:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        self._set_aside(start_step, why)
        self._open_boards(start_step, config, anew=anew)
        job, restart = launched_by()
        attempt = {"started": self._started, "time": _now(), "host": socket.gethostname(), "job": job}
        attempt |= {
            "restart": restart,
            "ranks": self._ranks,
            "step": start_step,
            "last_step": total_steps,
            "version": __version__,
        }
        append_rows(self._folder / "attempts.jsonl", [attempt])
        self._progress = self._open.enter_context(bar_on(self._console, TextColumn("{task.fields[eta]}")))
        self._task = self._progress.add_task("step", total=total_steps, completed=start_step, eta="-")

    def _open_boards(self, start_step: int, config: Config | None, *, anew: bool) -> None:
        self._boards.append(Board(self._folder / "tensorboard", start_step + 1))
        if config is None:
            return
        if config.wandb.project is not None:
            from clipscale.telemetry.wandb_board import open_wandb

            if (board := open_wandb(config.wandb, config.run.dir, anew=anew)) is not None:
                self._boards.append(board)
        settings, text = flat(dataclasses.asdict(config)), dump_config(config)
        for board in self._boards:
            board.describe(settings, text, ["train/loss", *config.judged_by()])

    def _set_aside(self, step: int, why: str) -> None:
        """Rows of later steps, which will be done again, go to metrics.superseded.jsonl, behind a row that says when,
        after which step and why."""
        path = self._folder / "metrics.jsonl"
        if later := [row for row in read_rows(path) if row["step"] > step]:
            about = {"superseded": len(later), "time": _now(), "resumed_after_step": step, "why": why}
            append_rows(path.with_name("metrics.superseded.jsonl"), [about, *later], sync=True)
        if torn := keep_rows(path, lambda row: row["step"] <= step):
            what = f"{path} had {counted(torn, 'line')} that a crash or a full disk cut short"
            report_fault("telemetry", what, action="dropped")
        path.touch()

    def row_of(self, step: int) -> dict[str, Any] | None:
        """The row of this step in metrics.jsonl, if there is one."""
        return next((row for row in read_rows(self._folder / "metrics.jsonl") if row.get("step") == step), None)

    def metrics(self, row: dict[str, Any]) -> None:
        """One row of metrics.jsonl, with the time; its numbers go to the boards under the same names."""
        if self._rank:
            return
        finite = {name: value if math.isfinite(value) else None for name, value in row.items()}  # JSON has no NaN
        self._append_line("metrics.jsonl", json.dumps(finite | {"time": _now()}))
        curves = {name if "/" in name else f"train/{name}": row[name] for name in row if name != "step"}
        for board in self._boards:
            board.add(curves, row["step"])

    def advance(self, step: int, eta_seconds: float) -> None:
        """Move the bar, which shows the same time left as the log line."""
        if self._rank == 0:
            self._progress.update(self._task, completed=step, eta=time_left(eta_seconds))

    def close(self) -> None:
        for board in self._boards:
            board.close()
        self._open.close()
        for file in self._files.values():
            file.close()

    def _record(self, fault: dict[str, Any]) -> None:
        """A row of faults.jsonl."""
        if self._folder.is_dir():
            row = {"time": _now(), "rank": self._rank} | fault
            self._append_line("faults.jsonl", json.dumps(row))

    def _append_line(self, name: str, line: str) -> None:
        """Ranks may share the file."""
        if name not in self._files:
            self._files[name] = GrowingFile(self._folder / name, lines=True)
        self._files[name].add(f"{line}\n".encode())

    def _hear(self, line: str, every_rank: bool) -> None:
        if self._rank and not every_rank:
            return
        line = f"rank {self._rank}: {line}" if self._rank else line
        with suppress(OSError):  # it may lead into a file on a full disk
            self._console.print(line)
        if not self._folder.is_dir():  # not made yet, or this rank's node does not share it
            return
        self._append_line("run.log", f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}")


class Pace:
    """How fast a run goes: for one step, over an interval between two log lines, and in all; and what it has to go."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._samples, self._waited, self._seconds = 0, 0.0, 0.0
        self._parts: Counter[str] = Counter()  # seconds of each, since the last log line
        self._recent: deque[float] = deque(maxlen=_RECENT_STEPS)  # seconds of a step each
        self._steps = 0
        self._others: dict[str, float] = {}  # seconds that each took last

    def add(self, samples: int, waited: float, seconds: float) -> dict[str, float]:
        """Count one step of `seconds`, of which `waited` went into waiting for data; returns its own rates."""
        self._samples += samples
        self._waited += waited
        self._seconds += seconds
        if self._steps == 1:  # the first step starts threads and tunes kernels: it says nothing of the others
            self._recent.clear()
        self._steps += 1
        self._recent.append(seconds)
        return {"samples_per_second": samples / seconds, "data_wait_share": waited / seconds}

    def spent(self, parts: dict[str, float]) -> dict[str, float]:
        """Count where the time since the last row went, by part (parts.py); returns it as columns of the row."""
        self._parts.update(parts)
        return to_columns(parts)

    def interval(self) -> dict[str, float]:
        """The rates, and the seconds by part, over all steps since the last call."""
        rates = {
            "samples_per_second": self._samples / self._seconds,
            "data_wait_share": self._waited / self._seconds,
        } | to_columns(self._parts)
        self._samples, self._waited, self._seconds = 0, 0.0, 0.0
        self._parts.clear()
        return rates

    def elapsed(self) -> float:
        """Seconds since the beginning, evaluation and checkpoints included."""
        return time.perf_counter() - self._started

    @contextmanager
    def other(self, name: str) -> Iterator[None]:
        """Time something between the steps, an evaluation or a checkpoint."""
        begin = time.perf_counter()
        yield
        self._others[name] = time.perf_counter() - begin

    def eta_seconds(self, steps: int, others: dict[str, int]) -> float:
        """Seconds to go: so many steps at the recent pace, and so many of each of the others at what it took last.

        Evaluations and checkpoints are counted apart, so that a long one does not pass for slow steps.
        """
        pace = sum(self._recent) / max(len(self._recent), 1)
        return steps * pace + sum(self._others.get(name, 0.0) * times for name, times in others.items())


def _now() -> float:
    """Of every row: seconds since the epoch."""
    return round(time.time(), 3)


def memory() -> dict[str, int]:
    """Peak resident memory of this process, and the peak of its GPU where one is used."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    gpu = {"gpu_memory_bytes": torch.cuda.max_memory_allocated()} if torch.cuda.is_initialized() else {}
    return {"memory_bytes": host} | gpu
