"""Several sources by weight, exact in every cycle; at a resume the weights may change, and no sample is lost by it.

    mixture = begin(quotas({"laion": 3.0, "cc12m": 1.0}), seed=0)
    source, ordinal = mixture.locate(np.arange(4096))      # whose turn it is, and which of its own positions it gives
    later = mixture.changed(5_000, quotas({"laion": 1.0, "cc12m": 1.0}))       # the same up to 5000, then half and half
    later.journal()                                        # two segments, as the checkpoint holds them

A segment deals its positions out in cycles: of each cycle's M slots source i takes its quota, about M w_i; which ones
is drawn anew for every cycle. A change may cut a cycle short. What the cut cycle did not come to is what the next
segment gives first, so that every source's ordinals are still taken one by one, each of them once: its epochs stay
whole. Ordinals are numbered per source through all segments, also while a source is switched off.

Shapes: P positions. All positions and ordinals are int64.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from clipscale.counter import draw, fold, permuted
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
        self._cuts = [self._cut(k) for k in range(1, len(segments))]

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
            source[here], turn = self._dealers[k].deal(positions[here])
            ordinal[here] = self._uncut(int(k), source[here], turn)
        return source, ordinal

    def spans(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """(source, low, high): the ordinals of positions [start, stop) lie in [low, high), which may be wider."""
        spans = []
        for k, (segment, dealer) in enumerate(zip(self.segments, self._dealers, strict=True)):
            end = self.segments[k + 1].start if k + 1 < len(self.segments) else stop
            first, last = max(start, segment.start) - segment.start, min(stop, end) - segment.start
            for i in np.flatnonzero(dealer.quota) if first < last else ():
                low = dealer.base[i] + first // dealer.cycle * dealer.quota[i]
                low -= sum(cut[i][0] - cut[i][1][0] for cut in self._cuts[:k] if i in cut)  # the furthest one goes back
                spans.append((int(i), int(low), int(dealer.base[i] - (-last // dealer.cycle) * dealer.quota[i])))
        return spans

    def changed(self, position: int, quota: dict[str, int]) -> Mixture:
        """The same up to `position`, and by `quota` from there on. Segments that gave nothing yet are left out."""
        kept = [segment for segment in self.segments if segment.start < position]
        if not kept:
            return begin(quota, seed=self.seed)
        if kept[-1].quota == quota:
            return Mixture(kept, seed=self.seed)
        dealer = _Dealer(kept[-1], self.names, self.seed)
        taken = dict(zip(self.names, dealer.taken(position).tolist(), strict=True))
        base = {name: taken.get(name, 0) for name in dict.fromkeys([*kept[-1].base, *quota])}
        return Mixture([*kept, Segment(position, quota, base)], seed=self.seed)

    def _cut(self, k: int) -> dict[int, tuple[int, np.ndarray]]:
        """Where segment k cut a cycle of the one before: by source, the first ordinal behind the cut, and what the
        ordinals from there to the end of that cycle stand for."""
        before, start = self._dealers[k - 1], self.segments[k].start
        cut = {}
        for i, left in before.left_over(start).items():
            first = int(before.taken(start)[i])
            if not np.array_equal(left, np.arange(first, first + len(left))):
                cut[i] = (first, left)
        return cut

    def _uncut(self, k: int, source: np.ndarray, ordinal: np.ndarray) -> np.ndarray:
        """Ordinals as segment k counts them -> as they would have been counted had no cycle been cut."""
        for cut in reversed(self._cuts[:k]):
            for i, (first, left) in cut.items():
                here = (source == i) & (ordinal >= first) & (ordinal < first + len(left))
                ordinal[here] = left[ordinal[here] - first]
        return ordinal


class _Dealer:
    """One segment by itself, its sources as places in `names`."""

    def __init__(self, segment: Segment, names: list[str], seed: int) -> None:
        self.start, self.cycle = segment.start, sum(segment.quota.values())
        self.base = np.array([segment.base.get(name, 0) for name in names], np.int64)
        self.quota = np.array([segment.quota.get(name, 0) for name in names], np.int64)
        self._order = np.array([names.index(name) for name in segment.quota], np.int64)
        self._ends = np.cumsum([*segment.quota.values()])  # which of a permuted cycle's places are whose
        self._key = fold(seed, "mixture", segment.start) if segment.start else fold(seed, "mixture")

    def deal(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions [P] -> source [P], ordinal [P]."""
        cycle, slot = np.divmod(positions - self.start, self.cycle)
        if len(self._order) == 1:
            return np.full_like(positions, self._order[0]), self.base[self._order[0]] + positions - self.start
        place = permuted(draw(self._key, cycle), slot, self.cycle)
        whose = np.searchsorted(self._ends, place, side="right")
        source = self._order[whose]
        begin = (self._ends - self.quota[self._order])[whose]
        return source, self.base[source] + cycle * self.quota[source] + place - begin

    def left_over(self, stop: int) -> dict[int, np.ndarray]:
        """The ordinals that the cycle which `stop` cuts would still have given, by source, rising."""
        whole = -(-(stop - self.start) // self.cycle) * self.cycle
        source, ordinal = self.deal(np.arange(stop, self.start + whole))
        return {int(i): np.sort(ordinal[source == i]) for i in self._order}

    def taken(self, stop: int) -> np.ndarray:
        """Ordinals given before `stop`, of each name."""
        taken = self.base - (-(stop - self.start) // self.cycle) * self.quota
        for i, left in self.left_over(stop).items():
            taken[i] -= len(left)
        return taken
