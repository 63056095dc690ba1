"""The settings of `data` and `replay`: which samples, in which order, read and decoded how, and where they wait."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from omegaconf import MISSING

from clipscale.errors import require
from clipscale.paths import LocalFile, LocalPath, ShardUrls


@dataclass(frozen=True)
class Select:
    """Which samples of a source are used: settled when its shards are indexed, so that an epoch is a known number."""

    check: Literal["fast", "decode"] = "fast"  # decode: every picture is decoded to its end, once
    min_side: int = 0  # pixels of a picture's shorter side
    max_aspect: float | None = None  # longer side over shorter side
    uids: LocalFile | None = None  # file of the samples to keep: one uid a line, or DataComp's .npy
    uid_field: str = "uid"  # where a sample's JSON holds its uid; __key__: its key
    score_field: str | None = None  # a number in a sample's JSON, such as clip_b32_similarity_score
    min_score: float | None = None  # of score_field, at least
    max_score: float | None = None  # of score_field, at most

    def __post_init__(self) -> None:
        require(self.min_side >= 0, f"a source's select.min_side={self.min_side} must not be negative")
        require(
            self.max_aspect is None or self.max_aspect >= 1,
            f"a source's select.max_aspect={self.max_aspect} is the longer side over the shorter one: at least 1",
        )
        bounded = self.min_score is not None or self.max_score is not None
        require(
            bounded == (self.score_field is not None),
            f"a source's select.score_field={self.score_field} and its bounds select.min_score={self.min_score}, "
            f"select.max_score={self.max_score} belong together; set the field and at least one bound, or none",
        )


EXTRA = "extra:"  # before a caption's name in `caption_weights`: it lies in the extra shards


@dataclass(frozen=True)
class Extra:
    """Further captions of the same samples, in local shards of their own: one for each of the source's shards."""

    urls: ShardUrls = MISSING  # as many as the source's, in the same order
    uid_field: str = "__key__"  # what says which samples are the same: their keys, or a text in the JSON of both


@dataclass(frozen=True)
class SourceSettings:
    """A set of shards, under a name of one's own; several are mixed by their weights."""

    urls: ShardUrls = MISSING  # shards: braces, globs, several joined by '::'
    weight: float = 1.0  # share of the samples, relative to the other sources
    caption: str = "txt"  # the member that holds the caption, by its suffix; 'json:<field>' for a field of the JSON
    captions: Literal["whole", "first", "random"] = "whole"  # of a text with several lines, or a JSON list
    # several members instead of `caption`, each with its weight: {txt: 1, json:recaption: 2}; one drawn by position
    caption_weights: dict[str, float] | None = None
    extra: Extra | None = None  # shards with further captions, named extra:txt, extra:json:<field> in caption_weights
    counts: LocalFile | None = None  # usable samples of each remote shard, JSON: sizes.json or {shard name: number}
    select: Select = field(default_factory=Select)

    def __post_init__(self) -> None:
        require(self.weight >= 0, f"a source's weight={self.weight} must not be negative; 0 switches it off")
        require_member("a source's caption", self.caption)
        if self.caption_weights is not None:
            self._check_weights(self.caption_weights)
        names = self.caption_shares
        require(
            self.extra is None or any(name.startswith(EXTRA) for name in names),
            "a source's extra is set, and its caption_weights has no caption of it; name one, such as extra:txt",
        )

    def _check_weights(self, weights: dict[str, float]) -> None:
        require(
            bool(weights),
            "a source's caption_weights={} names no caption; write each with its weight, such as {txt: 1, "
            "json:recaption: 2}, or null",
        )
        require(
            self.caption == SourceSettings.caption,
            f"a source's caption={self.caption!r} and its caption_weights are both set; name all captions in "
            "caption_weights, and leave caption out",
        )
        for caption, weight in weights.items():
            member = caption.removeprefix(EXTRA)
            require(
                member == caption or self.extra is not None,
                f"a source's caption_weights has {caption}, and its extra is null; name the shards in extra.urls",
            )
            require_member("a name in a source's caption_weights", member)
            require(
                member.startswith("json:") or ":" not in member,
                f"a name in a source's caption_weights={caption!r} is no member's suffix, such as txt, and no "
                "json:<field>",
            )
            require(
                0 < weight < math.inf,
                f"a source's caption_weights has {caption}: {weight}; a weight must be above 0: leave out what is not "
                "to be drawn",
            )
        require(
            bool(self.own_captions),
            "a source's caption_weights has captions of the extra shards only; name one of the samples' own too, such "
            "as txt, for those that the extra shards lack",
        )

    @property
    def own_captions(self) -> dict[str, float] | None:
        """`caption_weights` without what lies in extra shards."""
        weights = self.caption_weights
        return weights and {name: weight for name, weight in weights.items() if not name.startswith(EXTRA)}

    @property
    def caption_shares(self) -> dict[str, float]:
        """Each caption that a sample may give, and how often it is drawn where a sample has all of them; sum 1."""
        weights = self.caption_weights or {self.caption: 1.0}
        return {caption: weight / sum(weights.values()) for caption, weight in weights.items()}


