"""All that turns a position of the run into a training sample: sources, their orders, the mixture, the tokenizer.

    pipeline = build_pipeline(config.data, ..., position=0, recorded=None)         # a new run
    source, epoch, shard, index = pipeline.locate(np.arange(4096))
    state = pipeline.identity()            # what positions mean: saved with every checkpoint
    build_pipeline(config.data, ..., position=4096, recorded=state)                # goes on there, or says what changed

Weights, and sources added or switched off, may change at a resume: the mixture keeps a journal of them. Anything else
that would give a position another sample, other pixels or other tokens is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np

from clipscale.config.data import Data, SourceSettings
from clipscale.counter import fold
from clipscale.data.order.mixture import Mixture, begin, quotas, resumed
from clipscale.data.order.order import Order, Resampled, default_streams, rank_positions
from clipscale.data.order.repeats import count_repeats
from clipscale.data.shard.index_many import Track
from clipscale.data.shard.report import require_captions, require_few_bad
from clipscale.data.source import Source, open_source, repeated_shards
from clipscale.errors import UserError, require
from clipscale.tell import tell
from clipscale.words import counted

if TYPE_CHECKING:
    from clipscale.data.tokenize import Tokenize  # imports torch

_DECODERS = ("simplejpeg", "pillow", "torch", "open_clip_torch")
_OF_EACH_SOURCE = ("streams", "epoch_length", "content", "caption")


@dataclass(frozen=True)
class Pipeline:
    """`sources[i]` has the order `orders[i]`, and is the mixture's source i. Shapes: P positions."""

    sources: list[Source]
    orders: list[Order | Resampled]
    mixture: Mixture
    tokenize: Tokenize
    image_size: int
    context_length: int
    seed: int
    data: Data
    dropped: dict[str, dict[str, Any]]  # by key of `identity`, what it says of the sources that were switched off

    @property
    def streams(self) -> int:
        """Streams of a batch's positions. A mixture deals its positions out over its sources: those lie in none."""
        return self.orders[0].streams if len(self.mixture.names) == 1 else 1

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Positions [P] -> source, epoch of that source, shard, index; each int64 [P].

        Positions before those of a resume may belong to a source that has been switched off since: an IndexError.
        """
        source, ordinal = self.mixture.locate(positions)
        epoch, shard, index = (np.empty_like(positions) for _ in range(3))
        for i in np.unique(source):
            here = source == i
            epoch[here], shard[here], index[here] = self.orders[i].locate(ordinal[here])
        return source, epoch, shard, index

    def rank_positions(self, start: int, global_batch: int, *, world: int, rank: int) -> np.ndarray:
        """The positions of batch [start, start + global_batch) that `rank` reads, int64 [global_batch / world].

        Stream by stream of each source, so that a rank keeps to few shards. The ranks' parts are a partition.
        """
        if len(self.mixture.names) == 1:
            return rank_positions(start, global_batch, world=world, rank=rank, streams=self.orders[0].streams)
        source, ordinal = self.mixture.locate(np.arange(start, start + global_batch))
        length = np.array([order.epoch_length for order in self.orders])[source]
        stream = ordinal % length % np.array([order.streams for order in self.orders])[source]
        per_rank = global_batch // world
        return start + np.lexsort((stream, source))[rank * per_rank : (rank + 1) * per_rank]

    def repeats(self, start: int, global_batch: int) -> int:
        """Slots of the batch at `start` whose pair another slot before them holds.

        Costs nothing where no source can repeat itself: where all that the batch takes of it lies in one epoch.
        """
        stop = start + global_batch
        spans = zip(self.orders, self.mixture.taken(start).tolist(), self.mixture.taken(stop).tolist(), strict=False)
        if not any(order.may_repeat(low, high) for order, low, high in spans):
            return 0
        source, _, shard, index = self.locate(np.arange(start, stop))
        sizes = [source.counts for source in self.sources]
        first_shard = np.cumsum([0, *map(len, sizes)])[source]
        first_sample = np.cumsum(np.concatenate([[0], *sizes]))
        return count_repeats(first_sample[first_shard + shard] + index)

    def horizon(self) -> int:
        """How many positions ahead every stream is half a block further: when to fetch the shards it comes to then."""
        cycle = sum(self.mixture.quota.values())
        blocks = [
            order.block_samples() * cycle // self.mixture.quota[source.name]
            for source, order in zip(self.sources, self.orders, strict=True)
        ]
        return max(1, min(blocks) // 2)

    def identity(self) -> dict[str, Any]:
        """Everything that decides which pixels and tokens a position stands for. JSON."""
        data, pairs = self.data, list(zip(self.sources, self.orders, strict=True))
        captions = {source.name: data.sources[source.name] for source in self.sources}
        of_each_source = {
            "streams": {source.name: order.streams for source, order in pairs},
            "epoch_length": {source.name: order.epoch_length for source, order in pairs},
            "content": {source.name: source.fingerprint() for source in self.sources},
            "caption": {name: [_caption(source), source.captions] for name, source in captions.items()},
        }
        return {
            "seed": self.seed,
            "sampling": data.sampling,
            "block_shards": self.orders[0].block_shards,
            **{key: now | self.dropped.get(key, {}) for key, now in of_each_source.items()},
            "mixture": self.mixture.journal(),
            **_pixels(data),
            "image_size": self.image_size,
            "context_length": self.context_length,
            "tokenizer": self.tokenize.name,
            "decoders": _decoders(),
        }


@dataclass(frozen=True)
class Share:
    """Which part of every step batch is this rank's."""

    global_batch: int
    world: int = 1
    rank: int = 0

    @property
    def slots(self) -> int:
        return self.global_batch // self.world

    def positions(self, pipeline: Pipeline, start: int) -> np.ndarray:
        """Of this rank's slots of the step batch that begins at `start`, int64 [N]."""
        return pipeline.rank_positions(start, self.global_batch, world=self.world, rank=self.rank)


