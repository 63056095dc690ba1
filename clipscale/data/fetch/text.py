"""A small text that lies beside shards: the names of a set's classes, the number of its shards.

read_text("https://host/set/classnames.txt", Fetch())        # "cat\\ndog\\n"; None: there is no such file
read_text("sets/cifar10/classnames.txt", Fetch())            # the same of a file of this machine
"""

from __future__ import annotations

from pathlib import Path

from clipscale.config.data import Fetch
from clipscale.data.fetch.download import Check, Facts, FetchError, download
from clipscale.data.fetch.urls import check_scheme, is_local, masked
from clipscale.errors import UserError
from clipscale.paths import without_file_scheme

MAX_BYTES = 1 << 24


class _Memory:
    """Where `download` puts it."""

    def __init__(self) -> None:
        self.body = bytearray()

    @property
    def written_bytes(self) -> int:
        return len(self.body)

    def restart(self) -> None:
        self.body.clear()

    def reserve(self, total_bytes: int) -> None:
        if total_bytes > MAX_BYTES:
            raise FetchError(f"{total_bytes:,} bytes are no small text")

    def write(self, block: bytes) -> None:
        self.body += block
        self.reserve(self.written_bytes)

    def facts(self) -> Facts:
        return {"bytes": self.written_bytes}

    def look_over(self, check: Check, vouched: bool) -> str:
        return ""


def read_text(place: str, fetch: Fetch, allow_pipe: bool = False) -> str | None:
    """Raises UserError for what cannot be read, or is no text in UTF-8."""
    try:
        if is_local(place):
            return Path(without_file_scheme(place)).read_text(encoding="utf-8-sig")
        check_scheme(place, allow_pipe)
        text = _Memory()
        download(place, text, fetch)
        return text.body.decode("utf-8-sig")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError) as error:
        if isinstance(error, FetchError) and error.missing:
            return None
        raise UserError(f"{masked(place)!r} cannot be read: {masked(str(error))}") from error
