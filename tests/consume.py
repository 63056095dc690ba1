"""Reads step batches for ever, all ranks of a world in turn, and writes down what it saw; run by test_hash_chain.py."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator

import numpy as np
from loading import Copy, open_loader, pipeline, take

BATCH, STREAMS = 30, 6


def links(batch: Copy) -> list[tuple[int, str, int, int]]:
    """(position, key, pixel CRC, token CRC) of each slot."""
    crcs = ([zlib.crc32(row.numpy().tobytes()) for row in rows] for rows in (batch.images, batch.tokens))
    return list(zip(batch.positions.tolist(), batch.keys, *crcs, strict=True))


def chain(step_links: list[list[tuple[int, str, int, int]]]) -> int:
    """One hash over everything, in the order of positions."""
    value = 0
    for step in step_links:
        for link in sorted(step):
            value = zlib.crc32(repr(tuple(link)).encode(), value)
    return value


def see(urls: str, *, start: int = 0, world: int = 1, **how) -> Iterator[list]:
    """The links of step after step."""
    pipe = pipeline(urls, BATCH, streams=STREAMS, crop_scale=(0.5, 1.0))
    loaders = [open_loader(pipe, BATCH, start=start * BATCH, world=world, rank=r, **how) for r in range(world)]
    try:
        while True:
            batches = [take(loader) for loader in loaders]
            assert np.unique(np.concatenate([batch.positions for batch in batches])).size == BATCH
            yield sorted(link for batch in batches for link in links(batch))
    finally:
        for loader in loaders:
            loader.close()


def consume(urls: str, out: str, first: str, world: str, mode: str) -> None:
    """Appends [step, links] to the file `out`, a line each, from step `first` on."""
    with open(out, "a") as file:
        for step, seen in enumerate(see(urls, start=int(first), world=int(world), mode=mode), int(first)):
            print(json.dumps([step, seen]), file=file, flush=True)
