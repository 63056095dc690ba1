"""What feeds a run: the loader of its step batches, and the account of what could not be used.

feed = Feed(config, towers, plan.image, world, recorded=None, position=0)
batch = next(feed.loader)
feed.repeats(batch)                                     # pairs and captions that stand in the batch twice
skips.account(batch, masked=True, seen=4096)            # counts, skipped.jsonl, data.max_bad_fraction
"""

from __future__ import annotations

import json
import socket
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clipscale.config import Config
from clipscale.config.data import AugmentSettings, Replay
from clipscale.data.fetch.urls import masked
from clipscale.data.load.fill import Skip
from clipscale.data.load.loader import Loader, Setup, StepBatch
from clipscale.data.load.replay_plan import Plan, budgets, build_tier, choose_tier, tightest
from clipscale.data.load.shape import StepShape
from clipscale.data.order.repeats import count_repeats
from clipscale.data.pipeline import Share, build_pipeline
from clipscale.data.pixels.augment import Augment
from clipscale.data.shard.report import damage
from clipscale.data.source import Source
from clipscale.data.tokenize import caption_hashes
from clipscale.dist import World
from clipscale.errors import SharedError
from clipscale.files import keep_rows
from clipscale.fit_tokenizer import fitting_tokenizer
from clipscale.step import TowerPlan
from clipscale.telemetry.faults import record_fault
from clipscale.telemetry.growing import GrowingFile
from clipscale.telemetry.parts import UNTIMED, Parts
from clipscale.tell import tell
from clipscale.towers import Towers
from clipscale.words import counted

_NAMED_SKIPS = 20  # masked samples with a log line of their own; skipped.jsonl has every one
_OF_A_SHARD = ("cannot be read", "fewer than declared")  # causes: the shard is gone, cut or out of reach
_BAD_FRACTION_AFTER = 1000  # samples seen before data.max_bad_fraction is applied


class Feed:
    """The step batches of one rank from `position` on. `close` lets go of processes and files.

    Args:
        plan: of the image tower, whose chunks the pictures come in.
    """

    def __init__(
        self,
        config: Config,
        towers: Towers,
        plan: TowerPlan,
        world: World,
        *,
        recorded: dict[str, Any] | None,
        position: int,
        parts: Parts = UNTIMED,
    ) -> None:
        data = config.data
        self.world, self.global_batch = world, config.train.global_batch
        self.pipeline = build_pipeline(
            data,
            fitting_tokenizer(towers),
            image_size=towers.image_size,
            context_length=towers.context_length,
            seed=config.seed,
            global_batch=self.global_batch,
            position=position,
            recorded=recorded,
        )
        _require_equal(world.gather(self.pipeline.identity()))
        if recorded is None:  # told when the sources were opened; a run that goes on has these rows already
            _record_damage(self.pipeline.sources)
        for source, order in zip(self.pipeline.sources, self.pipeline.orders, strict=True):
            if shortage := source.cache_shortage(order.block_samples()):
                tell(shortage)
        share = Share(self.global_batch, world.size, world.rank)
        shape = StepShape.fit(
            share.slots,
            chunk=plan.wide,
            side=towers.image_size,
            ahead_steps=data.prefetch_steps,
            ahead_bytes=data.prefetch_bytes,
            kept=plan.kept_samples(share.slots),
        )
        replay = plan_replay(config.replay, shape, world)
        for note in replay.notes:
            tell(note)
        change = None
        if data.augment != AugmentSettings():
            change = Augment(data.augment, config.seed)
        self.loader = Loader(
            self.pipeline,
            share,
            Setup(shape, replay.blocks, data.loader, data.threads, pin=world.device.type == "cuda"),
            build_tier(replay, config.replay, shape, world.device),
            start=position,
            change=change,
            parts=parts,
        )
        tell(
            "data: "
            + ", ".join(f"{source.name} {counted(source.samples, 'pair')}" for source in self.pipeline.sources)
            + f"; replay tier {replay.kind}, {counted(replay.blocks, 'block')} of "
            f"{counted(shape.chunk, 'picture')} a rank"
        )

    def keys(self, batch: StepBatch, slots: Sequence[int]) -> list[str]:
        """Shard and key of the samples in some of this rank's slots, for messages."""
        source, _, shard, index = self.pipeline.locate(batch.positions[list(slots)])
        return [
            "{}: {}".format(*self.pipeline.sources[s].where(sh, i))
            for s, sh, i in zip(source, shard, index, strict=True)
        ]

    def repeats(self, batch: StepBatch) -> dict[str, int]:
        """How many pairs, and how many captions, of the whole batch stand in it more than once; collective.

        A caption that occurs twice makes its pairs each other's false negatives. Compared by a hash of its tokens.
        """
        hashes = self.world.collect(caption_hashes(batch.tokens[batch.valid]))
        if hashes is None:  # only the main rank's row is written
            return {}
        return {
            "repeated_pairs": self.pipeline.repeats(batch.position, self.global_batch),
            "repeated_captions": count_repeats(hashes.numpy()),
        }

    def close(self) -> None:
        self.loader.close()
        for source in self.pipeline.sources:
            source.close()


