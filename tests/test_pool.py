"""clipscale/data/pool.py: order, bounds, and how the work ends."""

from __future__ import annotations

import copy
import math
import os
import signal
import subprocess
import sys
import time

import pytest

from clipscale.data.pool import map_in_processes
from clipscale.errors import UserError


@pytest.mark.parametrize("jobs", [1, 3])
def test_results_come_in_the_order_of_the_items(jobs):
    assert list(map_in_processes(math.pow, range(200), jobs, 2)) == [i**2 for i in range(200)]
    assert list(map_in_processes(math.pow, [], jobs, 2)) == []


def test_items_and_results_larger_than_a_pipe_holds():
    big = [bytes([i]) * 3_000_000 for i in range(9)]
    assert list(map_in_processes(copy.copy, big, 2)) == big


def test_items_are_taken_only_a_little_ahead():
    taken = []

    def items():
        for i in range(10_000):
            taken.append(i)
            yield i

    results = map_in_processes(math.sqrt, items(), 2)
    assert next(results) == 0
    assert len(taken) <= 32
    results.close()


def test_an_exception_is_raised_here():
    with pytest.raises(ValueError, match=r"math domain|nonnegative"):
        list(map_in_processes(math.sqrt, [4, -1, 9], 2))


def test_a_dead_process_is_an_error_and_not_a_hang():
    with pytest.raises(UserError, match=r"worker process \d+ died with exit code 3"):
        list(map_in_processes(os._exit, [3], 2))


def test_the_main_program_is_not_run_again(tmp_path):
    (tmp_path / "main.py").write_text("""
import math
from clipscale.data.pool import map_in_processes
print(sum(map_in_processes(math.sqrt, [4, 9], 2)))
""")  # without if __name__ == "__main__"
    done = subprocess.run([sys.executable, tmp_path / "main.py"], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr, done.returncode) == ("5.0\n", "", 0)


def test_processes_end_when_their_caller_is_killed(tmp_path):
    code = """
import os, time
from clipscale.data.pool import map_in_processes
pids = map_in_processes(eval, ["__import__('os').getpid()"] * 8 + ["__import__('time').sleep(60)"] * 4, 2)
print(*{next(pids) for _ in range(8)}, flush=True)
next(pids)
"""
    caller = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    workers = [int(pid) for pid in caller.stdout.readline().split()]
    assert workers
    caller.send_signal(signal.SIGKILL)
    caller.wait()
    deadline = time.monotonic() + 20
    while any(map(alive, workers)):
        assert time.monotonic() < deadline, f"{workers} still run"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
