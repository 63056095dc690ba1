"""Where the members of a tar lie, from its raw headers: nothing is unpacked, decompressed or skipped in silence.

    with mapped("shard-0000.tar") as tar:
        listing = list_members(tar)
        listing.members[0]        # Member(name='000000.jpg', offset=512, size=40123)
        listing.cut               # '' or why the archive ends early: 'cut short at byte 81920, inside 000007.jpg'

ustar, GNU long names ('L') and pax paths ('x') are read; directories, links and devices are passed over, as webdataset
does, and the last two noted. A bad header ends the listing, for what follows it cannot be trusted; so does a sparse
member (a 1.5 KB archive could claim 3 GiB). Bytes after the end marker are reported: two archives in one file, or a
hole full of zeros. So are zeros beyond a writer's padding (tar_end.py): a file laid out in full and never filled.
Format: POSIX.1-1988 ustar and pax (https://pubs.opengroup.org/onlinepubs/9699919799/utilities/pax.html).

Two passes, for speed: the first follows the sizes from header to header, the second checks the sums of all headers and
takes their names, many at a time. What the first pass found behind a header with a bad sum is dropped.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from clipscale.data.shard.tar_end import why_no_end, zeros_until

_BLOCK = 512
_AT_ONCE = 4096  # headers checked together: 2 MiB of them
_MAX_METADATA_BYTES = 1 << 16
_ZEROS_AT_END = 16  # as many at the end of a member, before a hole: the hole begins inside it
_FILES = b"0\x007"  # kinds of a regular file
_SIZED = b"0\x007xL"  # kinds of header whose size field is taken before their sum is checked
_ONLY_TIME = re.compile(rb"(\d+) mtime=\d+(?:\.\d+)?\n")  # the pax header that Python's tarfile writes most


class Member(NamedTuple):
    name: str
    offset: int  # of the first data byte
    size: int  # bytes


@dataclass
class Listing:
    """The regular members, one entry of each list for each, in the order of the archive."""

    names: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)  # of the first data byte
    sizes: list[int] = field(default_factory=list)  # bytes
    passed: list[int] = field(default_factory=list)  # where links and devices would have their first data byte
    cut: str = ""  # empty: the end-of-archive marker was there

    @property
    def members(self) -> list[Member]:
        return [Member(*facts) for facts in zip(self.names, self.offsets, self.sizes, strict=True)]

    @property
    def end(self) -> int:
        """Where the last member's blocks end: what lies behind it in an archive that is cut was not read."""
        return -(-(self.offsets[-1] + self.sizes[-1]) // _BLOCK) * _BLOCK if self.offsets else 0

    def data(self, tar: bytes | mmap.mmap, member: int) -> bytes:
        """What the member of this number holds. `tar`: the archive that was listed."""
        return tar[self.offsets[member] : self.offsets[member] + self.sizes[member]]


class _Damaged(Exception):
    """The archive cannot be followed further; the message says where and why."""


@contextmanager
def mapped(file: str | int) -> Iterator[bytes | mmap.mmap]:
    """The bytes of a file (its path or descriptor), mapped read-only; an empty file gives b''."""
    with open(file, "rb", closefd=isinstance(file, str)) as opened:
        opened.seek(0, 2)
        # Unmapped with its last reference: closing it here would fail where an error still holds a view of it.
        yield mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) if opened.tell() else b""


def list_members(tar: bytes | mmap.mmap) -> Listing:
    """Every regular member of an uncompressed tar, in its order, up to the end marker or the first damage."""
    listing = Listing()
    heads: list[int] = []
    long_names: dict[int, str] = {}
    try:
        _follow(tar, heads, listing, long_names)
    except _Damaged as damage:
        listing.cut = str(damage)
    bad = _first_bad_sum(tar, heads)
    if bad is not None:
        listing.cut = f"bad tar header at byte {bad}: checksum does not match"
        whole = int(np.searchsorted(listing.offsets, bad + _BLOCK))
        del listing.offsets[whole:], listing.sizes[whole:]
        del listing.passed[int(np.searchsorted(listing.passed, bad + _BLOCK)) :]
    for start in range(0, len(listing.offsets), _AT_ONCE):
        listing.names += _names(tar, listing.offsets[start : start + _AT_ONCE])
    for number, name in long_names.items():
        if number < len(listing.names):
            listing.names[number] = name
    return listing


