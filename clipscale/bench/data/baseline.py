"""open_clip's training input, rebuilt on webdataset's own pieces: what the loader is measured against.

    loader = baseline_loader(urls, Baseline(workers=2, batch=64))   # yields [float32 [64, 3, 224, 224], int64 [64, 77]]
    loader = baseline_loader(urls, Baseline(workers=2, batch=64, pixels="uint8"))

The stages, their order and their numbers are those of `get_wds_dataset` in open_clip_train/data.py (open_clip 3.3); the
transform and the tokenizer are open_clip's own objects. Its module itself is not imported: its tar reader fails on
webdataset 1.0.2 (`KeyError: 'fname'`), whose `tarfile_to_samples` stands in its place. Two things differ. The list of
shards is repeated, so that no epoch ends while its rate is measured; and `uint8` leaves out the two last steps of the
transform, the conversion to float32 and the normalisation.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import open_clip
import torch
import webdataset
from open_clip.transform import image_transform
from torchvision.transforms import Compose, Normalize, PILToTensor, RandomResizedCrop
from webdataset.autodecode import imagehandler
from webdataset.filters import default_collation_fn

Pixels = Literal["float32", "uint8"]
MODEL = "ViT-B-32"  # whose tokenizer and transform are taken
_SHARDS_IN_ALL = 100_000


@dataclass(frozen=True)
class Baseline:
    """open_clip's constants where there are any."""

    workers: int
    batch: int
    pixels: Pixels = "float32"
    image_size: int = 224
    shard_shuffle: int = 2000
    shard_shuffle_initial: int = 500
    sample_shuffle: int = 5000
    sample_shuffle_initial: int = 1000

    @property
    def filling_batches(self) -> int:
        """Of all workers, until their shuffle buffers are full; each reads two samples for one until then."""
        samples = self.sample_shuffle - min(self.sample_shuffle_initial, self.sample_shuffle)
        return self.workers * -(-samples // self.batch)


@dataclass(frozen=True)
class Parts:
    """What works on one sample or one batch: apart, so that each can be timed."""

    decode: Callable[[str, bytes], Any]
    crop: Callable[[Any], Any]
    convert: Callable[[Any], torch.Tensor]
    tokenize: Callable[[str], torch.Tensor]
    collate: Callable[[list[tuple]], Any]

    @classmethod
    def of(cls, settings: Baseline) -> Parts:
        crop, convert = transform(settings.pixels, settings.image_size)
        tokenize = partial(_tokenize, open_clip.get_tokenizer(MODEL))
        return cls(imagehandler("pilrgb"), crop, convert, tokenize, default_collation_fn)


def baseline_loader(urls: list[str], settings: Baseline) -> webdataset.WebLoader:
    """An endless loader of [images, tokens]; its workers start with the first iteration and stay."""
    return webdataset.WebLoader(
        pipeline(urls, settings, Parts.of(settings)),
        batch_size=None,
        shuffle=False,
        num_workers=settings.workers,
        persistent_workers=settings.workers > 0,
    )


def pipeline(urls: list[str], settings: Baseline, parts: Parts) -> webdataset.DataPipeline:
    """What one worker does."""
    return webdataset.DataPipeline(
        webdataset.SimpleShardList(urls * -(-_SHARDS_IN_ALL // len(urls))),
        webdataset.shuffle(settings.shard_shuffle, initial=settings.shard_shuffle_initial, seed=0),
        webdataset.split_by_node,
        webdataset.split_by_worker,
        webdataset.tarfile_to_samples(handler=log_and_continue),
        webdataset.shuffle(settings.sample_shuffle, initial=settings.sample_shuffle_initial),
        webdataset.select(_has_picture_and_caption),
        webdataset.decode(parts.decode, handler=log_and_continue),
        webdataset.rename(image="jpg;png;jpeg;webp", text="txt"),
        webdataset.map_dict(image=Compose([parts.crop, parts.convert]), text=parts.tokenize),
        webdataset.to_tuple("image", "text"),
        webdataset.batched(settings.batch, collation_fn=parts.collate, partial=False),
    )


def transform(pixels: Pixels, image_size: int) -> tuple[Compose, Compose]:
    """open_clip's training transform in two: random resized crop by Pillow, RGB; and to float32 in [0, 1], normalised.

    uint8: the second part makes a tensor of the picture and no more.
    """
    crop, to_rgb, to_float, normalise = image_transform(image_size, is_train=True).transforms
    assert isinstance(crop, RandomResizedCrop), "open_clip's transform has changed"
    assert isinstance(normalise, Normalize), "open_clip's transform has changed"
    return Compose([crop, to_rgb]), Compose([to_float, normalise] if pixels == "float32" else [PILToTensor()])


def log_and_continue(error: Exception) -> bool:
    logging.warning(f"open_clip recipe: {error!r}, ignored")
    return True


def _has_picture_and_caption(sample: dict[str, Any]) -> bool:
    return "txt" in sample and any(suffix in sample for suffix in ("png", "jpg", "jpeg", "webp"))


def _tokenize(tokenizer: Callable[[str], torch.Tensor], text: str) -> torch.Tensor:
    return tokenizer(text)[0]
