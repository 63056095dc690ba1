"""What several formats need."""

from __future__ import annotations

from clipscale.errors import UserError


def refused(what: str, why: str) -> UserError:
    return UserError(f"this model cannot be exported to {what}: {why}; --format open_clip holds every model")
