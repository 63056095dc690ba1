"""`inspect`: a contact sheet of a shard's samples, as PNG or as a page of HTML (shardkit/sheet.py)."""

from __future__ import annotations

import argparse

from clipscale.errors import require
from clipscale.files import whole_file
from clipscale.paths import shards_option
from clipscale.shardkit.commands.options import add_reading, captions_of, natural, path, positive
from clipscale.tell import say
from clipscale.words import counted

WHAT = "look into a shard: a contact sheet of its samples"
DESCRIPTION = "A contact sheet of a shard's samples with their captions or labels."
EXAMPLES = """\
examples:
  PROGRAM data/train-0000.tar --output sheet.png
      its first 24 samples
  PROGRAM data/train-0000.tar --output sheet.html --samples 100 --seed 1
      100 drawn at random; one file that any browser shows, whatever the language of the captions
  PROGRAM data/train-0000.tar --output sheet.png --start 5000 --samples 8 --columns 4

PNG letters are DejaVu Sans where the system has it, else Pillow's own: letters that the font lacks (Chinese,
Devanagari, emoji, ...) show as boxes. HTML shows them all.
exit status: 0 the sheet was written; 2 wrong arguments, or a shard that cannot be read.
"""
LEFT = "nothing was written"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("shard", type=shards_option, metavar="SHARD", help="path or URL (through the cache)")
    add("--output", type=path, required=True, metavar="FILE", help="ends in .png or .html")
    add("--samples", type=positive, default=24, metavar="N", help="default: 24")
    add("--start", type=natural, default=0, metavar="N", help="number of the first sample, default: 0")
    add("--seed", type=natural, metavar="N", help="draw samples at random, from --start on")
    add("--columns", type=positive, default=6, metavar="N", help="default: 6")
    add("--tile", type=positive, default=224, metavar="PIXELS", help="side of a tile, default: 224")
    add_reading(parser)


def run(arguments: argparse.Namespace) -> int:
    kind = arguments.output.suffix.lower()
    require(kind in (".png", ".html"), f"--output {str(arguments.output)!r}: must end in .png or .html")
    from clipscale.data.fetch.urls import expand_urls, masked

    urls, name = expand_urls(arguments.shard), masked(arguments.shard)
    require(len(urls) == 1, f"{name!r} names {counted(len(urls), 'shard')}: give one")
    from clipscale.shardkit.sheet import Look, draw_sheet, read_tiles, write_page  # with torch

    look = Look(captions_of(arguments), arguments.max_pixels, arguments.tile)
    wanted = (arguments.start, arguments.samples, arguments.seed)
    tiles, samples = read_tiles(urls[0], look, *wanted, arguments.cache_dir)
    broken = sum(tile.picture is None for tile in tiles)
    note = f"{len(tiles)} of {counted(samples, 'sample')}" + (f", {broken} without a picture" if broken else "")
    if kind == ".png":
        data = draw_sheet(tiles, arguments.columns, arguments.tile)
    else:
        data = write_page(tiles, name, note, arguments.columns, arguments.tile).encode()
    with whole_file(arguments.output, "wb") as file:
        file.write(data)
    say(f"{arguments.output}: {note}")
    return 0