def require_member(what: str, caption: str) -> None:
    """Raise UserError unless a caption can be there: `what` says which setting it is."""
    require(
        caption.removeprefix("json:") != "",
        f"{what}={caption!r} must be a member's suffix, such as txt, or json:<field>",
    )


@dataclass(frozen=True)
class Shapes:
    """The procedural picture set that the quickstart trains on; built before training where absent."""

    dir: LocalPath = "runs/shapes"  # where its shards, class names and templates go
    train_samples: int = 20_000  # pairs of the 56 classes that are trained on
    validation_samples: int = 1_024  # held-out pairs of the same classes
    test_samples: int = 2_560  # labelled pictures of all 64 classes
    image_size: int = 32  # pixels of a side
    seed: int = 0  # of what is drawn
    shuffle_captions: bool = False  # the control experiment: captions say nothing about their pictures


@dataclass(frozen=True)
class Fetch:
    """How remote shards come into the local cache."""

    stall_seconds: float = 30.0  # without a byte for so long, an attempt is given up
    retries: int = 6  # further attempts, each after a longer pause
    backoff_seconds: float = 1.0  # the first pause; each next one is twice as long, up to a minute
    again_seconds: float = 10.0  # before a failed shard is asked for again; doubled, up to 5 minutes
    parallel: int = 4  # downloads ahead at a time, of each remote source on each rank

    def __post_init__(self) -> None:
        for name in ("stall_seconds", "backoff_seconds", "again_seconds"):
            value = getattr(self, name)
            require(value > 0, f"data.fetch.{name}={value} must be above 0")
        require(self.retries >= 0, f"data.fetch.retries={self.retries} must not be negative")
        require(self.parallel >= 1, f"data.fetch.parallel={self.parallel} must be at least 1")


@dataclass(frozen=True)
class AugmentSettings:
    """Changes drawn for each position of the run, applied on the device that trains; the same in both passes."""

    flip: float = 0.0  # share of the pictures that are mirrored left to right
    color_jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)  # brightness, contrast, saturation, hue
    color_jitter_prob: float = 0.8  # share of the pictures that are jittered
    grayscale: float = 0.0  # share of the pictures that lose their colours

    def __post_init__(self) -> None:
        for name in ("flip", "color_jitter_prob", "grayscale"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"data.augment.{name}={value} must lie in [0, 1]")
        *factors, hue = self.color_jitter
        require(
            min(factors) >= 0 and 0 <= hue <= 0.5,
            f"data.augment.color_jitter={list(self.color_jitter)} must not be negative, and its hue at most 0.5",
        )


