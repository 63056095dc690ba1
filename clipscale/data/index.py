"""The shard index: one sidecar per tar with where each sample's picture, caption and label lie.

    shard = index_shard("train-0000.tar")            # reads the sidecar, or walks the tar's headers and writes it
    shard.count("pairs"), shard.refused               # 9998, {'no caption': 2}
    table = shard.table()                              # the offsets, loaded when first asked for

Selection happens here, so that counts are final and an epoch is a number. A sample is the run of members that share a
key (everything up to the basename's first dot), as webdataset groups them. A sidecar lies beside its shard
(`train-0000.tar.index.npz`), in `index_dir` when one is given, or in the cache folder where the shard's cannot be
written. A shard whose size or time changed is indexed again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from clipscale.data.shards import cache_folder
from clipscale.data.tar import Listing, Member, list_members, mapped

VERSION = 2
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
_MAX_CAPTION_BYTES = 1 << 16
_META = re.compile(r"__[^/]*__($|/)")  # webdataset's `skip_meta`
Need = Literal["pairs", "labelled"]


class Table(NamedTuple):
    """Where the usable samples of a shard lie; n samples. Offsets and sizes in bytes, -1 where a sample has none."""

    keys: list[str]
    image: np.ndarray  # int64 [n, 2]: offset, size
    text: np.ndarray  # int64 [n, 2]
    label: np.ndarray  # int64 [n, 2]

    def rows(self, need: Need) -> np.ndarray:
        """The samples that have a picture and what is needed beside it, int64."""
        return np.flatnonzero((self.text if need == "pairs" else self.label)[:, 0] >= 0)


@dataclass(frozen=True)
class Shard:
    """What is known of one shard without its table."""

    path: str
    sidecar: str
    bytes: int
    crc32: int
    pairs: int  # samples with a picture and a caption
    labelled: int  # samples with a picture and a label
    refused: dict[str, int]  # samples left out, by cause
    cut: str  # why the archive ends early; empty: it does not

    def count(self, need: Need) -> int:
        return self.pairs if need == "pairs" else self.labelled

    def table(self) -> Table:
        return _load_table(self.sidecar, self.crc32)


def index_shard(path: str, index_dir: str | None = None, cache_dir: str | None = None) -> Shard:
    """The index of one local shard, from its sidecar where that is current.

    Raises:
        OSError: the shard cannot be read.
    """
    stat = os.stat(path)
    stamp = {"version": VERSION, "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    places = _sidecar_places(path, index_dir, cache_dir)
    for place in places:
        meta = _load_meta(place)
        if stamp.items() <= meta.items():
            return _shard(path, place, meta)
    return _build(path, places, stamp)


def _build(path: str, places: list[Path], stamp: dict[str, int]) -> Shard:
    with mapped(path) as tar:
        listing = list_members(tar)
        refused: Counter[str] = Counter()
        table = _select(listing, tar, refused)
        crc32 = zlib.crc32(tar)
    meta = stamp | {
        "crc32": crc32,
        "pairs": len(table.rows("pairs")),
        "labelled": len(table.rows("labelled")),
        "refused": dict(refused),
        "cut": listing.cut,
    }
    for place in places:
        with contextlib.suppress(OSError):
            _write(place, meta, table)
            return _shard(path, place, meta)
    raise OSError(f"cannot write the index of {path!r} to any of {[str(place) for place in places]}")


def _select(listing: Listing, tar: bytes, refused: Counter[str]) -> Table:
    keys, image, text, label = [], [], [], []
    for key, members in _samples(listing.members):
        picture = next((members[suffix] for suffix in IMAGE_SUFFIXES if suffix in members), None)
        if picture is None:
            refused["no picture"] += 1
            continue
        caption = members.get("txt")
        cause = _caption_fault(tar, caption)
        if cause:
            refused[cause] += 1
            caption = None
        keys.append(key)
        image.append(_span(picture))
        text.append(_span(caption))
        label.append(_span(members.get("cls")))
    return Table(keys, *(np.array(spans, np.int64).reshape(-1, 2) for spans in (image, text, label)))


def _caption_fault(tar: bytes, caption: Member | None) -> str:
    """Why this caption cannot be used; empty: it can."""
    if caption is None:
        return "no caption"
    if caption.size > _MAX_CAPTION_BYTES:
        return "caption above 64 KiB"
    try:
        text = tar[caption.offset : caption.offset + caption.size].decode()
    except UnicodeDecodeError:
        return "caption is not UTF-8"
    return "" if text.strip() else "empty caption"


def _samples(members: list[Member]) -> Iterator[tuple[str, dict[str, Member]]]:
    """Runs of members that share a key, as suffix -> member; webdataset's grouping (`tariterators.group_by_keys`).

    Where webdataset raises, at a suffix that the sample has already, a sample of the same key begins.
    """
    current, sample = None, {}
    for member in members:
        folder, _, base = member.name.rpartition("/")
        stem, dot, suffix = base.partition(".")
        if not dot or not stem or _META.match(member.name):
            continue
        key = f"{folder}/{stem}" if folder or member.name.startswith("/") else stem
        suffix = suffix.lower()
        if key != current or suffix in sample:
            if sample:
                yield current, sample
            current, sample = key, {}
        sample[suffix] = member
    if sample:
        yield current, sample


def _span(member: Member | None) -> tuple[int, int]:
    return (-1, -1) if member is None else (member.offset, member.size)


def _sidecar_places(path: str, index_dir: str | None, cache_dir: str | None) -> list[Path]:
    name = os.path.basename(path) + ".index.npz"
    tag = hashlib.sha1(os.path.abspath(path).encode()).hexdigest()[:12]
    if index_dir is not None:
        return [Path(index_dir) / f"{tag}-{name}"]
    return [Path(path).with_name(name), cache_folder(cache_dir) / "index" / f"{tag}-{name}"]


def _write(place: Path, meta: dict, table: Table) -> None:
    """Atomically: a reader sees the whole sidecar or none."""
    place.parent.mkdir(parents=True, exist_ok=True)
    arrays = {"image": table.image, "text": table.text, "label": table.label}
    arrays["keys"] = np.frombuffer(json.dumps(table.keys).encode(), np.uint8)
    arrays["meta"] = np.frombuffer(json.dumps(meta).encode(), np.uint8)
    with tempfile.NamedTemporaryFile(dir=place.parent, prefix=f".{place.name}.", delete=False) as file:
        try:
            np.savez(file, **arrays)
            os.chmod(file.name, 0o644)
            os.replace(file.name, place)
        except BaseException:
            os.unlink(file.name)
            raise


def _load_meta(place: Path) -> dict:
    """Empty where there is no whole sidecar: it is built again."""
    try:
        with np.load(place, allow_pickle=False) as arrays:
            return dict(json.loads(arrays["meta"].tobytes()))
    except Exception:  # damaged zip and npy headers raise kinds without number
        return {}


@lru_cache(maxsize=4096)
def _load_table(sidecar: str, crc32: int) -> Table:
    try:
        with np.load(sidecar, allow_pickle=False) as arrays:
            found = json.loads(arrays["meta"].tobytes())["crc32"]
            keys = json.loads(arrays["keys"].tobytes())
            table = Table(keys, arrays["image"], arrays["text"], arrays["label"])
    except Exception as error:  # damaged zip and npy headers raise kinds without number
        raise OSError(f"index {sidecar!r} is damaged ({error}); delete it, the next run builds it again") from error
    if found != crc32:
        raise OSError(f"index {sidecar!r} was built again while this run was using it: the shard has changed")
    return table


def _shard(path: str, place: Path, meta: dict) -> Shard:
    facts = {key: meta[key] for key in ("bytes", "crc32", "pairs", "labelled", "refused", "cut")}
    return Shard(path=path, sidecar=str(place), **facts)
