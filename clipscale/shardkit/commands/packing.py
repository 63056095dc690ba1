"""What the commands that pack pictures into shards have in common: their options, and what they tell at the end.

add_packing(parser, prefix="train")
destination = destination_of(parser.parse_args())
print_written(written, destination.output, source, seconds)
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from clipscale.errors import UserError
from clipscale.escape import escaped
from clipscale.shardkit.commands.options import add_jobs, add_max_pixels, natural, path, positive, quality
from clipscale.shardkit.destination import Destination
from clipscale.shardkit.inputs import PassedOver
from clipscale.tell import say
from clipscale.words import counted

if TYPE_CHECKING:
    from clipscale.shardkit.packing import Written
    from clipscale.shardkit.pictures import Encoding


def add_packing(parser: argparse.ArgumentParser, prefix: str) -> None:
    add = parser.add_argument
    add("--output", type=path, required=True, metavar="DIR", help="folder for the shards (made if absent)")
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
    add_max_pixels(parser)
    add_jobs(parser)


def destination_of(arguments: argparse.Namespace) -> Destination:
    """Raises UserError if it cannot be one, or holds what is not to be replaced: before the work."""
    to = Destination(arguments.output, arguments.prefix, arguments.samples_per_shard, arguments.overwrite)
    to.old_shards()
    return to


def encoding_of(arguments: argparse.Namespace) -> Encoding:
    from clipscale.shardkit.pictures import Encoding

    only_shrink = not arguments.enlarge
    return Encoding(arguments.max_pixels, arguments.resize, only_shrink, arguments.format, arguments.quality)


def print_written(written: Written, passed_over: list[PassedOver], output: Path, source: Path, seconds: float) -> None:
    """Tell what was written, refused and passed over.

    Raises:
        UserError: nothing was written.
    """
    table = Table("", "count", "first one")
    table.columns[1].justify = "right"
    table.add_row("written", f"{written.samples:,}", "")
    left_out = [(f"refused: {refusal.cause}", f"{refusal.name} {refusal.place}") for refusal in written.refusals]
    left_out += [(f"passed over: {passed.cause}", passed.name) for passed in passed_over]
    first = dict(reversed(left_out))
    for cause, count in Counter(cause for cause, _ in left_out).most_common():
        table.add_row(Text(escaped(cause)), f"{count:,}", Text(escaped(first[cause].strip())))
    Console().print(table)
    if not written.samples:
        why = f"see {output / 'refused.jsonl'}" if written.refusals else "it holds no picture and no row"
        raise UserError(f"no usable sample in {source}; {why}")
    paths = written.paths
    names = paths[0].name if len(paths) == 1 else f"{len(paths)} shards, {paths[0].name} to {paths[-1].name}"
    mebibytes = sum(path.stat().st_size for path in paths) / 2**20
    speed = f"{seconds:.1f} s, {(written.samples + len(written.refusals)) / seconds:,.0f} a second"
    say(f"{output}: {counted(written.samples, 'sample')} in {names}, {mebibytes:,.1f} MiB ({speed})")
