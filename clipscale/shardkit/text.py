"""Text of unknown origin, made fit for files and terminals.

printable(os.fsdecode(b"caf\\xe9.jpg"))        # 'caf\\\\udce9.jpg': UTF-8 can hold it
shown("two\\nlines", limit=100)               # 'two\\\\nlines'
"""


def printable(text: str) -> str:
    """Text that UTF-8 can hold: odd bytes of a path as backslash escapes."""
    return text.encode("utf-8", errors="backslashreplace").decode("utf-8")


def shown(text: str, limit: int) -> str:
    """For a terminal: one line, cut, control characters as escapes."""
    cut = text if len(text) <= limit else text[: limit - 3] + "..."
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in cut)
