"""The shapes set (procedural pictures with captions) as shards; the drawing is data/shapes/make.py's."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from clipscale.progress import progress_bar
from clipscale.shardkit.commands.options import path
from clipscale.tell import say
from clipscale.words import counted

DESCRIPTION = """\
Draw the shapes set: 64 (colour, shape) classes, 8 of which only the zero-shot test shows.
Equal arguments give equal bytes; a folder that already holds the set is left as it is."""
EXAMPLES = """\
examples:
  PROGRAM shapes
      20,000 training pictures of 32 pixels in 8 shards, with validation and zero-shot test shards
  PROGRAM shapes64 --train-samples 1000000 --shards 100 --image-size 64
  PROGRAM control --shuffle-captions
      the control experiment: training captions change places, so zero-shot accuracy must stay at chance

The folder then holds train-NNNN.tar, validation-0000.tar, test-NNNN.tar (with .cls labels), classnames.txt,
unseen.txt (the classes that never occur in training), templates.txt and shapes.json.
"""
LEFT = "nothing was left behind"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=path, help="where the set goes (made if absent)")
    parser.add_argument("--train-samples", type=int, default=20_000, metavar="N", help="default: 20000")
    parser.add_argument("--validation-samples", type=int, default=1_024, metavar="N", help="default: 1024")
    parser.add_argument("--test-samples", type=int, default=2_560, metavar="N", help="default: 2560, 40 per class")
    parser.add_argument(
        "--image-size", type=int, default=32, metavar="PIXELS", help="side of the pictures, default: 32"
    )
    parser.add_argument(
        "--image-format", choices=("jpg", "png"), default="jpg", help="jpg (quality 95, default) or png"
    )
    parser.add_argument("--shards", type=int, default=8, metavar="N", help="number of training shards, default: 8")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="another seed, other pictures; default: 0")
    parser.add_argument("--shuffle-captions", action="store_true", help="give training pictures each other's captions")


def run(arguments: argparse.Namespace) -> int:
    from clipscale.data.shapes.make import make_shapes

    settings = dict(vars(arguments))
    folder = settings.pop("folder")
    start, written = time.perf_counter(), 0
    with progress_bar("drawing") as bar:

        def progress(done: int, total: int) -> None:
            nonlocal written
            written = done
            bar(done, total)

        make_shapes(folder, **settings, progress=progress)
    say(summary(folder, written, time.perf_counter() - start))
    return 0


def summary(folder: Path, written: int, seconds: float) -> str:
    shards = sorted(folder.glob("*.tar"))
    classes, unseen = (len((folder / name).read_text().splitlines()) for name in ("classnames.txt", "unseen.txt"))
    if written:
        work = f"{counted(written, 'picture')} in {seconds:.1f} s ({written / seconds:,.0f} a second)"
    else:
        work = "already complete, nothing to do"
    mebibytes = sum(shard.stat().st_size for shard in shards) / 2**20
    held = (
        f"{classes} classes, {unseen} of them never in training; {counted(len(shards), 'shard')}, {mebibytes:.1f} MiB"
    )
    return f"{folder}: {work}; {held}"