def build_pipeline(
    data: Data,
    tokenize: Tokenize,
    *,
    image_size: int,
    context_length: int,
    seed: int,
    global_batch: int,
    position: int = 0,
    recorded: dict[str, Any] | None = None,
    track: Track | None = None,
) -> Pipeline:
    """Open every source and lay out the order, as the checkpoint recorded it where a run is resumed.

    Args:
        position: where the run stands; a mixture that changes, changes there.
        recorded: the checkpoint's `identity`.

    Raises:
        UserError: no source, no usable sample or too few of them, an epoch shorter than the batch, or data other than
            those recorded.
    """
    require_sources(data)
    recorded = recorded and _in_full(recorded, data)
    mixture = _mixture(data, seed, position, recorded)
    content = recorded["content"] if recorded else {}
    sources = [
        open_source(
            name, data.sources[name], data, need="pairs", track=track, findings=True, recorded=content.get(name)
        )
        for name in mixture.quota
    ]
    for line in repeated_shards(sources):
        tell(line)
    orders = [_order(source, data, mixture, seed, global_batch, recorded) for source in sources]
    dropped = {
        key: {name: recorded[key][name] for name in mixture.names[len(sources) :]}
        for key in (_OF_EACH_SOURCE if recorded else ())
    }
    pipeline = Pipeline(sources, orders, mixture, tokenize, image_size, context_length, seed, data, dropped)
    require(
        global_batch % pipeline.streams == 0,
        f"train.global_batch={global_batch} is not divisible by the {counted(pipeline.streams, 'stream')} of this "
        f"run's order; choose a multiple of {pipeline.streams}",
    )
    if recorded is not None and not data.accept_changes:
        _refuse_changes(recorded, pipeline.identity())
    begun = recorded["content"] if recorded else {}
    for source in sources:
        if begun.get(source.name) != source.fingerprint():  # what a run has begun with, it may end with
            require_few_bad(source.name, source.shards, data)
            require_captions(source.name, source.shards)
    return pipeline


def require_sources(data: Data) -> None:
    """Raise UserError unless there is something to train on, in an order that there can be."""
    require(
        any(source.weight > 0 for source in data.sources.values()),
        "no training data: set data.sources.<name>.urls to your shards, e.g. 'shards/{0000..0099}.tar'",
    )
    require(
        data.sampling == "epochs" or data.epoch_boundary == "straddle",
        "data.epoch_boundary=drop leaves out the remainder of an epoch, and data.sampling=resampled has no epochs; use "
        "straddle",
    )


def check_layout(sources: list[Source], data: Data, *, seed: int, global_batch: int) -> None:
    """Lay out the order of a new run on these sources and forget it.

    Raises:
        UserError: an epoch shorter than the batch, or streams and blocks that do not fit the shards.
    """
    mixture = _mixture(data, seed, 0, None)
    for source in sources:
        _order(source, data, mixture, seed, global_batch, None)


def _mixture(
    data: Data,
    seed: int,
    position: int,
    recorded: dict[str, Any] | None,
) -> Mixture:
    """By the weights of today, from `position` on; by the recorded ones before it."""
    quota = quotas({name: source.weight for name, source in data.sources.items()})
    if recorded is None:
        return begin(quota, seed=seed)
    before = resumed(recorded["mixture"], seed=seed)
    for name in before.quota:
        require(
            name in data.sources,
            f"the run has drawn from source {name!r}, which data.sources no longer has; put it back, with weight=0 if "
            "the run is to go on without it",
        )
    mixture = before.changed(position, quota)
    if mixture.quota != before.quota:
        was, now = (
            ", ".join(f"{name} {n / sum(q.values()):.2%}" for name, n in q.items()) for q in (before.quota, quota)
        )
        tell(f"mixture: {now} from position {position:,} on; {was} before")
    return mixture


