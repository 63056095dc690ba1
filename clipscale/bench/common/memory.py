"""Memory of a call. On a CPU, where no allocator keeps count: the tensors that its operations return.

    result, peak_bytes = watched(lambda: contrastive_grads(image, text, 14.3), known=(image, text))
    result, peaks = watched_parts(step, device, known=weights)      # {"image pass 1": 52428800, ...}

On a CPU scratch memory inside an operation is not seen.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

T = TypeVar("T")

_open: list[_Ledger] = []  # of the call that is being watched, if one is
_parts: list[_Parts] = []  # of the call that is being watched by its parts, if one is


def watched(call: Callable[[], T], known: Iterable[Tensor] = ()) -> tuple[T, int]:
    """`call()`, and the most bytes alive at a time of the tensors made in it.

    `known`: tensors that are there already; a view of one costs nothing. Of other threads, those count that run
    under `join_watch()`.
    """
    ledger = _Ledger(known)
    _open.append(ledger)
    try:
        with _Watch(ledger):
            result = call()
    finally:
        _open.pop()
    return result, ledger.peak_bytes


def watched_parts(
    call: Callable[[], T], device: torch.device, known: Iterable[Tensor] = ()
) -> tuple[T, dict[str, int]]:
    """`call()`, and for every part of it that it named by `begin_part` the most bytes at a time while it lasted.

    Bytes are those beyond what was there before the call; what comes before the first part has the name "".

    Args:
        known: on a CPU, the tensors that are there already.
    """
    ledger = _Allocator() if device.type == "cuda" else _Ledger(known)
    parts = _Parts(ledger)
    _parts.append(parts)
    try:
        with nullcontext() if device.type == "cuda" else _Watch(ledger):
            result = call()
        parts.begin("")
    finally:
        _parts.pop()
    return result, dict(parts.peaks)


def begin_part(name: str) -> None:
    """From here on memory counts for the part `name` of the call that is being watched, if one is."""
    if _parts:
        _parts[-1].begin(name)


def join_watch() -> AbstractContextManager:
    """Within: this thread's tensors count too, if a call is being watched."""
    return _Watch(_open[-1]) if _open else nullcontext()


class _Ledger:
    def __init__(self, known: Iterable[Tensor]) -> None:
        self.live_bytes = self.peak_bytes = 0
        self._seen = weakref.WeakSet(tensor.untyped_storage() for tensor in known)
        self._lock = threading.RLock()  # a finalizer may run at any allocation, inside `count` too

    def count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        with self._lock:
            if storage in self._seen:
                return
            self._seen.add(storage)
            self.live_bytes += storage.nbytes()
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._release, storage.nbytes())

    def take_peak(self) -> int:
        """The most since the last time; counted anew from here."""
        with self._lock:
            peak_bytes, self.peak_bytes = self.peak_bytes, self.live_bytes
        return peak_bytes

    def _release(self, nbytes: int) -> None:
        with self._lock:
            self.live_bytes -= nbytes


class _Allocator:
    """torch's own count on a GPU, beyond what was there at first."""

    def __init__(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self._before_bytes = torch.cuda.memory_allocated()

    def take_peak(self) -> int:
        """The most since the last time; counted anew from here."""
        peak_bytes = torch.cuda.max_memory_allocated() - self._before_bytes
        torch.cuda.reset_peak_memory_stats()
        return peak_bytes


class _Parts:
    def __init__(self, ledger: _Ledger | _Allocator) -> None:
        self.peaks: Counter[str] = Counter()
        self._ledger, self._name = ledger, ""

    def begin(self, name: str) -> None:
        self.peaks[self._name] = max(self.peaks[self._name], self._ledger.take_peak())
        self._name = name


class _Watch(TorchDispatchMode):
    """Enters what every operation of this thread returns into the ledger."""

    def __init__(self, ledger: _Ledger) -> None:
        super().__init__()
        self._ledger = ledger

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self._ledger.count(tensor)
        return result
