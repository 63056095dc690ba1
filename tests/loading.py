"""A pipeline over test shards, and its loader's batches as plain tensors that stay."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
import torch

from clipscale.config.data import Data, Replay, SourceSettings
from clipscale.data.load.fill import Skip
from clipscale.data.load.loader import Loader, Setup
from clipscale.data.load.replay_plan import Budgets, build_tier, choose_tier
from clipscale.data.load.shape import StepShape
from clipscale.data.pipeline import Pipeline, Share, build_pipeline

LENGTH = 24
CPU = torch.device("cpu")


def tokenize(captions: list[str]) -> torch.Tensor:
    """A one, as start of the text, and the characters of a caption."""
    rows = [[1, *map(ord, caption), *[0] * LENGTH][:LENGTH] for caption in captions]
    return torch.tensor(rows, dtype=torch.int64)


tokenize.name = "characters"


def pipeline(urls: str | dict[str, tuple[str, float]], batch: int, **kwargs) -> Pipeline:
    """Of the shards `urls`, or of several sources {name: (urls, weight)}; keywords are fields of `data`."""
    sources = {"mine": (urls, 1.0)} if isinstance(urls, str) else urls
    recorded, side = kwargs.pop("recorded", None), kwargs.pop("image_size", 24)
    data = Data(sources={name: SourceSettings(urls=u, weight=w) for name, (u, w) in sources.items()}, **kwargs)
    return build_pipeline(
        data, tokenize, image_size=side, context_length=LENGTH, seed=5, global_batch=batch, recorded=recorded
    )


def open_loader(
    pipe: Pipeline,
    batch: int,
    *,
    start: int = 0,
    world: int = 1,
    rank: int = 0,
    chunk: int = 20,
    ahead: int = 3,
    mode: str = "inline",
    threads: int = 2,
    tier: str = "host",
    folder: str | None = None,
    change=None,
    device: torch.device = CPU,
    pin: bool = False,
) -> Loader:
    share = Share(batch, world, rank)
    replay = Replay(kind=tier, dir=folder)
    shape = StepShape(share.slots, min(chunk, share.slots), pipe.image_size, ahead)
    gpu = 2**30 if device.type == "cuda" else None
    plan = choose_tier(replay, shape, Budgets(gpu, host=2**30, disk=2**30), local_ranks=world)
    setup = Setup(shape, plan.blocks, mode, threads, pin=pin or device.type == "cuda")
    return Loader(pipe, share, setup, build_tier(plan, replay, shape, device), start=start, change=change)


@dataclass
class Copy:
    """A StepBatch as plain tensors: taking the next one overwrites the tensors of the one before."""

    position: int
    positions: np.ndarray  # int64 [N]
    keys: list[str]  # [N]
    images: torch.Tensor  # uint8 [N, 3, S, S]
    tokens: torch.Tensor  # int32 [N, L]
    valid: torch.Tensor  # bool [N]
    skips: list[Skip]

    def chain(self, link: int = 0) -> int:
        """(position, key, pixel CRC, token CRC) of every slot in the order of positions, hashed one after another."""
        for i in np.argsort(self.positions):
            link = zlib.crc32(repr((int(self.positions[i]), self.keys[i])).encode(), link)
            link = zlib.crc32(self.tokens[i].numpy().tobytes(), zlib.crc32(self.images[i].numpy().tobytes(), link))
        return link


def read(pipe: Pipeline, steps: int, batch: int, start: int = 0, **kwargs) -> list[Copy]:
    """The next `steps` batches; both passes are walked, and must show the same."""
    loader = open_loader(pipe, batch, start=start, **kwargs)
    batches = [take(loader) for _ in range(steps)]
    loader.close()
    return batches


def take(loader: Loader) -> Copy:
    batch = next(loader)
    images = torch.cat([images.clone() for _, images in batch.images.first(CPU)])
    again = torch.cat([images.clone() for _, images in batch.images.again(CPU)])
    assert torch.equal(images, again)
    keys = keys_of(loader.pipeline, batch.positions)
    return Copy(batch.position, batch.positions, keys, images, batch.tokens.clone(), batch.valid.clone(), batch.skips)


def keys_of(pipe: Pipeline, positions: np.ndarray) -> list[str]:
    source, _, shard, index = pipe.locate(positions)
    return [pipe.sources[s].where(sh, i)[1] for s, sh, i in zip(source, shard, index, strict=True)]
