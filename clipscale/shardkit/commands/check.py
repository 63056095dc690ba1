"""`check`: shards verified to their last byte, and what was found as a table (shardkit/totals.py)."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from clipscale.errors import require
from clipscale.escape import shown
from clipscale.files import write_file
from clipscale.paths import path_option, shards_option
from clipscale.shardkit.commands.options import add_jobs, add_reading, captions_of, path
from clipscale.words import counted

WHAT = "verify shards to their last byte, and find duplicates"
DESCRIPTION = "Verify WebDataset shards: every picture is decoded to its end with the loader's own decoder."
EXAMPLES = """\
examples:
  PROGRAM 'data/train-*.tar'
  PROGRAM data/a.tar 'data/b-{000..099}.tar' --json report.json --broken broken.jsonl
  PROGRAM 'https://host/set/{00000..00099}.tar' --cache-dir /scratch/cache --need pairs
  PROGRAM 'laion/*.tar' --caption json:long_caption --caption txt

Findings: pictures that the loader could not decode, missing or bad captions and labels, broken JSON, members that are
not read (other suffixes, hidden files, links), members of a sample that lie apart, keys that occur twice in a shard,
archives that are cut short, damaged or never filled to their end, shards that cannot be read.
Of several captions (--caption given more than once) a sample needs one; one that is there and bad is a finding too.
Sizes and duplicates are of the first that it has.
Duplicates (equal picture bytes, equal captions, equal pairs, over all shards) are told and are no findings.

--broken lists every finding, a line of JSON each: shard, key, member, offset (of the member's first byte in the shard),
cause, detail. Hashes wait in a temporary folder (--scratch): 112 bytes a sample.
exit status: 0 nothing found; 1 findings; 2 wrong arguments.
"""
LEFT = "nothing was written"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "urls",
        nargs="+",
        type=shards_option,
        metavar="URLS",
        help="shards: paths, globs, braces, URLs (through the cache)",
    )
    add("--need", choices=("any", "pairs", "labelled"), default="any", help="captions, labels, or either (default)")
    add("--json", type=path, metavar="FILE", help="write the report")
    add("--broken", type=path, metavar="FILE", help="write every finding, a line of JSON each")
    add(
        "--scratch",
        type=path_option,
        metavar="DIR",
        help="for hashes and sizes, 112 bytes a sample; default: the system's",
    )
    add_reading(parser)
    add_jobs(parser)


def run(arguments: argparse.Namespace) -> int:
    for file in filter(None, (arguments.json, arguments.broken)):  # before the work, not after it
        require(file.parent.is_dir(), f"cannot write {file}: {file.parent} is no folder")
    from clipscale.data.fetch.urls import expand_urls

    urls = expand_urls("::".join(arguments.urls))
    from clipscale.shardkit.checks import Wanted
    from clipscale.shardkit.totals import check_shards  # with torch

    wanted = Wanted(arguments.need, captions_of(arguments), arguments.max_pixels)
    places = {"scratch": arguments.scratch, "broken": arguments.broken, "cache_dir": arguments.cache_dir}
    report = check_shards(urls, wanted, jobs=arguments.jobs, **places)
    if arguments.json:
        write_file(arguments.json, json.dumps(report, indent=1) + "\n")
    print_report(report)
    return 1 if report["findings"] else 0


def print_report(report: dict) -> None:
    console = Console()
    mebibytes, seconds = report["bytes"] / 2**20, report["seconds"]
    console.print(
        f"{counted(report['samples'], 'sample')} in {counted(report['shards'], 'shard')}, {mebibytes:,.1f} MiB; "
        f"{report['usable']:,} without a finding ({seconds:.1f} s: "
        f"{report['samples'] / seconds:,.0f} samples a second, {mebibytes / seconds:,.0f} MiB/s)",
        highlight=False,
        soft_wrap=True,
    )
    sizes = Table("", *(Column(name, justify="right") for name in ("min", "median", "max", "mean")))
    for name, found in report["sizes"].items():
        if found:
            sizes.add_row(name, *(f"{value:,.0f}" for value in found.values()))
    console.print(sizes)
    duplicates = Table("duplicates", "distinct", "surplus", "most copies", "for example")
    for name, found in report["duplicates"].items():
        groups = found["largest_groups"]
        most = f"{groups[0]['copies']:,}" if groups else ""
        example = places(groups[0]["first"]) if groups else ""
        duplicates.add_row(name, f"{found['distinct']:,}", f"{found['surplus']:,}", most, Text(example))
    console.print(duplicates)
    frequent = report["duplicates"]["captions"]["largest_groups"]
    if frequent:
        table = Table("most frequent captions", "samples")
        for group in frequent:
            table.add_row(Text(shown(group["first"][0]["caption"], 100)), f"{group['copies']:,}")
        console.print(table)
    if not report["findings"]:
        console.print("nothing found")
        return
    findings = Table("finding", "count", "first one", "detail")
    first = {row["cause"]: row for row in report["first_findings"]}
    for cause, count in report["findings"].items():
        row = first[cause]
        where = f"{row['shard']} {row['member']} at byte {row['offset']:,}"
        findings.add_row(cause, f"{count:,}", Text(shown(where, 200)), Text(shown(row["detail"], 200)))
    console.print(findings)


def places(samples: list[dict]) -> str:
    return shown(", ".join(f"{Path(sample['shard']).name}: {sample['key']}" for sample in samples), 120)
