"""s3, gs, gcs and hf: objects, read range by range through fsspec's clients.

    body = open_body("s3://bucket/x-00.tar", start=0, version=None, stall_seconds=30.0)      # see `streams.open_body`

Credentials and endpoints are what the clients read from the environment and their own files.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import fsspec

from clipscale.data.fetch.streams import Body, Seen

_RANGE_BYTES = 2**22  # of one request: none of it is seen before all of it is there
_ETAGS = ("ETag", "etag", "md5Hash", "blob_id", "LastModified", "last_modified", "updated", "mtime", "created")


def open_body(url: str, start: int, version: str | None, stall_seconds: float) -> Body:
    files, path, info = _info(url)
    now = repr(sorted((key, repr(value)) for key, value in info.items()))
    start = start if now == version else 0

    def blocks() -> Iterator[bytes]:
        with files.open(path, "rb", block_size=_RANGE_BYTES, cache_type="none") as file:
            file.seek(start)
            while block := file.read(_RANGE_BYTES):
                yield block

    return Body(start, info.get("size"), now, blocks(), etag=_etag(info), said="an object")


def look(url: str, etag: str | None, stall_seconds: float) -> Seen:
    """By the object's metadata."""
    _, _, info = _info(url)
    return Seen(_etag(info), info.get("size"))


def _info(url: str) -> tuple[fsspec.AbstractFileSystem, str, dict[str, Any]]:
    files, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
    info = files.info(path)
    if info.get("type") == "directory":
        raise IsADirectoryError("a folder")
    return files, path, info


def _etag(info: dict[str, Any]) -> str | None:
    """The first that the client tells of what changes with the content: a hash, else a time."""
    return next((f"{name}: {info[name]}" for name in _ETAGS if info.get(name)), None)
