"""What the system says about processes, for the tests."""

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
