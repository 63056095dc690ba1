"""CPU time and memory of this process and every process below it: what a loader costs, wherever it does its work.

    before = cpu_seconds()
    work()
    cpu_seconds() - before          # of all threads of this process and of its descendants, to the nanosecond
    settle()                        # waits until none of them works any more
    memory(pid).resident_bytes
    held_bytes()                    # of the whole tree

Counted: the process CPU clocks (user and system) of this process and of all living descendants, which have the threads
that ended in them, and what descendants had used that ended and were waited for. Not counted: the kernel's own threads
and a process that left the tree because its parent ended first. Linux only, by /proc.
"""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path
from typing import NamedTuple

_TICK_SECONDS = 1 / os.sysconf("SC_CLK_TCK")
_IDLE_SHARE = 0.03  # of one core
_CHILDREN_CPU_FIELDS = slice(13, 15)  # cutime, cstime of /proc/<pid>/stat, counted from the state behind the name


class Memory(NamedTuple):
    """Of one process. Shared pages count fully as resident, and by their share in `proportional_bytes`."""

    resident_bytes: int
    proportional_bytes: int
    private_bytes: int  # anonymous: heap and stacks, no files and no shared memory


def cpu_seconds() -> float:
    """CPU time that this process and its descendants have used so far; never falls."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + ended.ru_utime + ended.ru_stime + sum(map(_cpu_seconds_of, descendants()))


def descendants(pid: int | None = None) -> list[int]:
    """Process numbers of the children, their children, and so on, of a process; by default of this one."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (stat := _stat(int(entry))):
            children.setdefault(int(stat[1]), []).append(int(entry))
    found = [os.getpid() if pid is None else pid]
    for parent in found:  # grows while it is walked
        found += children.get(parent, [])
    return found[1:]


def settle(limit_seconds: float = 60.0) -> None:
    """Wait until a quarter of a second passes in which the tree uses next to no CPU, or the limit has."""
    end = time.monotonic() + limit_seconds
    while time.monotonic() < end:
        before = cpu_seconds()
        time.sleep(0.25)
        if cpu_seconds() - before < 0.25 * _IDLE_SHARE:
            return


def memory(pid: int) -> Memory:
    """Of a living process of this user."""
    sizes = _rollup(pid)
    return Memory(sizes["Rss"], sizes["Pss"], sizes["Anonymous"])


def held_bytes() -> int:
    """Anonymous and shared memory of this process and its descendants together, each page once: heaps, stacks and
    memory files, without the files that programs are read from."""
    kinds = ("Pss_Anon", "Pss_Shmem")
    return sum(sizes[kind] for pid in (os.getpid(), *descendants()) if (sizes := _rollup(pid)) for kind in kinds)


def _rollup(pid: int) -> dict[str, int]:
    """/proc/<pid>/smaps_rollup, in bytes; empty when the process is gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return {}
    return {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}


def _cpu_seconds_of(pid: int) -> float:
    """The process's clock (its number is made as clock_getcpuclockid does) and its own ended children's; 0: gone."""
    try:
        seconds = time.clock_gettime(~pid << 3 | 2)
    except OSError:
        return 0.0
    stat = _stat(pid)
    return seconds + sum(map(int, stat[_CHILDREN_CPU_FIELDS])) * _TICK_SECONDS if stat else seconds


def _stat(pid: int) -> list[str]:
    """/proc/<pid>/stat from the state on (state, parent, ...); empty when the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
