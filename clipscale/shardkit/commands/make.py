"""`make`: shards from pictures with captions: a CSV, TSV or JSONL list, or a folder with side-by-side .txt.

Flow: the source gives rows (picture path, caption, label) and refusals -> rows are put in random order -> each picture
is read and decoded once, as training will, to prove that it can be -> its bytes, or a smaller picture, go into the
shards. What cannot be used is counted by cause and listed in <output>/refused.jsonl. Sources: shardkit/inputs.py;
pictures: pictures.py; shards: packing.py.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

from rich.console import Console
from rich.text import Text

from clipscale.escape import escaped
from clipscale.shardkit.columns import Keys
from clipscale.shardkit.commands.options import path
from clipscale.shardkit.commands.packing import add_packing, destination_of, encoding_of, print_written
from clipscale.shardkit.inputs import PassedOver, Refusal, Row, in_random_order, read_source

WHAT = "pack pictures with captions into shards"
DESCRIPTION = """\
Pack pictures and captions into WebDataset shards, as they are or made smaller. Every picture is
decoded once, and what cannot be used is counted by cause."""
EXAMPLES = """\
examples:
  PROGRAM captions.csv --output shards
      the columns filepath (or path, file_name, image, ...) and caption (or title, text); a header without them, or
      with several of them, asks for --image-key and --caption-key; without a header exactly two columns, path and
      caption; paths are relative to the list's folder
  PROGRAM captions.csv --output shards256 --resize 256 --format jpg
      JPEGs with a shorter side of 256 pixels
  PROGRAM labels.jsonl --output shards --prefix test --image-key image --label-key label
  PROGRAM pictures/ --output shards --prefix validation
      every picture below pictures/ that has a caption beside it: a/cat.jpg and a/cat.txt; hidden files and other
      formats are passed over and counted

The result: <output>/<prefix>-0000.tar, ..., each sample as <9 digits>.jpg/.png/.webp, .txt, .cls (with --label-key) and
.json (key, uid, filepath, width, height, original_width, original_height, sha256 of the original file), and
<output>/refused.jsonl, one line for each row or file that could not be used. Equal input gives equal bytes, whatever
the number of processes.

Without --resize and --format pictures keep their bytes, with EXIF and colour profile (training reads neither, unless
data.exif=apply). With one of them all pictures come out upright; those that change are encoded anew without metadata,
transparency on white.
exit status: 0 shards written; 2 wrong arguments or input, or no usable sample.
"""
LEFT = "no shard was added"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", type=path, help="list ending in .csv, .tsv or .jsonl, or a folder of pictures with .txt beside them")
    add("--image-key", metavar="NAME", help="column of the picture path, default: the one known name")
    add("--caption-key", metavar="NAME", help="column of the caption, default: caption, title or text")
    add("--label-key", metavar="NAME", help="column of an integer class label, which goes into .cls")
    add_packing(parser, prefix="train")


def run(arguments: argparse.Namespace) -> int:
    start = time.perf_counter()
    to = destination_of(arguments)
    keys = Keys(arguments.image_key, arguments.caption_key, arguments.label_key)
    rows, refusals, passed_over = read_rows(arguments.source, keys)
    if arguments.shuffle:
        rows = in_random_order(rows, arguments.seed)
    from clipscale.shardkit.packing import pack  # with torch

    written = pack(rows, refusals, to, encoding_of(arguments), arguments.jobs)
    print_written(written, passed_over, arguments.output, arguments.source, time.perf_counter() - start)
    return 0


def read_rows(source: Path, keys: Keys) -> tuple[list[Row], list[Refusal], list[PassedOver]]:
    rows, refusals, passed_over, seen = [], [], [], set()
    with Console(stderr=True).status(Text(escaped(f"reading {source}"))):
        for row in read_source(source, keys):
            if isinstance(row, Refusal):
                refusals.append(row)
            elif isinstance(row, PassedOver):
                passed_over.append(row)
            elif (pair := (os.path.normpath(row.path), row.caption)) in seen:
                refusals.append(Refusal(row.name, "duplicate row", row.place))
            else:
                seen.add(pair)
                rows.append(row)
    return rows, refusals, passed_over
