"""Progress bars where a person watches, and durations in words.

for shard in track(shards, "indexing train"): ...
with progress_bar("drawing") as progress: progress(done=3, total=8)
duration(4000), time_left(4000)                              # '1:06:40', '1h06m'
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from clipscale.escape import escaped


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
    with bar_on(Console(stderr=True), TimeRemainingColumn()) as bar:
        task = bar.add_task(escaped(label), total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def bar_on(console: Console, remaining: ProgressColumn) -> Progress:
    """A bar, not yet shown. `remaining`: the column that says how long it will take."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        remaining,
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def duration(seconds: float) -> str:
    """95 -> '1:35', 4000 -> '1:06:40'."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def time_left(seconds: float) -> str:
    """Two units of it, which is as much as an estimate knows: 95 -> '1:35', 4000 -> '1h06m', 100_000 -> '1d03h'."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02}h"
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}:{rest:02}"
