"""What any rank wishes for after a step, known to all of them without a wait of its own: it travels with the numbers
that the loss gathers anyway.

    wishes = Wishes(open_link(None), lambda: LEAVE if told_to_leave else 0)
    contrastive_grads(..., group=wishes)        # the loss's link to the other ranks
    wishes.agreed() & LEAVE                     # the same on every rank; a wish that came too late counts next time
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from clipscale.loss.link import Link

LEAVE, SAVE = 1, 2


class Wishes(Link):
    """A link with a word more in all that is gathered.

    Args:
        mine: this rank's, as flags; asked for whenever something is gathered.
    """

    def __init__(self, link: Link, mine: Callable[[], int]) -> None:
        self._link, self._mine = link, mine
        self.rank, self.size = link.rank, link.size
        self._last: Tensor | None = None

    def agreed(self) -> int:
        """Those of all ranks at the last gathering, together; 0 before the first."""
        together = 0
        for mine in [] if self._last is None else self._last.tolist():
            together |= mine
        return together

    def gather(self, values_K: Tensor) -> Tensor:
        mine = torch.full((1,), self._mine(), dtype=values_K.dtype, device=values_K.device)
        everyone = self._link.gather(torch.cat([values_K, mine]))
        self._last = everyone[:, -1]
        return everyone[:, :-1].contiguous()

    def sum(self, values: Tensor) -> Tensor:
        return self._link.sum(values)

    def exchange(
        self, outgoing: Sequence[Tensor], to: int, incoming: Sequence[Tensor], source: int
    ) -> Callable[[], None]:
        return self._link.exchange(outgoing, to, incoming, source)
