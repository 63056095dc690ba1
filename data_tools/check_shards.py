"""Verify shards to their last byte: every member, every picture decoded to its end, duplicates, caption statistics.

    python data_tools/check_shards.py 'data/train-*.tar'
    python data_tools/check_shards.py 's3://bucket/{00000..00999}.tar' --json report.json --broken broken.jsonl

Flow: processes check whole shards (clipscale/shardkit/checks.py) -> counts add up here, hashes and sizes wait on disk
(tally.py), so that memory does not grow with the samples -> a table, and the two files.
"""

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from clipscale.config_data import Data, Fetch
from clipscale.data.fetch.cache import ShardCache
from clipscale.data.fetch.urls import expand_urls, is_local, masked
from clipscale.errors import require
from clipscale.files import whole_file, write_file
from clipscale.pool import map_in_processes
from clipscale.progress import progress_bar
from clipscale.shardkit.checks import Checked, Wanted, check_shard, look_up_sample
from clipscale.shardkit.commands import add_jobs, positive, run, shown
from clipscale.shardkit.tally import Digests, Numbers, summary

EXAMPLES = """\
examples:
  python data_tools/check_shards.py 'data/train-*.tar'
  python data_tools/check_shards.py data/a.tar 'data/b-{000..099}.tar' --json report.json --broken broken.jsonl
  python data_tools/check_shards.py 'https://host/set/{00000..00099}.tar' --cache-dir /scratch/cache --need pairs
  python data_tools/check_shards.py 'laion/*.tar' --caption json:long_caption

Findings: pictures that the loader could not decode, missing or bad captions and labels, broken JSON, members that are
not read, keys that occur twice in a shard, archives that are cut short or damaged, shards that cannot be read.
Duplicates (equal picture bytes, equal captions, equal pairs, over all shards) are told and are no findings.

--broken lists every finding, a line of JSON each: shard, key, member, offset (of the member's first byte in the shard),
cause, detail. Hashes wait in a temporary folder (--scratch): 112 bytes a sample.
exit status: 0 nothing found; 1 findings; 2 wrong arguments.
"""
LARGEST, PLACES = 10, 3  # groups of duplicates in the report, and samples named of each


class Totals:
    """Everything about all shards together; what grows with the samples lies in `scratch`."""

    def __init__(self, scratch: Path) -> None:
        self.shards: list[dict] = []
        self.starts = [0]  # number of each shard's first sample, over all shards
        self.causes: Counter[str] = Counter()
        self.first: dict[str, dict] = {}  # by cause
        self.kinds: Counter[str] = Counter()
        self.not_read: Counter[str] = Counter()
        names = ("picture bytes", "width", "height", "pixels", "caption characters")
        self.numbers = {name: Numbers(scratch / name.replace(" ", "-")) for name in names}
        self.digests = {name: Digests(scratch / name) for name in ("pictures", "captions", "pairs")}

    def add(self, found: Checked) -> list[dict]:
        """The shard's findings, one dict each."""
        start, url = self.starts[-1], masked(found.url)
        self.starts.append(start + found.samples)
        facts = {name: getattr(found, name) for name in ("bytes", "members", "samples", "usable")}
        self.shards.append({"shard": url, **facts, "findings": len(found.problems)})
        self.kinds.update(found.kinds)
        self.not_read.update(found.not_read)
        rows = [{"shard": url, **problem._asdict()} for problem in found.problems]
        for row in rows:
            self.causes[row["cause"]] += 1
            self.first.setdefault(row["cause"], row)
        sample, size, width, height = found.pictures.T
        values = (size, width, height, width * height, found.captions[:, 1])
        for numbers, value in zip(self.numbers.values(), values, strict=True):
            numbers.add(value)
        with_caption = found.captions[:, 0]
        self.digests["pictures"].add(found.picture_digests, start + sample)
        self.digests["captions"].add(found.caption_digests, start + with_caption)
        both, a, b = np.intersect1d(sample, with_caption, assume_unique=True, return_indices=True)
        self.digests["pairs"].add(combined(found.picture_digests[a], found.caption_digests[b]), start + both)
        return rows

    def place(self, number: int) -> tuple[int, int]:
        """(shard, number in it) of a sample."""
        shard = int(np.searchsorted(self.starts, number, side="right")) - 1
        return shard, number - self.starts[shard]

    def report(self, urls: list[str], caption: str, cache: ShardCache | None, seconds: float) -> dict:
        samples, size = self.starts[-1], sum(shard["bytes"] for shard in self.shards)
        duplicates = {}
        for name, digests in self.digests.items():
            found = digests.repeated(LARGEST, PLACES)
            groups = []
            for copies, numbers in found.groups:
                first = []
                for shard, number in map(self.place, numbers):
                    key, text = look_up_sample(urls[shard], number, caption, cache)
                    first.append({"shard": masked(urls[shard]), "key": key, "caption": text})
                groups.append({"copies": copies, "first": first})
            duplicates[name] = {"distinct": found.distinct, "surplus": found.surplus, "largest_groups": groups}
        return {
            "shards": len(self.shards),
            "bytes": size,
            "members": sum(shard["members"] for shard in self.shards),
            "samples": samples,
            "usable": sum(shard["usable"] for shard in self.shards),
            "findings": dict(self.causes.most_common()),
            "first_findings": list(self.first.values()),
            "pictures_by_suffix": dict(self.kinds),
            "members_not_read": dict(self.not_read.most_common(LARGEST)),
            "sizes": {
                "samples in a shard": summary(np.array([shard["samples"] for shard in self.shards])),
                "shard bytes": summary(np.array([shard["bytes"] for shard in self.shards])),
                **{name: numbers.summary() for name, numbers in self.numbers.items()},
            },
            "duplicates": duplicates,
            "seconds": seconds,
            "samples_per_second": samples / seconds,
            "bytes_per_second": size / seconds,
            "by_shard": self.shards,
        }