def _record_damage(sources: list[Source]) -> None:
    for source in sources:
        for shard in source.shards:
            if shard.cut:
                what = f"source {source.name!r}: {masked(shard.url)} is damaged: {damage(shard)}"
                action = (
                    f"{counted(shard.samples, 'sample')} before the damage {'is' if shard.samples == 1 else 'are'} used"
                )
                record_fault("data", what, action=action)


def plan_replay(replay: Replay, shape: StepShape, world: World) -> Plan:
    """The same tier on every rank, by the tightest budget and the fullest node of any; collective.

    Raises:
        UserError: no tier fits.
    """
    everywhere = world.gather((socket.gethostname(), budgets(replay, world.device)))
    local_ranks = max(Counter(host for host, _ in everywhere).values())
    return choose_tier(replay, shape, tightest([budget for _, budget in everywhere]), local_ranks=local_ranks)


def _require_equal(identities: list[dict[str, Any]]) -> None:
    """Every rank means the same by a position."""
    for rank, identity in enumerate(identities):
        different = [key for key in identity if identity[key] != identities[0][key]]
        if different:
            key = different[0]
            raise SharedError(
                f"rank {rank} sees other data than rank 0: {key} is {identity[key]}, not {identities[0][key]}; let "
                "data.index_dir name a folder that all nodes share, or make the shards and their indexes the same"
            )


class Skips:
    """Masked samples of all ranks: counted by source and cause, named in the log and in skipped.jsonl, bounded."""

    def __init__(self, config: Config, counts: dict[str, int], world: World) -> None:
        self.counts = Counter(counts)
        self._bound = config.data.max_bad_fraction
        self._from = min(_BAD_FRACTION_AFTER, config.train.samples)
        self._world = world
        self._failing: set[str] = set()  # shards that have a row in faults.jsonl
        self._file = Path(config.run.dir, "skipped.jsonl")
        self._rows = GrowingFile(self._file, lines=True)

    def begin(self, position: int) -> None:
        """Drop the rows of the steps that will be done again."""
        if self._world.is_main:
            keep_rows(self._file, lambda row: row["position"] < position)

    def close(self) -> None:
        self._rows.close()

    def account(self, batch: StepBatch, *, masked: bool, seen: int) -> None:
        """Take in one step; collective if any slot of any rank is `masked`.

        Raises:
            SharedError: of the `seen` samples so far more than data.max_bad_fraction were masked.
        """
        if masked:
            skips = sorted(skip for part in self._world.gather(batch.skips) for skip in part)
            for skip in skips[: max(0, _NAMED_SKIPS - self.counts.total())]:
                tell(f"masked sample {skip.key} of {skip.shard} at position {skip.position}: {skip.detail}")
            if self._world.is_main:
                self._rows.add("".join(f"{json.dumps(skip._asdict())}\n" for skip in skips).encode())
            for skip in skips:
                self._record_shard(skip)
            self.counts.update(f"{skip.source}: {skip.cause}" for skip in skips)
        bad = self.counts.total()
        if bad == seen or (seen >= self._from and bad > self._bound * seen):
            table = self.counts.most_common()
            for cause, count in table:
                tell(f"{count:>12,}  {cause}")
            causes = ", ".join(f"{cause}: {count}" for cause, count in table)
            raise SharedError(
                f"{bad} of {counted(seen, 'sample')} could not be used ({causes}), more than "
                f"data.max_bad_fraction={self._bound}; see {self._file}, mend the shards or raise the bound"
            )

    def _record_shard(self, skip: Skip) -> None:
        """A row of faults.jsonl for each shard that fails, at its first sample: it is more than a bad sample."""
        if skip.cause in _OF_A_SHARD and skip.shard not in self._failing:
            self._failing.add(skip.shard)
            what = f"shard {skip.shard}, first at position {skip.position}: {skip.detail}"
            record_fault("data", what, action="its samples are masked")