def _follow(tar: bytes | mmap.mmap, heads: list[int], listing: Listing, long_names: dict[int, str]) -> None:
    """From header to header by their sizes; fills `heads` (all headers seen), offsets, sizes, and long names by member.

    The sum of a plain header is not looked at: that is the second pass's part.
    """
    position, end, long_name, pax_size = 0, len(tar), None, None
    offsets, sizes = listing.offsets, listing.sizes
    if tar[:2] == b"\x1f\x8b":
        raise _Damaged("gzip-compressed; shards must be plain tars (gunzip them: JPEGs do not shrink)")
    while True:
        start = position + _BLOCK
        if start > end:
            raise _Damaged(f"cut short at byte {end}: no end-of-archive marker")
        facts = tar[position + 124 : position + 157]  # the size, ..., the kind
        kind = facts[32:]
        try:
            size = int(facts[:11], 8) if kind in _SIZED and facts[11] in b"\0 " else -1
        except ValueError:
            size = -1
        if size < 0:
            header = tar[position:start]
            if header == bytes(_BLOCK):
                _check_end(tar, position, heads, listing, long_names)
                return
            size = _header_size(header, position)
        heads.append(position)
        if kind in _FILES:
            size = size if pax_size is None else pax_size
            if start + size > end:
                raise _Damaged(f"cut short at byte {end}, inside {long_name or _header_name(tar[position:start])}")
            if long_name:
                long_names[len(offsets)] = long_name
            offsets.append(start)
            sizes.append(size)
            long_name = pax_size = None
        elif kind in b"LxgK":
            if size > _MAX_METADATA_BYTES:
                raise _Damaged(f"{size} bytes of metadata at byte {position}")
            data = tar[start : start + size]
            if kind == b"L":
                long_name = _text(data.split(b"\0")[0])
            elif kind == b"x" and not _tells_only_the_time(data):
                records = _pax_records(data, position)
                long_name = records["path"].rstrip("/") if "path" in records else long_name  # as tarfile has it
                pax_size = int(records["size"]) if "size" in records else None
        elif kind == b"S":
            raise _sparse(position)
        else:
            if kind in b"123456":  # links, devices, folders: no data, whatever the size field says
                size = 0
                if kind != b"5":
                    listing.passed.append(start)
            elif start + size > end:
                raise _Damaged(f"cut short at byte {end}, inside {long_name or _header_name(tar[position:start])}")
            long_name = pax_size = None
        position = start + (size + _BLOCK - 1) // _BLOCK * _BLOCK


def _check_end(
    tar: bytes | mmap.mmap, position: int, heads: list[int], listing: Listing, long_names: dict[int, str]
) -> None:
    """Nothing but padding lies behind the block of zeros at `position`.

    Where zeros were never filled, a last member that ends in zeros is no longer whole: it is dropped.
    """
    end = zeros_until(tar, position)
    if end < len(tar):
        raise _Damaged(f"{len(tar) - position} bytes follow the end-of-archive marker at byte {position}")
    last = heads[-1] if heads else None
    header = b"" if last is None else tar[last : last + _BLOCK]
    why = why_no_end(position, end, header)
    if not why:
        return
    inside, member = "", len(listing.offsets) - 1
    if member >= 0 and listing.offsets[-1] - _BLOCK == last:
        data = listing.data(tar, member)
        if data and not data[-_ZEROS_AT_END:].strip(b"\0"):
            inside = f", inside {long_names.pop(member, '') or _header_name(header)}"
            position = listing.offsets.pop() + len(data.rstrip(b"\0"))
            listing.sizes.pop()
    raise _Damaged(f"cut short at byte {position}{inside}: {end - position} bytes follow, all zeros: {why}")


