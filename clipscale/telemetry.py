"""What a run tells: log lines and a progress bar for people, metrics.jsonl and TensorBoard for tools.

    log = RunLog("runs/a", is_main=True)
    log.begin(start_step=0, total_steps=400)
    log.metrics({"step": 1, "loss": 5.5, ...})          # one row of metrics.jsonl, the same in TensorBoard
    log.line("step 1/400 ...")                           # above the progress bar, and in run.log

Only the main rank writes. Rows of steps that a resumed run does again are dropped first, so every step stands once.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter


class RunLog:
    """The one place a run writes to, on the main rank; on other ranks every method does nothing.

    `line` works at once; `begin` comes before the first row, when nothing can refuse the run any more.
    """

    def __init__(self, folder: str, *, is_main: bool) -> None:
        self.is_main = is_main
        self.console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
        self._open = ExitStack()
        if is_main:
            self._folder = Path(folder)
            self._folder.mkdir(parents=True, exist_ok=True)
            self._text = self._append("run.log")

    def begin(self, start_step: int, total_steps: int) -> None:
        """Drop the rows of the steps that will be done again, and start the progress bar."""
        if not self.is_main:
            return
        path = self._folder / "metrics.jsonl"
        keep_rows(path, lambda row: row["step"] <= start_step)
        self._metrics = self._append(path.name)
        self._board = SummaryWriter(str(self._folder / "tensorboard"), purge_step=start_step + 1)
        self._open.callback(self._board.close)
        self._progress = self._open.enter_context(_bar(self.console))
        self._task = self._progress.add_task("step", total=total_steps, completed=start_step)

    def _append(self, name: str) -> TextIO:
        return self._open.enter_context((self._folder / name).open("a", encoding="utf-8"))

    def metrics(self, row: dict[str, Any]) -> None:
        """One row of metrics.jsonl; its numbers go to TensorBoard under the same names."""
        if not self.is_main:
            return
        finite = {name: value if math.isfinite(value) else None for name, value in row.items()}  # JSON has no NaN
        self._metrics.write(json.dumps(finite) + "\n")
        self._metrics.flush()
        for name, value in row.items():
            if name != "step":
                self._board.add_scalar(name if "/" in name else f"train/{name}", value, row["step"])

    def advance(self, step: int) -> None:
        if self.is_main:
            self._progress.update(self._task, completed=step)

    def line(self, text: str) -> None:
        if self.is_main:
            self.console.print(text)
            self._text.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
            self._text.flush()

    def close(self) -> None:
        self._open.close()


class Pace:
    """How fast a run goes: for one step, over an interval between two log lines, and in all."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._samples, self._waited, self._seconds = 0, 0.0, 0.0

    def add(self, samples: int, waited: float, seconds: float) -> dict[str, float]:
        """Count one step of `seconds`, of which `waited` went into waiting for data; returns its own rates."""
        self._samples += samples
        self._waited += waited
        self._seconds += seconds
        return {"samples_per_second": samples / seconds, "data_wait_share": waited / seconds}

    def interval(self) -> dict[str, float]:
        """The rates over all steps since the last call."""
        rates = {
            "samples_per_second": self._samples / self._seconds,
            "data_wait_share": self._waited / self._seconds,
        }
        self._samples, self._waited, self._seconds = 0, 0.0, 0.0
        return rates

    def elapsed(self) -> float:
        """Seconds since the beginning, evaluation and checkpoints included."""
        return time.perf_counter() - self._started

    def eta_seconds(self, done: int, total: int) -> float:
        """Seconds to go at the pace so far, after `done` of `total` steps."""
        return self.elapsed() / done * (total - done)


def track(items: Iterable[str], label: str) -> Iterable[str]:
    """The same items, with a progress bar where a person watches."""
    items = list(items)
    with progress_bar(label) as progress:
        for done, item in enumerate(items, 1):
            yield item
            progress(done, len(items))


@contextmanager
def progress_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """A function progress(done, total) that moves a bar on a terminal, and does nothing elsewhere."""
    with _bar(Console(stderr=True)) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def keep_rows(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Drop the rows of a JSONL file that are not wanted, and a last row that a crash cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if keep(row):
            kept.append(line + "\n")
    partial = path.with_name(path.name + ".tmp")
    partial.write_text("".join(kept), encoding="utf-8")
    partial.replace(path)


def memory() -> dict[str, int]:
    """Peak resident memory of this process, and the peak of its GPU where one is used."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    gpu = {"gpu_memory_bytes": torch.cuda.max_memory_allocated()} if torch.cuda.is_initialized() else {}
    return {"memory_bytes": host} | gpu


def duration(seconds: float) -> str:
    """95 -> '1:35', 4000 -> '1:06:40'."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def append_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Add rows to a JSONL file."""
    os.makedirs(path.parent, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
