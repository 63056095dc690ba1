"""Build WebDataset shards from pictures with captions: a CSV, TSV or JSONL list, or a folder with side-by-side .txt.

    python data_tools/make_shards.py captions.csv --output shards
    python data_tools/make_shards.py pictures/ --output shards --prefix validation --resize 256

Flow: the source gives rows (picture path, caption, label) and refusals -> rows are shuffled -> each picture is read and
decoded once, as training will, to prove that it can be -> its bytes, or a smaller picture, go into the shards. What
cannot be used is counted by cause and listed in <output>/refused.jsonl. Sources: clipscale/shardkit/inputs.py;
pictures: pictures.py; shards: packing.py.
"""

import argparse
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.text import Text

from clipscale.shardkit.commands import add_packing, packing_of, report, run
from clipscale.shardkit.inputs import Keys, Refusal, Row, read_source
from clipscale.shardkit.packing import pack, shuffled

EXAMPLES = """\
examples:
  python data_tools/make_shards.py captions.csv --output shards
      the columns filepath and caption, or the first two; paths are relative to the list's folder
  python data_tools/make_shards.py captions.csv --output shards256 --resize 256 --format jpg
      JPEGs with a shorter side of 256 pixels
  python data_tools/make_shards.py labels.jsonl --output shards --prefix test --image-key image --label-key label
  python data_tools/make_shards.py pictures/ --output shards --prefix validation
      every picture below pictures/ that has a caption beside it: a/cat.jpg and a/cat.txt

The result: <output>/<prefix>-0000.tar, ..., each sample as <9 digits>.jpg/.png/.webp, .txt, .cls (with --label-key) and
.json (key, uid, filepath, width, height, original_width, original_height, sha256 of the original file), and
<output>/refused.jsonl, one line for each row or file that could not be used. Equal input gives equal bytes, whatever
the number of processes.

Without --resize and --format pictures keep their bytes, with EXIF and colour profile (training reads neither, unless
data.exif=apply). With one of them all pictures come out upright; those that change are encoded anew without metadata,
transparency on white.
exit status: 0 shards written; 2 wrong arguments or input, or no usable sample.
"""


def make_shards(arguments: argparse.Namespace) -> int:
    start = time.perf_counter()
    to, recipe = packing_of(arguments)
    to.old_shards()  # a refusal comes before the work
    rows, refusals = read_rows(arguments)
    if arguments.shuffle:
        rows = shuffled(rows, arguments.seed)
    written = pack(rows, refusals, to, recipe, arguments.jobs)
    return report("make_shards.py", written, arguments, time.perf_counter() - start)


def read_rows(arguments: argparse.Namespace) -> tuple[list[Row], list[Refusal]]:
    keys = Keys(arguments.image_key, arguments.caption_key, arguments.label_key)
    rows, refusals, seen = [], [], set()
    with Console(stderr=True).status(Text(f"reading {arguments.source}")):
        for row in read_source(arguments.source, keys):
            if isinstance(row, Refusal):
                refusals.append(row)
            elif (row.path, row.caption) in seen:
                refusals.append(Refusal(row.name, "duplicate row", row.place))
            else:
                seen.add((row.path, row.caption))
                rows.append(row)
    return rows, refusals


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="make_shards.py",
        description="Pack pictures and captions into WebDataset shards, as they are or made smaller. Every picture is\n"
        "decoded once, and what cannot be used is counted by cause.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("source", type=Path, help="list ending in .csv, .tsv or .jsonl, or a folder of pictures with .txt beside them")
    add("--image-key", metavar="NAME", help="column of the picture path, default: filepath, else the first column")
    add("--caption-key", metavar="NAME", help="column of the caption, default: caption, else the second column")
    add("--label-key", metavar="NAME", help="column of an integer class label, which goes into .cls")
    add_packing(parser, prefix="train")
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    return run("make_shards.py", lambda: make_shards(arguments), left="no shard was added")


if __name__ == "__main__":
    sys.exit(main())
