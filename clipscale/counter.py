"""Counter-based randomness: every draw is a pure function of a key, so no state has to be saved or replayed.

    key = fold(seed, "crop")                       # a 64-bit key from integers and names
    uniform(key, np.arange(4))                     # four numbers in [0, 1), the same on every machine and version
    permuted(key, np.arange(10), 10)               # a permutation of 0..9, one element at a time, in O(1) memory

Only 64-bit integer arithmetic, so that the order of a month-long run does not depend on NumPy's version. The mixer is
the finalizer of SplitMix64 (Steele, Lea, Flood 2014); the permutation is an alternating Feistel network over a
rectangle, with cycle walking (Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002).
"""

from __future__ import annotations

import zlib

import numpy as np

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
_ROUNDS = 6


def mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer, elementwise on uint64."""
    x = x ^ (x >> np.uint64(30))
    x = x * np.uint64(0xBF58476D1CE4E5B9)
    x = x ^ (x >> np.uint64(27))
    x = x * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def fold(*parts: int | str) -> int:
    """One 64-bit key from integers and names, in their order."""
    key = 0
    for part in parts:
        value = zlib.crc32(part.encode()) if isinstance(part, str) else part
        key = int(mix(np.array([(key * 3 + value + _GOLDEN) & _MASK], np.uint64))[0])
    return key


def draw(key: int | np.ndarray, counter: np.ndarray) -> np.ndarray:
    """uint64 draws, one for each element of `counter` (any integer array); `key` broadcasts against it."""
    key = np.asarray(key, np.uint64)
    return mix(mix(counter.astype(np.uint64) * np.uint64(_GOLDEN) + key) ^ key)


def uniform(key: int | np.ndarray, counter: np.ndarray) -> np.ndarray:
    """float64 draws in [0, 1), one for each element of `counter`."""
    return (draw(key, counter) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def shuffled(key: int, n: int) -> np.ndarray:
    """A permutation of 0..n-1 as int64 [n], in O(n log n): for lists that are held anyway."""
    return np.argsort(draw(key, np.arange(n)), kind="stable")


def permuted(key: np.ndarray, index: np.ndarray, n: np.ndarray) -> np.ndarray:
    """Where permutation `key` of 0..n-1 sends `index`; every argument an array of the same shape (or broadcasts).

    The elements of one call may belong to different permutations of different lengths. int64 in, int64 out.
    """
    key, index, n = np.broadcast_arrays(np.asarray(key, np.uint64), index, np.asarray(n, np.int64))
    key, rows = key.ravel(), np.maximum(1, np.ceil(np.sqrt(n.ravel())).astype(np.int64))
    columns = -(-n.ravel() // rows)
    out, size = index.astype(np.int64).ravel(), n.ravel()
    todo = np.arange(out.size)
    while todo.size:  # elements that fall into the rectangle's surplus walk on until they come back inside
        out[todo] = _feistel(key[todo], out[todo], rows[todo], columns[todo])
        todo = todo[out[todo] >= size[todo]]
    return out.reshape(index.shape)


def _feistel(key: np.ndarray, x: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """A permutation of 0..rows*columns-1: row and column take turns to be shifted by a hash of the other."""
    row, column = x // columns, x % columns
    for turn in range(0, _ROUNDS, 2):
        row = (row + _shift(key + np.uint64(turn), column)) % rows
        column = (column + _shift(key + np.uint64(turn + 1), row)) % columns
    return row * columns + column


def _shift(key: np.ndarray, half: np.ndarray) -> np.ndarray:
    return (draw(key, half) >> np.uint64(2)).astype(np.int64)
