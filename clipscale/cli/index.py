"""`clipscale index`: its options, which are the settings of a source and of its index, and what it tells at the end."""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from clipscale.config.data import Data, Extra, Select, SourceSettings
from clipscale.errors import require
from clipscale.escape import escaped
from clipscale.paths import path_option, shards_option
from clipscale.shardkit.commands.options import add_caption
from clipscale.tell import say
from clipscale.words import counted

if TYPE_CHECKING:
    from clipscale.data import source

EXAMPLES = """\
examples:
  clipscale index 'shards/{0000..0999}.tar'
  clipscale index 'cc3m/*.tar' 'cc12m/*.tar' --index-dir index --check decode --jobs 16
  clipscale index 'laion/{00000..41454}.tar' --caption json:caption --min-side 128 --max-aspect 3
  clipscale index 'recap/*.tar' --caption txt --caption json:recaption
  clipscale index 'cc3m/*.tar' --caption txt --caption extra:txt --extra 'cc3m-recap/*.tar'
  clipscale index 'cc3m/*.tar' --refused refused.jsonl
  clipscale index 'datacomp/*.tar' --score-field clip_l14_similarity_score --min-score 0.3
"""
LEFT = "shards that were indexed stay so"


def run(arguments: argparse.Namespace, words: list[str]) -> int:
    listed = arguments.refused
    if isinstance(listed, str):
        require(listed.endswith(".jsonl"), f"--refused {listed!r} must end in .jsonl; shards come first, or after '--'")
        require(Path(listed).parent.is_dir(), f"--refused {listed!r}: {Path(listed).parent} is no folder")
    settings, data, need = index_settings(arguments)
    from clipscale.data.source import open_source
    from clipscale.progress import track

    renew = "all" if arguments.refresh else "changed"
    found = open_source("index", settings, data, need=need, track=track, ahead=True, renew=renew)
    if listed is not None:
        if listed is True:
            listed = str(Path(found.shards[0].sidecar).with_name("refused.jsonl"))
        say(f"{counted(found.write_refused(listed, data.index_jobs), 'refused sample')} listed in {listed}")
    print_report(found)
    return 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    select = Select()
    add_path = partial(parser.add_argument, type=path_option)
    parser.add_argument("shards", nargs="+", type=shards_option, metavar="SHARDS", help="paths, globs, braces or URLs")
    parser.add_argument("--need", choices=("pairs", "labelled"), default="pairs", help="captions, or labels (.cls)")
    parser.add_argument(
        "--check", choices=("fast", "decode"), default=select.check, help="decode: decode every picture, once"
    )
    parser.add_argument("--hash", choices=("crc32", "sha256"), default="crc32", help="of each shard; default: crc32")
    parser.add_argument("--jobs", type=int, metavar="N", help="processes; default: the cores")
    add_path(
        "--index-dir", metavar="DIR", help="where the sidecars go; default: beside each shard, or the cache folder"
    )
    add_path(
        "--refused",
        nargs="?",
        const=True,  # not text, which would be read as a path
        metavar="FILE.jsonl",
        help="name every refused sample and its cause there, a line of JSON each; without FILE: refused.jsonl beside "
        "the index",
    )
    add_path("--cache-dir", metavar="DIR", help="where copies of remote shards go; default: the user's cache folder")
    parser.add_argument("--refresh", action="store_true", help="fetch and index all anew, whatever is there already")
    parser.add_argument("--allow-pipe", action="store_true", help="let 'pipe:' URLs run shell commands")
    rules = parser.add_argument_group("selection", "the same as in the config: a run finds only the index of its rules")
    add_caption(rules)
    rules.add_argument("--extra", type=shards_option, metavar="SHARDS", help="extra.urls: for --caption extra:txt")
    rules.add_argument("--extra-uid", default=Extra.uid_field, metavar="FIELD", help="extra.uid_field")
    rules.add_argument("--min-side", type=int, default=select.min_side, metavar="PIXELS", help="of the shorter side")
    rules.add_argument("--max-aspect", type=float, metavar="RATIO", help="longer side over shorter side")
    rules.add_argument(
        "--max-pixels", type=int, default=Data.max_pixels, metavar="N", help="of a picture, with --check decode"
    )
    rules.add_argument(
        "--uids", type=path_option, metavar="FILE", help="samples to keep: one uid a line, or DataComp's .npy"
    )
    rules.add_argument("--uid-field", default=select.uid_field, help="of a sample's JSON; __key__: its key")
    rules.add_argument("--score-field", help="a number in a sample's JSON")
    rules.add_argument("--min-score", type=float)
    rules.add_argument("--max-score", type=float)


def index_settings(arguments: argparse.Namespace) -> tuple[SourceSettings, Data, Literal["pairs", "labelled"]]:
    """Raises UserError for values that do not go together."""
    select = Select(
        check=arguments.check,
        min_side=arguments.min_side,
        max_aspect=arguments.max_aspect,
        uids=arguments.uids,
        uid_field=arguments.uid_field,
        score_field=arguments.score_field,
        min_score=arguments.min_score,
        max_score=arguments.max_score,
    )
    data = Data(
        index_dir=arguments.index_dir,
        index_jobs=arguments.jobs,
        hash=arguments.hash,
        cache_dir=arguments.cache_dir,
        allow_pipe=arguments.allow_pipe,
        max_pixels=arguments.max_pixels,
    )
    captions = arguments.caption or [SourceSettings.caption]
    source = SourceSettings("::".join(arguments.shards), caption=captions[0], select=select)
    if len(set(captions)) > 1 or arguments.extra is not None:
        extra = None if arguments.extra is None else Extra(arguments.extra, arguments.extra_uid)
        weights = dict.fromkeys(captions, 1.0)  # which there are; how often each is drawn does not matter here
        source = replace(source, caption=SourceSettings.caption, caption_weights=weights, extra=extra)
    return source, data, arguments.need


def print_report(found: source.Source) -> None:
    """Which shards are damaged or changed, and what was refused, and why."""
    from clipscale.data.fetch.urls import masked
    from clipscale.data.shard.report import lacking
    from clipscale.data.source import repeated_shards

    noun = "pair" if found.need == "pairs" else "labelled picture"
    for shard in found.shards:
        if shard.changed:
            say(f"{masked(shard.url)}: changed since it was indexed last: {shard.changed}")
        if shard.cut:
            say(f"{masked(shard.url)}: {counted(shard.samples, noun)} usable: {found.damage(shard)}")
    for line in (*repeated_shards([found]), *lacking(found.name, found.shards)):
        say(line)
    refused, unread = found.refused(), found.not_read()
    if refused or unread:
        table = Table("what was left out", "count", "shards")
        for cause, count in refused.most_common():
            places = sum(cause in shard.refused for shard in found.shards)
            table.add_row(Text(escaped(f"refused, {cause}")), f"{count}", f"{places}")
        for suffix, count in unread.most_common():
            places = sum(suffix in shard.not_read for shard in found.shards)
            table.add_row(Text(escaped(f"not read, {suffix}")), f"{count}", f"{places}")
        table.columns[1].justify = table.columns[2].justify = "right"
        Console(width=100).print(table)
    usable = counted(found.samples, f"usable {noun}")
    say(f"{counted(len(found.shards), 'shard')}, {usable}, fingerprint {found.fingerprint()}")