def _first_bad_sum(tar: bytes | mmap.mmap, heads: list[int]) -> int | None:
    """Where the first header lies whose bytes do not add up to its checksum."""
    for start in range(0, len(heads), _AT_ONCE):
        places = heads[start : start + _AT_ONCE]
        headers = _headers(tar, places)
        words = headers.view(np.uint64)
        low = np.uint64(0x00FF00FF00FF00FF)  # pairs of bytes are added in lanes of 16 bits: at most 128 * 255 each
        lanes = (words & low).sum(1) + ((words >> np.uint64(8)) & low).sum(1)
        total = sum((lanes >> np.uint64(shift)) & np.uint64(0xFFFF) for shift in (0, 16, 32, 48)).astype(np.int64)
        stored = headers[:, 148:156]
        total += 8 * 32 - stored.sum(1, dtype=np.int64)
        digits = stored[:, :6].astype(np.int64) - ord("0")
        usual = ((digits >= 0) & (digits < 8)).all(1) & ((stored[:, 6:] == 0) | (stored[:, 6:] == ord(" "))).all(1)
        right = usual & (digits @ (8 ** np.arange(5, -1, -1)) == total)
        for i in np.flatnonzero(~right):
            if _stored_sum(headers[i].tobytes()) != total[i]:
                return places[i]
    return None


def passed_member(tar: bytes | mmap.mmap, offset: int) -> tuple[str, str]:
    """The name, as far as the header itself has it, and the kind of a member of `Listing.passed`."""
    header = tar[offset - _BLOCK : offset]
    return _header_name(header), "link" if header[156:157] in b"12" else "device"


def _names(tar: bytes | mmap.mmap, offsets: list[int]) -> list[str]:
    """The names in the headers of the members at `offsets`."""
    headers = _headers(tar, [offset - _BLOCK for offset in offsets])
    prefixed = (headers[:, 257:263] == np.frombuffer(b"ustar\0", np.uint8)).all(1) & (headers[:, 345] != 0)
    short = np.ascontiguousarray(headers[:, :100]).view("S100")[:, 0].tolist()
    try:
        names = b"\0".join(short).decode().split("\0")
    except UnicodeDecodeError:
        names = []
    if len(names) != len(short):  # bytes behind a name's end, or names that are no UTF-8
        names = [_text(name.split(b"\0")[0]) for name in short]
    for i in np.flatnonzero(prefixed):
        names[i] = _header_name(headers[i].tobytes())
    return names


def _headers(tar: bytes | mmap.mmap, places: list[int]) -> np.ndarray:
    """Copies of the headers at `places`, uint8 [n, 512]."""
    blocks = np.frombuffer(tar, np.uint8, len(tar) // _BLOCK * _BLOCK).reshape(-1, _BLOCK)
    return blocks[np.array(places, np.int64) // _BLOCK]


def _stored_sum(header: bytes) -> int:
    """The header's checksum as it is written there; -1 where that is no number."""
    try:
        return int(header[148:156].split(b"\0")[0].strip() or b"0", 8)
    except ValueError:
        return -1


def _header_size(header: bytes, position: int) -> int:
    """The size field, once the header's checksum holds."""
    if _stored_sum(header) != sum(header[:148]) + sum(header[156:]) + 8 * 32:
        raise _Damaged(f"bad tar header at byte {position}: checksum does not match")
    field_bytes = header[124:136]
    if field_bytes[0] & 0x80:  # GNU base-256 for 8 GiB and above
        return int.from_bytes(field_bytes[1:], "big")
    try:
        size = int(field_bytes.split(b"\0")[0].strip() or b"0", 8)
        if size < 0:
            raise ValueError(f"a size of {size}")
    except ValueError as error:
        raise _Damaged(f"bad tar header at byte {position}: {error}") from error
    return size


def _header_name(header: bytes) -> str:
    name = header[:100].split(b"\0")[0]
    if header[257:263] == b"ustar\0" and (prefix := header[345:500].split(b"\0")[0]):
        name = prefix + b"/" + name
    return _text(name)


def _tells_only_the_time(data: bytes) -> bool:
    """Whether this pax header is one whole record that changes neither a name nor a size."""
    record = _ONLY_TIME.fullmatch(data)
    return record is not None and record[1] == b"%d" % len(data)


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
