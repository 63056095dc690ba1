"""A list of the samples to keep: uids, one a line, or DataComp's .npy of them.

    uids = UidList.open("subset.npy")       # a million or a billion of them: the file stays where it is, mapped
    "c4c1d6a6b7c1a4f0e1d6a6b7c1a4f0e1" in uids

DataComp (arXiv 2304.14108) names a sample by 32 hexadecimal digits, and keeps a subset as a sorted array of their two
halves, dtype 'u8,u8'. A uid of another form stands there by its BLAKE2b hash of 128 bits.
"""

from __future__ import annotations

import hashlib
import re
from functools import lru_cache

import numpy as np

from clipscale.errors import UserError, require
from clipscale.files import why_unreadable

_PAIR = np.dtype("u8,u8")
_AT_ONCE = 1 << 20
_HEXADECIMAL = re.compile("[0-9a-fA-F]{32}")


class UidList:
    """`pairs`: sorted, dtype 'u8,u8'. `hash`: of the content."""

    def __init__(self, pairs: np.ndarray, path: str) -> None:
        self._pairs = pairs
        digest, before = hashlib.blake2b(digest_size=8), (-1, -1)
        for start in range(0, len(pairs), _AT_ONCE):
            part = pairs[start : start + _AT_ONCE]
            digest.update(part.tobytes())
            high, low = part["f0"], part["f1"]
            rising = (high[1:] > high[:-1]) | ((high[1:] == high[:-1]) & (low[1:] >= low[:-1]))
            require(
                before <= tuple(part[0].tolist()) and bool(rising.all()),
                f"uids {path!r} are not sorted; sort them: numpy.save(path, numpy.sort(numpy.load(path)))",
            )
            before = tuple(part[-1].tolist())
        self.hash = digest.hexdigest()

    @staticmethod
    @lru_cache(maxsize=4)
    def open(path: str) -> UidList:
        """Raises UserError for a file that cannot be read, or is empty or not sorted."""
        try:
            pairs = _load_npy(path) if path.endswith(".npy") else _load_lines(path)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"uids {path!r} cannot be read: {why_unreadable(path, error)}") from error
        require(len(pairs) > 0, f"uids {path!r} is an empty list: no sample would be left")
        return UidList(pairs, path)

    def __len__(self) -> int:
        return len(self._pairs)

    def __contains__(self, uid: str) -> bool:
        wanted, low, high = _halves(uid), 0, len(self._pairs)
        while low < high:
            middle = (low + high) // 2
            if tuple(self._pairs[middle].tolist()) < wanted:
                low = middle + 1
            else:
                high = middle
        return low < len(self._pairs) and tuple(self._pairs[low].tolist()) == wanted


def _load_npy(path: str) -> np.ndarray:
    pairs = np.load(path, mmap_mode="r", allow_pickle=False)
    if pairs.ndim != 1 or pairs.dtype.names is None or pairs.dtype.newbyteorder("=") != _PAIR:
        raise ValueError(f"dtype {pairs.dtype} of {pairs.ndim} dimensions; DataComp's are 'u8,u8' of one")
    return pairs if pairs.dtype == _PAIR else pairs.astype(_PAIR)


def _load_lines(path: str) -> np.ndarray:
    with open(path, encoding="utf-8-sig") as file:
        halves = [_halves(uid) for line in file if (uid := line.strip())]
    return np.sort(np.array(halves, _PAIR))


def _halves(uid: str) -> tuple[int, int]:
    if _HEXADECIMAL.fullmatch(uid):
        return int(uid[:16], 16), int(uid[16:], 16)
    digest = hashlib.blake2b(uid.encode("utf-8", "backslashreplace"), digest_size=16).digest()
    return int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:], "big")
