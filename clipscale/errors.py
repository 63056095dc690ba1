"""What a person can mend, told in one line that holds the value, the rule and the fix."""

from __future__ import annotations


class UserError(ValueError):
    """Something the person who runs clipscale can mend: shown as one line, without a traceback."""


class SharedError(UserError):
    """Raised on every rank alike, so that telling it once is enough."""


class RestartError(RuntimeError):
    """What a restart may heal (a lost peer, a dead loader, a hang): shown as one line, exit status RESTART."""


class Interrupted(BaseException):
    """A run was told to leave, and has: no error, and nobody's to catch on the way.

    Args:
        why: the signal's name, or what else it was.
        left: one line: what was saved, and how to go on. "" before there was anything to save.
    """

    def __init__(self, why: str, left: str = "") -> None:
        super().__init__(why)
        self.why, self.left = why, left


RESTART, INTERRUPTED = 70, 75
"""Exit statuses: a restart may heal it; told to stop, saved, and goes on when started again. (2: `UserError`.)"""


def reason(error: Exception) -> str:
    """What an error says, in words: the system's own with the file it is about, and without its number."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    return str(error) if isinstance(error, UserError | RestartError | OSError) else f"{type(error).__name__}: {error}"


def require(condition: bool, message: str) -> None:
    """Raise `UserError(message)` unless `condition` holds."""
    if not condition:
        raise UserError(message)
