"""The file in which a shard's index lies: facts, then one record for each usable sample, then the keys.

    write(place, facts, spans, keys)                          # whole or not at all: another process never sees a part
    facts = read_facts(place)                                 # {} where there is no whole sidecar
    with open(place, "rb") as file:
        records = Records.of(file.fileno(), facts["identity"])
        records.read(17)                                      # Row(key='000017', image_offset=..., ...): two preads

    bytes    0  magic  8   | size of the facts  4 | CRC-32 of the facts  4 | identity  8 | samples  8
    bytes   32  the facts, JSON
    then        records: offset 8 and size 4 of the picture, of each note and of the key; CRC-32 4
    then        keys, UTF-8, one behind the other

A sample has one note, its caption or label; of a source with several captions as many, of which 0 and 0 stands for one
that it lacks; a record is 28 bytes and 12 for each note. Nothing of it stays in memory, whatever the number of samples.
All numbers are little-endian. A record's CRC-32 covers its number, itself and its key, so that a damaged sidecar is an
error and never another sample.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zlib
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from clipscale.files import whole_file

_MAGIC = b"CSINDEX4"  # the last byte is the version of this format and of what selection means
_BEFORE = (b"CSINDEX3",)  # what they say of a shard's bytes still holds
_PREAMBLE = struct.Struct("<8sIIQQ")
_MAX_FACTS_BYTES = 1 << 20


class Row(NamedTuple):
    key: str
    image_offset: int
    image_size: int
    note_offset: int
    note_size: int


class Records(NamedTuple):
    """The records of an open sidecar."""

    file: int
    start: int  # byte of the first record
    samples: int
    notes: int = 1  # of each sample

    @classmethod
    def of(cls, file: int, identity: int, notes: int = 1) -> Records:
        """Raises OSError where the sidecar is no longer the one whose `identity` is known."""
        head = os.pread(file, _PREAMBLE.size, 0)
        if len(head) < _PREAMBLE.size or head[: len(_MAGIC)] != _MAGIC:
            raise OSError("the index is damaged; delete it, the next run builds it again")
        _, facts_bytes, _, found, samples = _PREAMBLE.unpack(head)
        if found != identity:
            raise OSError("the index was built again while this run was using it: the shard has changed")
        return cls(file, _PREAMBLE.size + facts_bytes, samples, notes)

    def read(self, index: int) -> Row:
        """With the first note that the sample has. Raises OSError where the record is damaged."""
        return next(row for row in self.read_notes(index) if row is not None)

    def read_notes(self, index: int) -> list[Row | None]:
        """A row with each of the notes, None for those that the sample lacks. Raises OSError as `read`."""
        record, covered = _record(self.notes), _covered(self.notes)
        place = self.start + record.size * index
        try:
            *spans, key_at, key_bytes, crc32 = record.unpack(os.pread(self.file, record.size, place))
            if key_bytes > _MAX_FACTS_BYTES:
                raise ValueError(f"a key of {key_bytes} bytes")
            key = os.pread(self.file, key_bytes, self.start + record.size * self.samples + key_at)
            if zlib.crc32(key, zlib.crc32(covered.pack(index, *spans, key_at, key_bytes))) != crc32:
                raise ValueError("its checksum does not match")
            text, (image, size, *notes) = key.decode(), spans
        except (struct.error, ValueError, OverflowError) as error:
            raise OSError(
                f"record {index} of the index is damaged ({error}); delete it, the next run builds it again"
            ) from error
        pairs = zip(notes[::2], notes[1::2], strict=True)
        return [Row(text, image, size, *span) if self.notes == 1 or any(span) else None for span in pairs]


@cache
def _record(notes: int) -> struct.Struct:
    return struct.Struct(f"<QI{notes * 'QI'}QII")


@cache
def _covered(notes: int) -> struct.Struct:
    """The sample's number, and its record up to the CRC."""
    return struct.Struct(f"<QQI{notes * 'QI'}QI")


def write(place: Path, facts: dict[str, Any], spans: np.ndarray, keys: list[str]) -> dict[str, Any]:
    """Write a sidecar and give back its facts, now with `samples` and `identity`.

    `spans` int64 [n, 2 + 2 C]: offset and size of each sample's picture and notes. The identity changes with the
    shard's bytes and with which samples of them are used; it does not change with the shard's place, time or format of
    the facts.
    """
    encoded = [key.encode() for key in keys]
    notes = spans.shape[1] // 2 - 1
    record, covered = _record(notes), _covered(notes)
    records = bytearray(record.size * len(keys))
    key_at = 0
    for index, ((*span,), key) in enumerate(zip(spans.tolist(), encoded, strict=True)):
        crc32 = zlib.crc32(key, zlib.crc32(covered.pack(index, *span, key_at, len(key))))
        record.pack_into(records, record.size * index, *span, key_at, len(key), crc32)
        key_at += len(key)
    body = (bytes(records), b"".join(encoded))
    extra = [facts["extra"]["crc32"]] if "extra" in facts else []
    content = zlib.crc32(body[1], zlib.crc32(body[0]))
    identity = identity_of(facts["bytes"], facts["crc32"], len(keys), content, *extra)
    facts = facts | {"samples": len(keys), "identity": identity}
    _put(place, facts, *body)
    return facts


def rewrite(place: Path, target: Path, facts: dict[str, Any]) -> None:
    """Write the records of the sidecar at `place` to `target`, with these facts of them.

    Raises:
        OSError: one cannot be read, the other not written, or the facts are of other records.
    """
    with open(place, "rb") as file:
        Records.of(file.fileno(), facts["identity"])
        size = _PREAMBLE.unpack(file.read(_PREAMBLE.size))[1]
        file.seek(_PREAMBLE.size + size)
        body = file.read()
    _put(target, facts, body)


def _put(place: Path, facts: dict[str, Any], *body: bytes) -> None:
    header = json.dumps(facts).encode()
    assert len(header) <= _MAX_FACTS_BYTES
    preamble = _PREAMBLE.pack(_MAGIC, len(header), zlib.crc32(header), facts["identity"], facts["samples"])
    place.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(place, "wb", sync=False) as file:  # can be built again
        file.write(b"".join((preamble, header, *body)))


def identity_of(*facts: int | str) -> int:
    """64 bits that stand for `facts`."""
    return int.from_bytes(hashlib.sha256(repr(facts).encode()).digest()[:8], "little")


def read_facts(place: Path, *, before: bool = False) -> dict[str, Any]:
    """Empty where there is no whole sidecar of this version (`before`: or of one before): it is built again."""
    try:
        with open(place, "rb") as file:
            magic, size, crc32, identity, samples = _PREAMBLE.unpack(file.read(_PREAMBLE.size))
            header = file.read(min(size, _MAX_FACTS_BYTES))
            if magic not in (_MAGIC, *(_BEFORE if before else ())) or zlib.crc32(header) != crc32:
                return {}
            facts = json.loads(header)
            notes = max(1, len(facts.get("captions", ())))
            shortest = _PREAMBLE.size + size + _record(notes).size * samples
            whole = os.fstat(file.fileno()).st_size >= shortest
    except (OSError, struct.error, ValueError):
        return {}
    return facts if whole and (facts["identity"], facts["samples"]) == (identity, samples) else {}
