"""What the system says about processes, and waiting for it, for the tests."""

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


def alive(pid: int) -> bool:
    """Not gone, and not a zombie either."""
    try:
        return _facts(pid)[0] != "Z"
    except FileNotFoundError:
        return False


def parent(pid: int) -> int:
    return int(_facts(pid)[1])


def _facts(pid: int) -> list[str]:
    """Those that follow the name."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def wait_until(condition: Callable[[], object], seconds: float = 240.0) -> None:
    """Returns as soon as `condition()` holds; what takes longer than a busy machine may need is a hang."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not so after {seconds} s"
        with suppress(InterruptedError):
            time.sleep(0.01)
