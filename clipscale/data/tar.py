"""Where the members of a tar lie, from its raw headers: nothing is unpacked, decompressed or skipped in silence.

    with mapped("shard-0000.tar") as tar:
        listing = list_members(tar)
        listing.members[0]        # Member(name='000000.jpg', offset=512, size=40123)
        listing.cut               # '' or why the archive ends early: 'cut short at byte 81920, inside 000007.jpg'

ustar, GNU long names ('L') and pax paths ('x') are read; directories, links and devices are passed over, as webdataset
does. A bad header ends the listing, for what follows it cannot be trusted; so does a sparse member (a 1.5 KB archive
could claim 3 GiB). Bytes after the end marker are reported: two archives in one file, or a hole full of zeros.
Format: POSIX.1-1988 ustar and pax (https://pubs.opengroup.org/onlinepubs/9699919799/utilities/pax.html).
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

_BLOCK = 512
_MAX_METADATA_BYTES = 1 << 16
_MAX_PADDING_BYTES = 1 << 20  # zeros after the end marker; GNU tar pads to 10 KiB, and to 1 MiB where it is asked to


class Member(NamedTuple):
    name: str
    offset: int  # of the first data byte
    size: int  # bytes


@dataclass
class Listing:
    members: list[Member] = field(default_factory=list)
    cut: str = ""  # empty: the end-of-archive marker was there


class _Damaged(Exception):
    """The archive cannot be followed further; the message says where and why."""


@contextmanager
def mapped(path: str) -> Iterator[bytes | mmap.mmap]:
    """The file's bytes, mapped read-only (an empty file gives b'')."""
    with open(path, "rb") as file:
        file.seek(0, 2)
        if file.tell() == 0:
            yield b""
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            yield view


def list_members(tar: bytes | mmap.mmap) -> Listing:
    """Every regular member of an uncompressed tar, in its order, up to the end marker or the first damage."""
    listing = Listing()
    try:
        for member in _walk(tar):
            listing.members.append(member)
    except _Damaged as damage:
        listing.cut = str(damage)
    return listing


def _walk(tar: bytes | mmap.mmap) -> Iterator[Member]:
    position, long_name, pax_size = 0, None, None
    if tar[:2] == b"\x1f\x8b":
        raise _Damaged("gzip-compressed; shards must be plain tars (gunzip them: JPEGs do not shrink)")
    while True:
        header = tar[position : position + _BLOCK]
        if len(header) < _BLOCK:
            raise _Damaged(f"cut short at byte {len(tar)}: no end-of-archive marker")
        if header == bytes(_BLOCK):
            padding = tar[position : position + _MAX_PADDING_BYTES + 1]
            if len(padding) > _MAX_PADDING_BYTES or padding.strip(b"\0"):
                raise _Damaged(f"{len(tar) - position} bytes follow the end-of-archive marker at byte {position}")
            return
        kind, size = header[156:157], _header_size(header, position)
        start = position + _BLOCK
        if kind in b"LxgK":
            if size > _MAX_METADATA_BYTES:
                raise _Damaged(f"{size} bytes of metadata at byte {position}")
            data = tar[start : start + size]
            if kind == b"L":
                long_name = _text(data.split(b"\0")[0])
            elif kind == b"x":
                records = _pax_records(data, position)
                long_name = records.get("path", long_name)
                pax_size = int(records["size"]) if "size" in records else None
        elif kind == b"S":
            raise _sparse(position)
        elif kind in b"123456":  # links, devices, folders: no data, whatever the size field says
            size, long_name, pax_size = 0, None, None
        else:
            name, size = long_name or _header_name(header), size if pax_size is None else pax_size
            long_name = pax_size = None
            if start + size > len(tar):
                raise _Damaged(f"cut short at byte {len(tar)}, inside {name}")
            if kind in (b"0", b"\0", b"7"):
                yield Member(name, start, size)
        position = start + -(-size // _BLOCK) * _BLOCK


def _header_size(header: bytes, position: int) -> int:
    """The size field, once the header's checksum holds."""
    try:
        stored = int(header[148:156].split(b"\0")[0].strip() or b"0", 8)
        if stored != sum(header[:148]) + sum(header[156:]) + 8 * 32:
            raise _Damaged(f"bad tar header at byte {position}: checksum does not match")
        field_bytes = header[124:136]
        if field_bytes[0] & 0x80:  # GNU base-256 for 8 GiB and above
            return int.from_bytes(field_bytes[1:], "big")
        size = int(field_bytes.split(b"\0")[0].strip() or b"0", 8)
        if size < 0:
            raise ValueError(f"a size of {size}")
        return size
    except ValueError as error:
        raise _Damaged(f"bad tar header at byte {position}: {error}") from error


def _header_name(header: bytes) -> str:
    name = header[:100].split(b"\0")[0]
    if header[257:263] == b"ustar\0" and (prefix := header[345:500].split(b"\0")[0]):
        name = prefix + b"/" + name
    return _text(name)


def _pax_records(data: bytes, position: int) -> dict[str, str]:
    records = {}
    try:
        while data:
            length = int(data.split(b" ", 1)[0])
            if length <= 0:
                raise ValueError(f"a record of {length} bytes")
            key, _, value = data[:length].split(b" ", 1)[1].removesuffix(b"\n").partition(b"=")
            records[key.decode()] = _text(value)
            data = data[length:]
        if int(records.get("size", 0)) < 0:
            raise ValueError(f"a size of {records['size']}")
    except (ValueError, IndexError) as error:
        raise _Damaged(f"bad pax header at byte {position}: {error}") from error
    if any(key.startswith("GNU.sparse") for key in records):
        raise _sparse(position)
    return records


def _sparse(position: int) -> _Damaged:
    return _Damaged(f"sparse member at byte {position}: shards must hold plain files")


def _text(name: bytes) -> str:
    """Names that are no UTF-8 stay apart and printable: b'caf\\xe9' -> 'caf\\\\xe9'."""
    return name.decode("utf-8", "backslashreplace")