def combined(pictures: np.ndarray, captions: np.ndarray) -> np.ndarray:
    """One hash of two, uint8 [n, 16]: a picture's, turned by one byte, so that order matters, xor a caption's."""
    return np.roll(pictures, 1, axis=1) ^ captions


def check_shards(arguments: argparse.Namespace) -> int:
    urls = expand_urls("::".join(arguments.urls))
    for path in filter(None, (arguments.json, arguments.broken)):  # before the work, not after it
        require(path.parent.is_dir(), f"cannot write {path}: {path.parent} is no folder")
    cache = None
    if not all(map(is_local, urls)):
        cache = ShardCache(arguments.cache_dir, None, Fetch(), allow_pipe=False)
    wanted = Wanted(arguments.need, arguments.caption, arguments.max_pixels)
    start = time.perf_counter()
    jobs = min(arguments.jobs, len(urls))
    with tempfile.TemporaryDirectory(prefix="check_shards.", dir=arguments.scratch) as scratch:
        totals = Totals(Path(scratch))
        with whole_file(arguments.broken or Path(scratch) / "broken.jsonl") as broken, progress_bar("checking") as bar:
            for done, found in enumerate(map_in_processes(check_shard, urls, jobs, wanted, cache), 1):
                for row in totals.add(found):
                    print(json.dumps(row), file=broken)
                bar(done, len(urls))
        report = totals.report(urls, arguments.caption, cache, time.perf_counter() - start)
    if arguments.json:
        write_file(arguments.json, json.dumps(report, indent=1) + "\n")
    show(report)
    return 1 if report["findings"] else 0


# --- on the terminal --------------------------------------------------------------------------------------------------


def show(report: dict) -> None:
    console = Console()
    mebibytes, seconds = report["bytes"] / 2**20, report["seconds"]
    console.print(
        f"{report['samples']:,} samples in {report['shards']:,} shards, {mebibytes:,.1f} MiB; {report['usable']:,} "
        f"without a finding ({seconds:.1f} s: {report['samples'] / seconds:,.0f} samples a second, "
        f"{mebibytes / seconds:,.0f} MiB/s)",
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
        example = place(groups[0]["first"]) if groups else ""
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


def place(samples: list[dict]) -> str:
    return shown(", ".join(f"{Path(sample['shard']).name}: {sample['key']}" for sample in samples), 120)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="check_shards.py",
        description="Verify WebDataset shards: every picture is decoded to its end with the loader's own decoder.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("urls", nargs="+", metavar="URLS", help="shards: paths, globs, braces, URLs (through the cache)")
    add("--need", choices=("any", "pairs", "labelled"), default="any", help="captions, labels, or either (default)")
    add("--caption", default="txt", metavar="WHERE", help="a member's suffix, or json:<field>; default: txt")
    add("--json", type=Path, metavar="FILE", help="write the report")
    add("--broken", type=Path, metavar="FILE", help="write every finding, a line of JSON each")
    add("--max-pixels", type=positive, default=Data.max_pixels, metavar="N", help="refuse larger; default: %(default)s")
    add("--cache-dir", metavar="DIR", help="copies of remote shards; default: the user's cache folder")
    add("--scratch", metavar="DIR", help="for hashes and sizes, 112 bytes a sample; default: the system's")
    add_jobs(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    return run("check_shards.py", lambda: check_shards(arguments), left="nothing was written")


if __name__ == "__main__":
    sys.exit(main())