def _order(
    source: Source, data: Data, mixture: Mixture, seed: int, global_batch: int, recorded: dict[str, Any] | None
) -> Order | Resampled:
    per_batch = -(-mixture.quota[source.name] * global_batch // sum(mixture.quota.values()))
    if recorded is not None and source.name in recorded["streams"]:
        streams = recorded["streams"][source.name]
    else:  # V of one source, from its own shards and its own share of a batch
        streams = data.streams or default_streams(len(source.shards), per_batch, divides=len(mixture.names) == 1)
    layout = partial(
        Order if data.sampling == "epochs" else Resampled,
        source.counts,
        seed=fold(seed, source.name),
        streams=streams,
        block_shards=data.block_shards if recorded is None else recorded["block_shards"],
    )
    if data.sampling == "resampled":
        return layout()
    order = layout(epoch_length=_epoch_length(source, data, global_batch, recorded))
    require(
        order.epoch_length >= per_batch or data.allow_repeats,
        f"source {source.name!r} has {counted(order.epoch_length, 'usable sample')} an epoch, fewer than its "
        f"{per_batch} of a batch: pairs would repeat within a batch and be each other's negatives; "
        "lower train.global_batch, or set data.allow_repeats=true",
    )
    return order


def _epoch_length(source: Source, data: Data, global_batch: int, recorded: dict[str, Any] | None) -> int:
    """As recorded while the source is the same, for another batch could leave out another remainder."""
    if recorded is not None and recorded["content"].get(source.name) == source.fingerprint():
        return recorded["epoch_length"][source.name]
    if data.epoch_boundary == "straddle":
        return source.samples
    whole = source.samples // global_batch * global_batch
    require(
        whole > 0,
        f"data.epoch_boundary=drop leaves nothing of source {source.name!r}: {counted(source.samples, 'sample')}, "
        f"train.global_batch={global_batch}; use straddle, or a smaller batch",
    )
    return whole


@cache
def _decoders() -> dict[str, str]:
    return {name: version(name) for name in _DECODERS}


def _pixels(data: Data) -> dict[str, Any]:
    """The settings of `data` that decide what is made of a sample's bytes."""
    augment = data.augment
    return {
        "crop": [*data.crop_scale, *data.crop_ratio],
        "exif": data.exif,
        "scaled_decode": data.scaled_decode,
        "max_pixels": data.max_pixels,
        "augment": [augment.flip, *augment.color_jitter, augment.color_jitter_prob, augment.grayscale],
    }


def _caption(source: SourceSettings) -> str | list[list[str | float]]:
    """Of one caption its name; of several each with its share, for their order counts too."""
    shares = source.caption_shares
    return next(iter(shares)) if len(shares) == 1 else [[*share] for share in shares.items()]


def _in_full(recorded: dict[str, Any], data: Data) -> dict[str, Any]:
    """A record of a version that kept less: what it lacks was as the defaults of today have it."""
    if "mixture" in recorded:
        return recorded
    require(
        len(recorded["content"]) == 1 or data.accept_changes,
        "the checkpoint is of a version that dealt a mixture's positions out in another way; start a run of its own "
        "(run.dir), or set data.accept_changes=true",
    )
    names = [*recorded["content"]]
    quota = dict(zip(names, recorded["quota"], strict=True))
    return {
        "sampling": "epochs",
        "caption": {name: ["txt", "whole"] for name in names},
        "mixture": begin(quota, seed=recorded["seed"]).journal(),
        **_pixels(Data()),
        **{key: value for key, value in recorded.items() if key != "quota"},
    }


def _refuse_changes(recorded: dict[str, Any], now: dict[str, Any]) -> None:
    """What the record does not know (a source that is new, a setting that it had not) is no change."""
    before, after = _facts(recorded), _facts(now)
    changed = [f"{key}: {before[key]} -> {after[key]}" for key in after if key in before and before[key] != after[key]]
    if changed:
        raise UserError(
            f"the data are not those of the checkpoint ({'; '.join(changed)}): positions would mean other samples, "
            "pixels or tokens; put them back, start a run of its own (run.dir), or set data.accept_changes=true"
        )


def _facts(identity: dict[str, Any]) -> dict[str, Any]:
    """One line for each: 'seed', 'content of mine', 'decoders of torch'. Without the mixture, which may change."""
    facts = {}
    for key, value in identity.items():
        if isinstance(value, dict):
            facts |= {f"{key} of {name}": part for name, part in value.items()}
        elif key != "mixture":
            facts[key] = value
    return facts
