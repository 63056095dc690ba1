"""Memory of a call on a CPU, where no allocator keeps count: the tensors that its operations return.

    result, peak_bytes = watched(lambda: contrastive_grads(image, text, 14.3), known=(image, text))

Scratch memory inside an operation is not seen.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

T = TypeVar("T")

_open: list[_Ledger] = []  # of the call that is being watched, if one is


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

    def _release(self, nbytes: int) -> None:
        with self._lock:
            self.live_bytes -= nbytes


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
