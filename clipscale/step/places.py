"""Masked slots have no part in the loss: from [N, D] by slot to [V, D] of the valid ones, and back.

    embeddings_VD = compact_(embeddings_ND, valid)           # in its memory
    d_MD = Places(valid).rows_of(d_VD, slots, rows)          # gradients of some slots; 0 for masked ones

Shapes: N slots of this rank, of which V valid; M of a chunk; D width.
"""

from __future__ import annotations

from torch import Tensor

from clipscale.data.load.replay import handed_over

ROWS_AT_ONCE = 1 << 14


def compact_(values_ND: Tensor, valid: Tensor) -> Tensor:
    """The valid slots' rows, in order, moved to the front of `values_ND`: a view of it. `valid` is in host memory.

    Rows only move forwards, so that each piece may overwrite where it came from.
    """
    slots_V = valid.nonzero().squeeze(1)
    if len(slots_V) < len(valid):
        index_V = handed_over(slots_V, values_ND.device)
        for start in range(0, len(slots_V), ROWS_AT_ONCE):
            piece = index_V[start : start + ROWS_AT_ONCE]
            values_ND[start : start + len(piece)] = values_ND[piece]
    return values_ND[: len(slots_V)]


class Places:
    """Where each slot's row stands among the valid ones. `valid` is complete, and in host memory."""

    def __init__(self, valid: Tensor) -> None:
        self._all = bool(valid.all())
        self._valid = valid
        self._place = valid.cumsum(0) - 1

    def rows_of(self, values_VD: Tensor, slots: slice | Tensor, rows: int) -> Tensor:
        """[rows, D]: the slots' rows, 0 for masked slots and beyond the last."""
        if self._all and isinstance(slots, slice) and slots.stop - slots.start == rows:
            return values_VD[slots]
        where = self._valid[slots].nonzero().squeeze(1)
        index = self._place[slots][where]
        out = values_VD.new_zeros(rows, values_VD.shape[1])
        return out.index_copy_(0, handed_over(where, out.device), values_VD[handed_over(index, out.device)])
