"""The order of the samples as a pure function of (counts, seed, position): resuming needs one integer.

    order = Order(counts=[10_000] * 40, seed=0, streams=8)
    epoch, shard, index = order.locate(np.arange(4096))        # where positions 0..4095 of the run lie
    rank_positions(0, 4096, world=4, rank=1, streams=8)         # the quarter of that batch that rank 1 reads

Position p is global and never falls; epoch e = p div L, q = p mod L with L samples an epoch. Each epoch lays its shards
end to end in an order of its own (starting inside the first one, so that cuts fall elsewhere each time) and cuts the
line into V streams of equal length. Position q takes stream q mod V at index q div V; inside a stream, blocks of K
shards are permuted sample by sample. V and K are configuration, not hardware, so the order does not depend on ranks.

Tar neighbours share a batch about as often as chance has it while V blocks together hold most of the data (a block of
share f of the epoch makes it 1/f times as often); hence the defaults: V about shards/4, one block a stream.

Shapes: P positions, S shards, V streams. All positions and indices are int64.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from clipscale.counter import draw, fold, permuted, shuffled

_SHARDS_PER_STREAM = 4
_SAMPLES_PER_STREAM_AND_BATCH = 4
_RESAMPLED_BLOCK_SHARDS = 8  # draws of different streams meet as well: 4 would bring neighbours together at 2x chance
_LINES_KEPT = 4  # a batch lies in two epochs, unless repeats are allowed; shards are fetched for the next one


def default_streams(shards: int, batch: int, *, divides: bool = True) -> int:
    """V: as many as leave 4 shards a stream and 4 samples a stream and batch.

    Args:
        batch: samples that a global batch takes of the source.
        divides: the largest V that divides the batch, as a source by itself needs it.
    """
    limit = max(1, min(shards // _SHARDS_PER_STREAM, batch // _SAMPLES_PER_STREAM_AND_BATCH))
    return next(v for v in range(limit, 0, -1) if batch % v == 0) if divides else limit


def rank_positions(start: int, global_batch: int, *, world: int, rank: int, streams: int) -> np.ndarray:
    """The positions of batch [start, start + global_batch) that `rank` reads, int64 [global_batch / world].

    Stream by stream, so that a rank keeps to few shards; the ranks' parts are a partition of the batch for any world.
    """
    per_rank, per_stream = global_batch // world, global_batch // streams
    slot = np.arange(rank * per_rank, (rank + 1) * per_rank, dtype=np.int64)
    return start + slot % per_stream * streams + slot // per_stream


@dataclass(frozen=True)
class _Line:
    """One epoch's shards end to end: piece k holds the samples of shard[k] from first[k] on, at cum[k]."""

    shard: np.ndarray  # [S + 1]: the first shard comes twice, its head last
    first: np.ndarray  # [S + 1]
    cum: np.ndarray  # [S + 2]


