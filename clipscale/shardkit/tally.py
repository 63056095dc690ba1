"""Figures over more samples than memory should hold: they wait in files, and are read back a part at a time.

    sizes = Numbers(folder / "bytes")
    sizes.add(np.array([40123, 39985]))
    sizes.summary()                                  # {'min': 39985, 'median': 40054.0, 'max': 40123, 'mean': 40054.0}

    contents = Digests(folder / "pictures")
    contents.add(digests, numbers)                   # uint8 [n, 16], and n sample numbers
    found = contents.repeated(largest=10, places=3)
    found.distinct, found.surplus, found.groups[0]   # 9998, 2, Group(copies=3, numbers=[17, 4711, 9000])

`Digests` needs 24 bytes of disk a sample, and as much memory as 1/64 of that.
"""

from __future__ import annotations

import heapq
from pathlib import Path
from typing import NamedTuple

import numpy as np

_BUCKETS = 64
_RECORD = np.dtype([("high", ">u8"), ("low", ">u8"), ("number", "<i8")])


class Numbers:
    """Integers, one file of them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.touch()

    def add(self, values: np.ndarray) -> None:
        with open(self._path, "ab") as file:
            values.astype(np.int64).tofile(file)

    def summary(self) -> dict[str, float] | None:
        """None: there are none."""
        values = np.fromfile(self._path, np.int64)
        return summary(values) if len(values) else None


def summary(values: np.ndarray) -> dict[str, float]:
    """Leaves the values in another order: so it takes no memory beside them."""
    mean, least, most = float(values.mean()), int(values.min()), int(values.max())
    return {"min": least, "median": float(np.median(values, overwrite_input=True)), "max": most, "mean": mean}


class Group(NamedTuple):
    """Samples with one content."""

    copies: int
    numbers: list[int]  # the first of them


class Repeated(NamedTuple):
    distinct: int  # contents
    surplus: int  # samples beyond the first of each content
    groups: list[Group]  # the largest, of those with at least two copies


class Digests:
    """Hashes of 16 bytes with the number of the sample each belongs to, in files by their first bits."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._paths = [folder / f"{bucket:02}" for bucket in range(_BUCKETS)]

    def add(self, digests: np.ndarray, numbers: np.ndarray) -> None:
        records = np.empty(len(digests), _RECORD)
        halves = np.ascontiguousarray(digests).view(">u8").reshape(-1, 2)
        records["high"], records["low"], records["number"] = halves[:, 0], halves[:, 1], numbers
        bucket = digests[:, 0] // (256 // _BUCKETS)
        for value in np.unique(bucket):
            with open(self._paths[value], "ab") as file:
                records[bucket == value].tofile(file)

    def repeated(self, largest: int, places: int) -> Repeated:
        """The `largest` groups of samples with one content, each with its first `places` samples."""
        distinct = total = 0
        groups: list[Group] = []
        for path in filter(Path.exists, self._paths):
            records = np.fromfile(path, _RECORD)
            records = records[np.lexsort((records["number"], records["low"], records["high"]))]
            new = (np.diff(records["high"]) != 0) | (np.diff(records["low"]) != 0)
            starts = np.flatnonzero(np.concatenate([[True], new]))
            copies = np.diff(np.append(starts, len(records)))
            distinct, total = distinct + len(starts), total + len(records)
            several = np.flatnonzero(copies > 1)
            for i in several[np.argsort(-copies[several], kind="stable")][:largest]:
                numbers = records["number"][starts[i] : starts[i] + min(copies[i], places)].tolist()
                groups.append(Group(int(copies[i]), numbers))
        groups = heapq.nsmallest(largest, groups, key=lambda group: (-group.copies, group.numbers))
        return Repeated(distinct, total - distinct, groups)
