"""What the commands in data_tools have in common.

return run("make_shards.py", work, left="no shard was added")     # exit status; errors as one line

parser = argparse.ArgumentParser(...)
add_packing(parser, prefix="train")
destination, recipe = packing_of(parser.parse_args())
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from clipscale.config_data import Data
from clipscale.errors import UserError
from clipscale.pool import cores
from clipscale.shardkit.packing import Destination, Written, printable
from clipscale.shardkit.pictures import Recipe


def run(program: str, work: Callable[[], int], left: str) -> int:
    """work()'s exit status; 2 after an error, told in one line; 130 after Ctrl-C, with what it `left`."""
    try:
        return work()
    except (UserError, OSError) as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{program}: interrupted, {left}", file=sys.stderr)
        return 130


def add_jobs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--jobs", type=positive, default=cores(), metavar="N", help="processes, default: the cores (here %(default)s)"
    )


def add_packing(parser: argparse.ArgumentParser, prefix: str) -> None:
    """The options of every command that writes shards."""
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="DIR", help="folder for the shards (made if absent)")
    add(
        "--prefix", default=prefix, help="of PREFIX-0000.tar, ...; '' for img2dataset's 00000.tar; default: %(default)s"
    )
    add("--samples-per-shard", type=positive, default=10_000, metavar="N", help="default: 10000")
    add("--overwrite", action="store_true", help="replace shards of this prefix in the output folder")
    add("--seed", type=natural, default=0, metavar="N", help="of the order, default: 0")
    add("--no-shuffle", dest="shuffle", action="store_false", help="keep the order of the source")
    add("--resize", type=positive, metavar="PIXELS", help="make the shorter side so long; smaller pictures stay")
    add("--enlarge", action="store_true", help="with --resize: smaller pictures grow")
    add("--format", choices=("keep", "jpg", "webp"), default="keep", help="of the pictures in shards, default: keep")
    add("--quality", type=quality, default=95, metavar="Q", help="1 to 100, of pictures encoded anew; default: 95")
    add("--max-pixels", type=positive, default=Data.max_pixels, metavar="N", help="refuse larger; default: %(default)s")
    add_jobs(parser)


def packing_of(arguments: argparse.Namespace) -> tuple[Destination, Recipe]:
    to = Destination(arguments.output, arguments.prefix, arguments.samples_per_shard, arguments.overwrite)
    only_shrink = not arguments.enlarge
    return to, Recipe(arguments.max_pixels, arguments.resize, only_shrink, arguments.format, arguments.quality)


def report(program: str, written: Written, arguments: argparse.Namespace, seconds: float) -> int:
    """Tell what was written and refused; the exit status."""
    table = Table("", "count", "first one")
    table.columns[1].justify = "right"
    table.add_row("written", f"{written.samples:,}", "")
    first = {refusal.cause: refusal for refusal in reversed(written.refusals)}
    for cause, count in Counter(refusal.cause for refusal in written.refusals).most_common():
        shown = f"{printable(first[cause].name)} {first[cause].place}".strip()
        table.add_row(f"refused: {cause}", f"{count:,}", Text(shown))
    Console().print(table)
    if not written.samples:
        why = f"see {arguments.output / 'refused.jsonl'}" if written.refusals else "it holds no picture and no row"
        print(f"{program}: error: no usable sample in {arguments.source}; {why}", file=sys.stderr)
        return 2
    paths = written.paths
    names = paths[0].name if len(paths) == 1 else f"{len(paths)} shards, {paths[0].name} to {paths[-1].name}"
    mebibytes = sum(path.stat().st_size for path in paths) / 2**20
    speed = f"{seconds:.1f} s, {(written.samples + len(written.refusals)) / seconds:,.0f} a second"
    print(f"{arguments.output}: {written.samples:,} samples in {names}, {mebibytes:,.1f} MiB ({speed})")
    return 0


def shown(text: str, limit: int) -> str:
    """Text of unknown origin for a terminal: one line, cut, control characters as escapes."""
    cut = text if len(text) <= limit else text[: limit - 3] + "..."
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in cut)


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return int(text)


def natural(text: str) -> int:
    if not 0 <= int(text) < 2**64:
        raise argparse.ArgumentTypeError(f"{text} is not 0 to 2^64 - 1")
    return int(text)


def quality(text: str) -> int:
    if not 1 <= int(text) <= 100:
        raise argparse.ArgumentTypeError(f"{text} is not 1 to 100")
    return int(text)
