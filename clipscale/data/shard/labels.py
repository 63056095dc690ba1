"""The label of a picture: the decimal number in a sample's .cls member.

label_of(b"17\\n")        # 17
label_of(b"1_7")         # LabelError: label is not a number
"""

from __future__ import annotations

MAX_LABEL_BYTES = 64
TOO_LARGE = "label above 64 bytes"


class LabelError(Exception):
    """The message is the cause."""


def label_of(note: bytes) -> int:
    """The number that ASCII digits spell, with or without ASCII blanks around them.

    Raises:
        LabelError: anything else (a sign, an underscore, a digit of another script), or above MAX_LABEL_BYTES.
    """
    if len(note) > MAX_LABEL_BYTES:
        raise LabelError(TOO_LARGE)
    if not note.strip().isdigit():  # of bytes, both know ASCII only
        raise LabelError("label is not a number")
    return int(note)
