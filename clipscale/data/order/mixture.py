"""Several sources by weight, exact in every cycle; at a resume the weights may change, and no sample is lost by it.

    mixture = begin(quotas({"laion": 3.0, "cc12m": 1.0}), seed=0)
    source, ordinal = mixture.locate(np.arange(4096))      # whose turn it is, and which of its own positions it gives
    later = mixture.changed(5_000, quotas({"laion": 1.0, "cc12m": 1.0}))       # the same up to 5000, then half and half
    later.journal()                                        # two segments, as the checkpoint holds them

A segment deals its positions out in cycles: of each cycle's M slots source i has its quota, about M w_i, in a drawn
pattern that every cycle begins at another place of. A source's ordinals rise with the positions by one at a time, so
that its epochs follow each other, and a segment may end anywhere: the next one goes on with the ordinals that follow.
Ordinals are numbered per source through all segments, also while a source is switched off.

Shapes: P positions, M slots of a cycle, N names. All positions and ordinals are int64.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from clipscale.counter import draw, fold, shuffled
from clipscale.errors import require

_CYCLE = 10_000


@dataclass(frozen=True)
class Segment:
    """Positions from `start` to the next segment."""

    start: int
    quota: dict[str, int]  # slots of each cycle; their sum is the cycle. Without the sources that are switched off
    base: dict[str, int]  # ordinals taken before `start`, of every source that there has been


def quotas(weights: dict[str, float], cycle: int = _CYCLE) -> dict[str, int]:
    """Slots of a cycle for each source whose weight is not 0: largest remainders, so that they fill the cycle."""
    weights = {name: weight for name, weight in weights.items() if weight > 0}
    share = np.array([*weights.values()], np.float64) / np.sum([*weights.values()])
    quota = np.floor(share * cycle).astype(np.int64)
    for i in np.argsort(-(share * cycle - quota), kind="stable")[: cycle - quota.sum()]:
        quota[i] += 1
    for (name, weight), slots in zip(weights.items(), quota, strict=True):
        require(
            slots > 0,
            f"source {name!r}: its weight={weight} is under one sample in {cycle:,}; raise it, or set it to 0",
        )
    return dict(zip(weights, quota.tolist(), strict=True))


def begin(quota: dict[str, int], *, seed: int) -> Mixture:
    """The mixture of a new run."""
    return Mixture([Segment(0, quota, dict.fromkeys(quota, 0))], seed=seed)


def resumed(journal: list[dict[str, Any]], *, seed: int) -> Mixture:
    """The mixture that a checkpoint recorded."""
    return Mixture([Segment(**entry) for entry in journal], seed=seed)


class Mixture:
    """Whose turn each position is. `names`: those of the newest segment first, in its order; then those dropped."""

    def __init__(self, segments: list[Segment], *, seed: int) -> None:
        self.segments, self.seed = segments, seed
        newest = segments[-1]
        self.names = [*newest.quota, *(name for name in newest.base if name not in newest.quota)]
        self._starts = np.array([segment.start for segment in segments])
        self._dealers = [_Dealer(segment, self.names, seed) for segment in segments]

    @property
    def quota(self) -> dict[str, int]:
        """Of the newest segment."""
        return self.segments[-1].quota

    def journal(self) -> list[dict[str, Any]]:
        return [asdict(segment) for segment in self.segments]

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions [P] -> source [P], a place in `names`; ordinal [P], a position of that source's own order."""
        source, ordinal = np.empty_like(positions), np.empty_like(positions)
        segment = np.searchsorted(self._starts, positions, side="right") - 1
        for k in np.unique(segment):
            here = segment == k
            source[here], ordinal[here] = self._dealers[k].deal(positions[here])
        return source, ordinal

    def taken(self, position: int) -> np.ndarray:
        """How many ordinals of each source come before `position`, [N]: its next one."""
        return self._dealers[np.searchsorted(self._starts, position, side="right") - 1].taken(position)

    def changed(self, position: int, quota: dict[str, int]) -> Mixture:
        """The same up to `position`, and by `quota` from there on. Segments that gave nothing yet are left out."""
        kept = [segment for segment in self.segments if segment.start < position]
        if not kept:
            return begin(quota, seed=self.seed)
        if kept[-1].quota == quota:
            return Mixture(kept, seed=self.seed)
        before = Mixture(kept, seed=self.seed)
        base = dict.fromkeys(quota, 0) | dict(zip(before.names, before.taken(position).tolist(), strict=True))
        return Mixture([*kept, Segment(position, quota, base)], seed=self.seed)


class _Dealer:
    """One segment by itself, its sources as places in `names`."""

    def __init__(self, segment: Segment, names: list[str], seed: int) -> None:
        self.start, self.cycle = segment.start, sum(segment.quota.values())
        self._base = np.array([segment.base.get(name, 0) for name in names], np.int64)
        self._quota = np.array([segment.quota.get(name, 0) for name in names], np.int64)
        self._key = fold(seed, "turn", segment.start)
        sources = np.repeat([names.index(name) for name in segment.quota], [*segment.quota.values()])
        self._pattern = sources[shuffled(fold(seed, "pattern", segment.start), self.cycle)]  # [M]
        self._before = np.zeros(
            (len(names), self.cycle + 1), np.int32
        )  # of the pattern's first slots, how many each has
        np.cumsum(self._pattern == np.arange(len(names))[:, None], axis=1, out=self._before[:, 1:])

    def deal(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions [P] -> source [P], ordinal [P]."""
        cycle, first, place, again = self._place(positions)
        source = self._pattern[place]
        nth = self._before[source, place] - self._before[source, first] + again * self._quota[source]
        return source, self._base[source] + cycle * self._quota[source] + nth

    def taken(self, position: int) -> np.ndarray:
        """How many ordinals of each name come before `position`, [N]."""
        cycle, first, place, again = (int(x[0]) for x in self._place(np.array([position])))
        return self._base + (cycle + again) * self._quota + self._before[:, place] - self._before[:, first]

    def _place(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Cycle, the place of the pattern that the cycle begins at, that of the position, whether it lies past the
        pattern's end; each [P]."""
        cycle, slot = np.divmod(positions - self.start, self.cycle)
        first = (draw(self._key, cycle) % np.uint64(self.cycle)).astype(np.int64)
        again, place = np.divmod(first + slot, self.cycle)
        return cycle, first, place, again