class Order:
    """The order of one source's samples.

    Args:
        counts: usable samples of each shard, [S].
        seed: any integer; two sources of a run get different ones.
        streams: V; must divide every global batch it is used with.
        block_shards: K, or None for one block a stream.
        epoch_length: samples that an epoch uses, at most sum(counts); the rest of that epoch's order is left out.
    """

    def __init__(
        self,
        counts: np.ndarray | list[int],
        *,
        seed: int,
        streams: int = 1,
        block_shards: int | None = None,
        epoch_length: int | None = None,
    ) -> None:
        self.counts = np.asarray(counts, np.int64)
        self.samples = int(self.counts.sum())
        self.epoch_length = self.samples if epoch_length is None else epoch_length
        assert 0 < self.epoch_length <= self.samples, "an epoch must hold samples"
        self.seed, self.streams, self.block_shards = seed, streams, block_shards
        self._lines: dict[int, _Line] = {}

    def may_repeat(self, low: int, high: int) -> bool:
        """Whether a sample can come twice in positions [low, high): only if they lie in more than one epoch."""
        return low // self.epoch_length < (high - 1) // self.epoch_length

    def block_samples(self) -> int:
        """About how many positions it takes until every stream has come to its next block."""
        if self.block_shards is None:
            return self.samples
        return min(self.samples, self.streams * self.block_shards * self.samples // len(self.counts))

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Positions [P] -> epoch [P], shard [P], index within the shard [P]."""
        epoch = positions // self.epoch_length
        shard, index = np.empty_like(positions), np.empty_like(positions)
        for e in np.unique(epoch):
            here = epoch == e
            shard[here], index[here] = self._locate_in_epoch(int(e), positions[here] - e * self.epoch_length)
        return epoch, shard, index

    def _locate_in_epoch(self, epoch: int, q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        line = self._line(epoch)
        base, longer = divmod(self.samples, self.streams)  # the first `longer` streams hold one sample more
        in_rows = q < base * self.streams
        stream = np.where(in_rows, q % self.streams, q - base * self.streams)
        low = stream * base + np.minimum(stream, longer)
        high = low + base + (stream < longer)
        x = low + np.where(in_rows, q // self.streams, base)
        block, start, stop = self._blocks(epoch, line, stream, low, high, x)
        key = draw(draw(fold(self.seed, "block", epoch), stream), block)
        x = start + permuted(key, x - start, stop - start)
        piece = np.searchsorted(line.cum, x, side="right") - 1
        return line.shard[piece], line.first[piece] + x - line.cum[piece]

    def _blocks(
        self, epoch: int, line: _Line, stream: np.ndarray, low: np.ndarray, high: np.ndarray, x: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Number, start and stop of the block that holds x; first blocks differ in length, so that they do not all
        change shards at once."""
        if self.block_shards is None:
            return np.zeros_like(x), low, high
        k = self.block_shards
        piece = np.searchsorted(line.cum, x, side="right") - 1
        origin = np.searchsorted(line.cum, low, side="right") - 1
        origin = origin - (draw(fold(self.seed, "stagger", epoch), stream) % np.uint64(k)).astype(np.int64)
        block = (piece - origin) // k
        last = len(line.cum) - 1
        start = np.maximum(low, line.cum[np.clip(origin + block * k, 0, last)])
        stop = np.minimum(high, line.cum[np.clip(origin + (block + 1) * k, 0, last)])
        return block, start, stop

    def _line(self, epoch: int) -> _Line:
        """The epochs used last are kept. Threads may race: each makes the same line, and puts a whole dict in place."""
        line = self._lines.get(epoch)
        if line is None:
            line = self._make_line(epoch)
            self._lines = dict([*self._lines.items()][1 - _LINES_KEPT :]) | {epoch: line}
        return line

    def _make_line(self, epoch: int) -> _Line:
        shards = shuffled(fold(self.seed, "shards", epoch), len(self.counts))
        shards = shards[self.counts[shards] > 0]
        head = int(draw(fold(self.seed, "head", epoch), np.zeros(1))[0] % np.uint64(self.counts[shards[0]]))
        lengths = np.concatenate([self.counts[shards], [head]])
        lengths[0] -= head
        first = np.zeros_like(lengths)
        first[0] = head
        cum = np.concatenate([[0], np.cumsum(lengths)])
        return _Line(np.append(shards, shards[0]), first, cum)


class Resampled:
    """Endless draws from one source: shards with replacement, by their sample counts. `Order`'s interface.

    Positions go to streams as in `Order`. Block j of stream v draws K bins and takes equally many samples from each
    without replacement, in a permuted order, so that every sample is as likely as any other. A bin is a shard; shards
    smaller than nine in ten are joined with those that follow them until they hold as much. A bin that a block draws
    again goes on where it left off. An epoch is as many positions as the source has samples; it means nothing else.

    Args:
        block_shards: K, or None for 8.
    """

    def __init__(
        self, counts: np.ndarray | list[int], *, seed: int, streams: int = 1, block_shards: int | None = None
    ) -> None:
        self.counts = counts = np.asarray(counts, np.int64)
        self.samples = self.epoch_length = int(counts.sum())
        assert self.samples > 0, "a source must hold samples"
        self.seed, self.streams, self.block_shards = seed, streams, block_shards or _RESAMPLED_BLOCK_SHARDS
        self._shard = np.flatnonzero(counts)
        filled = counts[self._shard]
        self._cum = np.concatenate([[0], np.cumsum(filled)])
        self._per_bin = int(np.sort(filled)[len(filled) // 10])
        self._block_length = self.block_shards * self._per_bin
        edges = [0]
        for stop in self._cum.tolist():
            if stop - edges[-1] >= self._per_bin:
                edges.append(stop)
        edges[-1] = self.samples  # the last bin takes what would not fill another
        self._edges = np.array(edges)

    def may_repeat(self, low: int, high: int) -> bool:
        """Whether a sample can come twice in positions [low, high)."""
        return high - low > 1

    def block_samples(self) -> int:
        """How many positions it takes until every stream has come to its next block."""
        return self.streams * self._block_length

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Positions [P] -> epoch [P], shard [P], index within the shard [P]."""
        row, stream = np.divmod(positions, self.streams)
        row = row + (draw(fold(self.seed, "stagger"), stream) % np.uint64(self._block_length)).astype(np.int64)
        block, slot = np.divmod(row, self._block_length)
        slot = permuted(self._key("slots", stream, block), slot, self._block_length)
        turn, taken = np.divmod(slot, self._per_bin)
        bin, again = self._drawn(stream, block, turn)
        size = self._edges[bin + 1] - self._edges[bin]
        lap, taken = np.divmod(taken + again * self._per_bin, size)
        key = draw(draw(self._key("samples", stream, block), bin), lap)
        x = self._edges[bin] + permuted(key, taken, size)
        piece = np.searchsorted(self._cum, x, side="right") - 1
        return positions // self.epoch_length, self._shard[piece], x - self._cum[piece]

    def _drawn(self, stream: np.ndarray, block: np.ndarray, turn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The bin of each [P]'s turn in its block, and how often the block drew that bin before."""
        blocks, which = np.unique(block * self.streams + stream, return_inverse=True)
        key = self._key("bins", blocks % self.streams, blocks // self.streams)
        x = (draw(key[:, None], np.arange(self.block_shards)) % np.uint64(self.samples)).astype(np.int64)
        bins = np.searchsorted(self._edges, x, side="right") - 1
        again = np.stack([(bins[:, :k] == bins[:, k : k + 1]).sum(axis=1) for k in range(self.block_shards)], axis=1)
        return bins[which, turn], again[which, turn]

    def _key(self, what: str, stream: np.ndarray, block: np.ndarray) -> np.ndarray:
        return draw(draw(fold(self.seed, "resampled", what), stream), block)
