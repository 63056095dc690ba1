r"""Text of unknown origin (keys, captions, paths, what a server says), made fit for terminals, logs and files.

escaped("two\nlines \x1b[2J")                # 'two\\nlines \\x1b[2J': one line, and no terminal obeys it
shown("two\nlines", limit=8)                # 'two\\nl...'
one_line(error)                             # of an error: its lines in a row, cut
printable(os.fsdecode(b"caf\xe9.jpg"))      # 'caf\\udce9.jpg': UTF-8 can hold it, control characters stay

What is told (clipscale/tell.py), an error of the command line, bars and tables go through `escaped`; files of JSON keep
a key exactly as it is.
"""

from __future__ import annotations

import re

from clipscale.errors import reason

# C0, DEL and C1; line and paragraph separators and the marks that turn the direction of text; half surrogate pairs,
# as which Python has the bytes of a path that are no UTF-8.
_UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_ERROR_CHARACTERS = 2000


def escaped(text: str) -> str:
    r"""One line that UTF-8 can hold and a terminal only shows: control characters as \n, \x1b, \u202e, \udce9."""
    return _UNSAFE.sub(lambda sign: sign[0].encode("unicode_escape").decode(), text)


def shown(text: str, limit: int) -> str:
    """`escaped`, and cut before."""
    return escaped(text if len(text) <= limit else text[: limit - 3] + "...")


def one_line(error: Exception) -> str:
    """Its message for a person. Libraries' messages have lines of their own: they are joined."""
    words = " ".join(reason(error).split())
    return shown(words, _ERROR_CHARACTERS)


def printable(text: str) -> str:
    """Text that UTF-8 can hold: odd bytes of a path as backslash escapes."""
    return text.encode("utf-8", errors="backslashreplace").decode("utf-8")
