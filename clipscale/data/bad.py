"""Why a sample that indexing took, or a file declared, cannot be used after all: its slot is masked, counted and listed
by the cause."""

from __future__ import annotations

MASK_CAUSES = (
    "cannot be read",
    "not JPEG, PNG or WebP",
    "broken picture",
    "too many pixels",
    "caption is not UTF-8",
    "caption cannot be used",
    "fewer than declared",
)


class BadSample(Exception):
    """This sample is left out of its batch. `cause` is one of MASK_CAUSES."""

    def __init__(self, cause: str, detail: str = "") -> None:
        assert cause in MASK_CAUSES or isinstance(self, RefusedSample)
        super().__init__(f"{cause}: {detail}" if detail else cause)
        self.cause = cause


class RefusedSample(BadSample):
    """It was declared, and indexing its shard left it out: `cause` is the cause there (shard/judge.py)."""
