"""clipscale's loader as the data benchmarks call it: everything that knows its interface.

pipeline = open_pipeline("shards/*.tar", image_size=224)
loader = open_loader(pipeline, mode="process", threads=2)
pictures = receive(next(loader))
"""

from __future__ import annotations

import dataclasses
import threading
from contextlib import ExitStack
from typing import Literal

import torch

from clipscale.bench.common.stopwatch import Stopwatch
from clipscale.bench.data.baseline import MODEL
from clipscale.config.data import Data, SourceSettings
from clipscale.data.load import fill
from clipscale.data.load.blocks import Blocks, Layout
from clipscale.data.load.fill import Filler, Job
from clipscale.data.load.loader import SLOTS_PER_JOB, Loader, Setup, StepBatch
from clipscale.data.load.replay import Host
from clipscale.data.load.shape import StepShape
from clipscale.data.pipeline import Pipeline, Share, build_pipeline
from clipscale.data.pixels import decode
from clipscale.data.tokenize import build_tokenizer

Mode = Literal["process", "inline"]
MODES: tuple[Mode, ...] = ("process", "inline")
STEP = 2048  # pictures of a step
CHUNK = 256
_LENGTH = 77


def open_pipeline(urls: str, *, image_size: int, cache_dir: str | None = None) -> Pipeline:
    """One source with the defaults of `data`; shards are indexed where they are not yet."""
    data = Data(sources={"bench": SourceSettings(urls=urls)}, cache_dir=cache_dir, allow_repeats=True)
    return build_pipeline(
        data,
        build_tokenizer(MODEL, _LENGTH),
        image_size=image_size,
        context_length=_LENGTH,
        seed=0,
        global_batch=STEP,
    )


def open_loader(pipeline: Pipeline, *, mode: Mode, threads: int) -> Loader:
    """Steps of STEP pictures wait in the host tier, where nothing is copied; as many are decoded ahead."""
    shape = StepShape(STEP, CHUNK, pipeline.image_size, ahead=STEP // CHUNK)
    setup = Setup(shape, blocks=shape.chunks + shape.ahead, mode=mode, threads=threads)
    return Loader(pipeline, Share(STEP), setup, Host(), start=0)


def receive(batch: StepBatch) -> int:
    """Walk through a step's pictures, as pass 1 does; how many there were."""
    return sum(len(images) for _, images in batch.images.first(torch.device("cpu")))


def fill_with(watch: Stopwatch, pipeline: Pipeline, pictures: int) -> None:
    """What a decode thread of the loader does, on one thread, with its parts timed apart."""
    source = pipeline.sources[0]
    read, caption = watch.wrap("read", source.read), watch.wrap("tokenize", pipeline.tokenize)
    layout = Layout(1, SLOTS_PER_JOB, pipeline.image_size, pipeline.context_length)
    blocks = Blocks.make(layout)
    filler = Filler(dataclasses.replace(pipeline, tokenize=caption), Share(STEP), blocks, threads=1)
    job = watch.wrap("order and rest", filler._fill)

    def work() -> None:
        torch.set_num_threads(1)
        for number in range(pictures // SLOTS_PER_JOB):
            step, start = divmod(number * SLOTS_PER_JOB, STEP)
            job(Job(number, 0, 0, step * STEP, start, start + SLOTS_PER_JOB))

    with ExitStack() as stack:
        stack.enter_context(watch.inside(fill, "load_picture", "decode"))
        stack.enter_context(watch.inside(decode, "crop_and_resize", "crop and resize"))
        stack.enter_context(watch.inside(fill, "checksum", "checksum"))
        source.read = read
        stack.callback(vars(source).pop, "read")
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    filler.close()
    blocks.close()
