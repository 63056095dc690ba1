"""clipscale/pool.py: order, bounds, and how the work ends."""

from __future__ import annotations

import copy
import math
import multiprocessing
import os
import signal
import subprocess
import sys

import pytest
from processes import alive, wait_until

from clipscale.pool import WorkerDied, map_in_processes


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


@pytest.mark.parametrize(
    ("code", "how"),
    [
        ("__import__('os')._exit(3)", r"ended with status 3: its own message"),
        (
            "__import__('os').kill(__import__('os').getpid(), 9)",
            r"was killed by SIGKILL: most often for want of memory",
        ),
    ],
)
def test_a_dead_process_is_an_error_and_not_a_hang(code, how):
    with pytest.raises(WorkerDied, match=rf"worker process \d+ {how}") as died:
        list(map_in_processes(eval, ["1", code, "2"], 2))
    assert died.value.item == code


def test_the_main_program_is_not_run_again(tmp_path):
    (tmp_path / "main.py").write_text("""
import math
from clipscale.pool import map_in_processes
print(sum(map_in_processes(math.sqrt, [4, 9], 2)))
""")  # without if __name__ == "__main__"
    done = subprocess.run([sys.executable, tmp_path / "main.py"], capture_output=True, text=True, timeout=300)
    assert (done.stdout, done.stderr, done.returncode) == ("5.0\n", "", 0)


CLEARS_UP = """
import os, sys, time
from contextlib import closing, nullcontext
from clipscale.pool import map_in_processes
WORK = '''
import os, time
try:
    open(f"{folder}/{os.getpid()}.begun", "w").close()
    time.sleep(60)
finally:
    time.sleep(0.2)
    open(f"{folder}/{os.getpid()}.cleared", "w").close()
'''
results = map_in_processes(exec, ["pass"] + [WORK] * 4, 2, {"folder": sys.argv[1]})
next(results)
while len(os.listdir(sys.argv[1])) < 2:
    time.sleep(0.01)
with closing(results) if sys.argv[2] != "program's end" else nullcontext():
    print("at work", flush=True)
    if sys.argv[2] == "exception":
        1 / 0
    if sys.argv[2] in ("killed", "Ctrl-C"):
        next(results)
"""


@pytest.mark.parametrize("ends", ["killed", "Ctrl-C", "exception", "program's end", "close"])
def test_processes_clear_up_and_end_with_their_caller(tmp_path, ends):
    caller = subprocess.Popen(
        [sys.executable, "-c", CLEARS_UP, tmp_path, ends],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert caller.stdout.readline() == "at work\n"
    if ends == "killed":
        caller.kill()
    elif ends == "Ctrl-C":
        os.killpg(caller.pid, signal.SIGINT)  # as a terminal does
    error = caller.communicate(timeout=300)[1]
    assert error.count("Traceback") == (ends in ("Ctrl-C", "exception"))  # the caller's, and no other
    begun = {path.stem for path in tmp_path.glob("*.begun")}
    wait_until(lambda: not any(alive(int(pid)) for pid in begun))
    assert len(begun) == 2
    if ends != "program's end":  # multiprocessing's own, by SIGTERM
        assert {path.stem for path in tmp_path.glob("*.cleared")} == begun


DEAF = """
import time
while True:
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        pass
"""


@pytest.mark.parametrize("code", [DEAF, "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)"])
def test_a_process_that_does_not_end_by_itself_is_killed(code):
    results = map_in_processes(exec, ["pass", code, code], 2)
    next(results)
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    results.close()
    assert not any(alive(worker.pid) for worker in workers)


def test_signals_to_the_callers_group_do_not_reach_them():
    code = """
import os, signal, time
from clipscale.pool import map_in_processes
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
    signal.signal(number, lambda *_: None)
results = map_in_processes(eval, ["__import__('time').sleep(0.05) or __import__('os').getpid()"] * 40, 2)
pids = {next(results)}
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
    os.killpg(0, number)
    pids |= {next(results) for _ in range(4)}
print(len(pids | set(results)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, start_new_session=True
    )
    assert (done.stdout, done.stderr, done.returncode) == ("2\n", "", 0)


def test_nor_while_the_first_of_them_begins(tmp_path):
    """The fork server imports the function's module: signals come right then, before there is any process."""
    (tmp_path / "early.py").write_text("""
import os, signal
if os.getpid() != int(os.environ["CALLER"]):
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        os.killpg(0, number)
def double(number):
    return 2 * number
""")
    code = """
import os, signal
os.environ["CALLER"] = str(os.getpid())
from early import double
from clipscale.pool import map_in_processes
came = []
for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
    signal.signal(number, lambda number, _: came.append(number))
print(sum(map_in_processes(double, [1, 2, 3], 2)), len(came))
"""
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        start_new_session=True,
    )
    assert (done.stdout, done.stderr, done.returncode) == ("12 3\n", "", 0)