@dataclass(frozen=True)
class Data:
    """Which shards are trained on, in which order, and how they are read and decoded."""

    sources: dict[str, SourceSettings] = field(default_factory=dict)  # each under a name of one's own
    shapes: Shapes | None = None  # null: no picture set is drawn
    index_dir: LocalPath | None = None  # where index sidecars go; default: beside each shard, else the cache folder
    index_jobs: int | None = None  # processes that index shards; default: the cores
    hash: Literal["crc32", "sha256"] = "crc32"  # of a shard's bytes, in its index
    cache_dir: LocalPath | None = None  # copies of remote shards; default: the user's cache folder
    cache_bytes: int | None = None  # bound of those copies; default: 80 % of the disk's free space and what they take
    fetch: Fetch = field(default_factory=Fetch)
    allow_pipe: bool = False  # let 'pipe:' URLs run shell commands
    sampling: Literal["epochs", "resampled"] = "epochs"  # each sample once an epoch, or shards drawn with replacement
    streams: int | None = None  # V of the sample order; default: from the number of shards, recorded
    block_shards: int | None = None  # K of the sample order; default: one block a stream
    epoch_boundary: Literal["straddle", "drop"] = "straddle"  # a batch over two epochs, or the remainder left out
    allow_repeats: bool = False  # an epoch shorter than the batch: the same pair several times in a batch
    accept_changes: bool = False  # resume although shards, seed, crop or decoders differ from the checkpoint's
    crop_scale: tuple[float, float] = (0.9, 1.0)  # share of the picture's area that the random crop keeps
    crop_ratio: tuple[float, float] = (0.75, 4 / 3)  # width over height of the random crop, before it is made square
    exif: Literal["ignore", "apply"] = "ignore"  # turn a picture as its EXIF says, or take its pixels as they lie
    scaled_decode: bool = False  # decode JPEGs at 1/2, 1/4 or 1/8 where the crop is at least twice the side wanted
    augment: AugmentSettings = field(default_factory=AugmentSettings)
    max_pixels: int = 50_000_000  # a picture whose header promises more is refused: a bound on memory too
    max_bad_fraction: float = 0.05  # more masked samples than this end the run
    max_refused_fraction: float | None = None  # of a source's samples, at indexing; null: max_bad_fraction
    loader: Literal["process", "inline"] = "process"  # decode in a process of its own, or in threads of this one
    threads: int = 2  # decode threads per rank
    prefetch_steps: int = 1  # step batches decoded ahead of the one that is trained on
    prefetch_bytes: int = 2**31  # bound of the pixels decoded ahead, per rank

    def __post_init__(self) -> None:
        low, high = self.crop_scale
        require(0 < low <= high <= 1, f"data.crop_scale={list(self.crop_scale)} must be 0 < low <= high <= 1")
        low, high = self.crop_ratio
        require(0 < low <= high, f"data.crop_ratio={list(self.crop_ratio)} must be 0 < low <= high")
        for name in ("threads", "max_pixels", "prefetch_steps", "prefetch_bytes"):
            value = getattr(self, name)
            require(value >= 1, f"data.{name}={value} must be at least 1")
        for name in ("max_bad_fraction", "max_refused_fraction"):
            value = getattr(self, name)
            require(value is None or 0 <= value <= 1, f"data.{name}={value} must lie in [0, 1]")
        for name in ("streams", "block_shards", "index_jobs", "cache_bytes"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"data.{name}={value} must be at least 1, or null")
        active = [name for name, source in self.sources.items() if source.weight > 0]
        require(
            bool(active) or not self.sources,
            "every data source has weight 0; set data.sources.<name>.weight of at least one above 0",
        )
        require(
            self.epoch_boundary == "straddle" or len(active) <= 1,
            "data.epoch_boundary=drop needs a single source (each of a mixture has its own epochs); use straddle",
        )


@dataclass(frozen=True)
class Replay:
    """Where a step's pixels wait for the second pass of gradient caching."""

    kind: Literal["auto", "gpu", "host", "disk", "recompute"] = "auto"  # auto: the first of gpu, host, disk that fits
    gpu_bytes: int | None = None  # of this rank's GPU; default: 5 % of its memory
    host_bytes: int | None = None  # of this node's memory, over its ranks; default: half of what is available
    disk_bytes: int | None = None  # of this node's replay.dir, over its ranks; default: 80 % of what is free
    dir: LocalPath | None = None  # folder on a fast local disk, for kind=disk

    def __post_init__(self) -> None:
        for name in ("gpu_bytes", "host_bytes", "disk_bytes"):
            value = getattr(self, name)
            require(value is None or value >= 0, f"replay.{name}={value} must not be negative; null for the default")
        require(
            self.kind != "disk" or self.dir is not None,
            "replay.kind=disk needs replay.dir, a folder on a fast local disk",
        )
