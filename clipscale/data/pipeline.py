"""All that turns a position of the run into a training sample: sources, their orders, the mixture, the tokenizer.

pipeline = build_pipeline(config.data, ..., recorded=checkpoint_state)    # `recorded`: None for a new run
source, epoch, shard, index = pipeline.locate(np.arange(4096))
pipeline.identity()                       # what positions mean: saved with every checkpoint, checked at a resume
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np

from clipscale.config_data import Data
from clipscale.counter import fold
from clipscale.data.order import Mixture, Order, default_streams
from clipscale.data.source import Source, open_source
from clipscale.data.tokenize import Tokenize
from clipscale.errors import UserError, require


@dataclass(frozen=True)
class Pipeline:
    """`orders[i]` belongs to `sources[i]`. Shapes: P positions."""

    sources: list[Source]
    orders: list[Order]
    mixture: Mixture
    tokenize: Tokenize
    image_size: int
    context_length: int
    seed: int
    data: Data

    @property
    def streams(self) -> int:
        """Streams of a batch's positions. A mixture deals its positions out over its sources: those lie in none."""
        return self.orders[0].streams if len(self.orders) == 1 else 1

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Positions [P] -> source, epoch of that source, shard, index; each int64 [P]."""
        source, ordinal = self.mixture.locate(positions)
        epoch, shard, index = (np.empty_like(positions) for _ in range(3))
        for i in np.unique(source):
            here = source == i
            epoch[here], shard[here], index[here] = self.orders[i].locate(ordinal[here])
        return source, epoch, shard, index

    def repeats(self, start: int, global_batch: int) -> int:
        """Pairs that the batch at `start` holds more than once: only a batch that lies in two epochs can."""
        positions = np.arange(start, start + global_batch)
        source, ordinal = self.mixture.locate(positions)
        length = np.array([order.epoch_length for order in self.orders])
        first, last = np.full(len(length), np.iinfo(np.int64).max), np.full(len(length), -1)
        np.minimum.at(first, source, ordinal // length[source])
        np.maximum.at(last, source, ordinal // length[source])
        if (first >= last).all():
            return 0
        source, _, shard, index = self.locate(positions)
        return global_batch - np.unique(np.stack([source, shard, index]), axis=1).shape[1]

    def identity(self) -> dict[str, Any]:
        """Everything that decides which pixels and tokens a position stands for."""
        return {
            "seed": self.seed,
            "streams": {s.name: o.streams for s, o in zip(self.sources, self.orders, strict=True)},
            "block_shards": self.orders[0].block_shards,
            "epoch_length": {s.name: o.epoch_length for s, o in zip(self.sources, self.orders, strict=True)},
            "content": {source.name: source.fingerprint() for source in self.sources},
            "quota": self.mixture.quota.tolist(),
            "crop": [*self.data.crop_scale, *self.data.crop_ratio],
            "image_size": self.image_size,
            "decoders": {name: version(name) for name in ("simplejpeg", "pillow", "torch")},
        }


def build_pipeline(
    data: Data,
    tokenize: Tokenize,
    *,
    image_size: int,
    context_length: int,
    seed: int,
    global_batch: int,
    recorded: dict[str, Any] | None = None,
    track: Callable[[Iterable[str], str], Iterable[str]] | None = None,
    warn: Callable[[str], None] | None = None,
) -> Pipeline:
    """Open every source and lay out the order, as the checkpoint recorded it where a run is resumed.

    Raises:
        UserError: no source, no usable sample, an epoch shorter than the batch, or data other than those recorded.
    """
    active = {name: source for name, source in data.sources.items() if source.weight > 0}
    require(
        bool(active), "no training data: set data.sources.<name>.urls to your shards, e.g. 'shards/{0000..0099}.tar'"
    )
    sources = [open_source(name, source, data, need="pairs", track=track, warn=warn) for name, source in active.items()]
    mixture = Mixture([source.weight for source in active.values()], seed=seed)
    orders = []
    for source, quota in zip(sources, mixture.quota, strict=True):
        per_batch = -(-int(quota) * global_batch // mixture.cycle)
        order = Order(
            source.counts,
            seed=fold(seed, source.name),
            streams=_streams(source, data, per_batch, recorded),
            block_shards=data.block_shards if recorded is None else recorded["block_shards"],
            epoch_length=_epoch_length(source, data, global_batch, recorded),
        )
        require(
            order.epoch_length >= per_batch or data.allow_repeats,
            f"source {source.name!r} has {order.epoch_length} usable samples an epoch, fewer than its {per_batch} of a "
            "batch: pairs would repeat within a batch and be each other's negatives; lower train.global_batch, or set "
            "data.allow_repeats=true",
        )
        orders.append(order)
    pipeline = Pipeline(sources, orders, mixture, tokenize, image_size, context_length, seed, data)
    require(
        global_batch % pipeline.streams == 0,
        f"train.global_batch={global_batch} is not divisible by the {pipeline.streams} streams of this run's order; "
        f"choose a multiple of {pipeline.streams}",
    )
    if recorded is not None and not data.accept_changes:
        _refuse_changes(recorded, pipeline.identity())
    return pipeline


def _streams(source: Source, data: Data, per_batch: int, recorded: dict[str, Any] | None) -> int:
    """V of one source, from its own shards and its own share of a batch, unless recorded or set."""
    if recorded is not None and source.name in recorded["streams"]:
        return recorded["streams"][source.name]
    return data.streams or default_streams(len(source.shards), per_batch)


def _epoch_length(source: Source, data: Data, global_batch: int, recorded: dict[str, Any] | None) -> int:
    """As recorded while the source is the same, for another batch could leave out another remainder."""
    if recorded is not None and recorded["content"].get(source.name) == source.fingerprint():
        return recorded["epoch_length"][source.name]
    if data.epoch_boundary == "straddle":
        return source.samples
    whole = source.samples // global_batch * global_batch
    require(
        whole > 0,
        f"data.epoch_boundary=drop leaves nothing of source {source.name!r}: {source.samples} samples, "
        f"train.global_batch={global_batch}; use straddle, or a smaller batch",
    )
    return whole


def _refuse_changes(recorded: dict[str, Any], now: dict[str, Any]) -> None:
    changed = [f"{key}: {recorded.get(key)} -> {now[key]}" for key in now if recorded.get(key) != now[key]]
    if changed:
        raise UserError(
            f"the data are not those of the checkpoint ({'; '.join(changed)}): the order of samples would change; put "
            "them back, start a run of its own (run.dir), or set data.accept_changes=true"
        )
