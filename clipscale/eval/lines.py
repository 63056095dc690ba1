"""Text files of a zero-shot evaluation, in which a line's number says something: names, templates, a subset.

read_lines("names.txt", "eval.zeroshot.classnames")         # ["cat", "dog"]
"""

from __future__ import annotations

from pathlib import Path

from clipscale.errors import UserError, require
from clipscale.files import why_unreadable


def read_lines(path: str, setting: str) -> list[str]:
    """Raises UserError as `read_file` and `lines_of`."""
    return lines_of(read_file(path, setting), f"{setting}={path!r}")


def read_file(path: str, setting: str) -> str:
    """Raises UserError for what cannot be read, or is no text in UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{setting}={path!r} cannot be read: {why_unreadable(path, error)}") from error


def lines_of(text: str, what: str) -> list[str]:
    """One a line; an empty one between others is refused, not passed over: the others would change their numbers.

    Raises:
        UserError: such a line, or none at all; `what` is the text's name there.
    """
    lines = [line.strip() for line in text.rstrip().splitlines()]
    require(bool(lines), f"{what} is empty; write one a line")
    require(all(lines), f"{what}: line {lines.index('') + 1 if '' in lines else 0} is empty; take it out")
    return lines
