"""What a person can mend, told in one line that holds the value, the rule and the fix."""

from __future__ import annotations


class UserError(ValueError):
    """Something the person who runs clipscale can mend: shown as one line, without a traceback."""


class SharedError(UserError):
    """Raised on every rank alike, so that telling it once is enough."""


def require(condition: bool, message: str) -> None:
    """Raise `UserError(message)` unless `condition` holds."""
    if not condition:
        raise UserError(message)
