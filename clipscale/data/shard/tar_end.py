"""Whether the zeros at the end of a file are the end of an archive, or what a download or a crash left unfilled.

    zeros_until(tar, 81408)                          # 92160: the file's length, or where the next other byte lies
    why_no_end(81408, 92160, header)                 # '': two blocks of zeros, filled up to a record of 10,240 bytes

An archive ends with two blocks of zeros, and its writer may fill the last record. Python's tarfile (with it webdataset
and img2dataset), GNU tar and bsdtar make records of 10,240 bytes, Go and Rust none. `tar -b` makes larger ones, and
`tar -A` leaves the fill of both archives. Programs with such options show in the headers: only of theirs is a longer
fill believed, and only where the sizes fit. A file of whole usual records is taken for what the default wrote: there
a longer record is believed only where it is a power of two, as people choose them.
"""

from __future__ import annotations

import mmap

_BLOCK = 512
_USUAL_RECORD, _LARGEST_RECORD = 20 * _BLOCK, 2048 * _BLOCK  # what writers take; 1 MiB, for tapes
_AT_ONCE = 1 << 20


def zeros_until(tar: bytes | mmap.mmap, start: int) -> int:
    """Where the zeros end that begin at byte `start`: at the next other byte, or with the file."""
    while start < len(tar):
        part = tar[start : start + _AT_ONCE]
        rest = part.lstrip(b"\0")
        if rest:
            return start + len(part) - len(rest)
        start += len(part)
    return len(tar)


def why_no_end(start: int, end: int, header: bytes) -> str:
    """Empty: the zeros from `start` to the file's `end` are no more than a writer adds. Else what else they may be.

    header: of the last member; empty where there is none.
    """
    if end - start <= _USUAL_RECORD + _BLOCK:  # data may end one block before its record does
        return ""
    if header and _may_choose_records(header):
        fitting = [r for r in range(_USUAL_RECORD, _LARGEST_RECORD + 1, _BLOCK) if _joined(start, end, r)]
        if end % _USUAL_RECORD == 0 and not any(r == _USUAL_RECORD or r & (r - 1) == 0 for r in fitting):
            return "never filled, or left by tar -b or -A" if fitting else "never filled"
        return "" if fitting else "never filled"
    return "never filled, or left by tar -A" if header and _joined(start, end, _USUAL_RECORD) else "never filled"


def _joined(start: int, end: int, record: int) -> bool:
    """Whether these zeros may be the fills of two archives, each of one record at most."""
    return end % record == 0 and end - start <= 2 * (record + _BLOCK)


def _may_choose_records(header: bytes) -> bool:
    """Whether a program with an option for the record may have written this header: not where, of a POSIX header, the
    numbers of a device are empty, as Python's tarfile, Rust's tar and clipscale leave them for a regular file."""
    return header[257:263] != b"ustar\0" or header[329:345].strip(b"\0") != b""
