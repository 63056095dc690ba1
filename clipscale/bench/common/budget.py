"""How often a contestant is timed, and who takes too long to be timed at all.

repeats(0.2, seconds=3, least=3, most=50)          # 15
refusal(140.0, limit_seconds=120)                  # 'skipped: predicted 140 s'
"""

from __future__ import annotations

_ONCE_ABOVE = 2.0  # what takes more than so many times the seconds is timed once


def repeats(turn_seconds: float, *, seconds: float, least: int, most: int) -> int:
    """How many turns of `turn_seconds`, for `seconds` in all."""
    if turn_seconds > _ONCE_ABOVE * seconds:
        return 1
    return min(max(int(seconds / max(turn_seconds, 1e-9)), least), most)


def refusal(predicted_seconds: float | None, limit_seconds: float) -> str:
    """Why a contestant does not run; empty if it does. None: nothing is predicted yet."""
    too_long = predicted_seconds is not None and predicted_seconds > limit_seconds
    return f"skipped: predicted {predicted_seconds:.0f} s" if too_long else ""
