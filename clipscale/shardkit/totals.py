"""Shards checked, all together: counts, sizes, duplicates.

    wanted = Wanted(need="pairs", caption="txt", max_pixels=50_000_000)
    report = check_shards(urls, wanted, jobs=8, scratch=None, broken=None, cache_dir=None)
    report["usable"], report["findings"]        # 999998, {'truncated': 2}

Flow: processes check whole shards (checks.py) -> counts add up here, hashes and sizes wait on disk (tally.py), so that
memory does not grow with the samples -> the report.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

from clipscale.data.fetch.cache import ShardCache
from clipscale.data.fetch.urls import masked
from clipscale.files import whole_file
from clipscale.pool import map_in_processes
from clipscale.progress import progress_bar
from clipscale.shardkit.checks import Checked, Wanted, check_shard, look_up_sample
from clipscale.shardkit.remote import cache_for
from clipscale.shardkit.tally import Digests, Numbers, summary

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

    def report(self, urls: list[str], caption: str | tuple[str, ...], cache: ShardCache | None, seconds: float) -> dict:
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


def check_shards(
    urls: list[str], wanted: Wanted, *, jobs: int, scratch: str | None, broken: Path | None, cache_dir: str | None
) -> dict:
    """The report, as `clipscale shards check --json` writes it.

    Args:
        urls: of the shards, or paths.
        scratch: folder for what grows with the samples, 112 bytes each; None: the system's.
        broken: file for every finding, a line of JSON each.
        cache_dir: for copies of remote shards; None: the user's cache folder.
    """
    cache, start = cache_for(urls, cache_dir), time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="check_shards.", dir=scratch) as folder:
        totals = Totals(Path(folder))
        findings = broken or Path(folder) / "broken.jsonl"
        with whole_file(findings) as file, progress_bar("checking") as bar:
            checked = map_in_processes(check_shard, urls, min(jobs, len(urls)), wanted, cache)
            for done, found in enumerate(checked, 1):
                for row in totals.add(found):
                    print(json.dumps(row), file=file)
                bar(done, len(urls))
        return totals.report(urls, wanted.caption, cache, time.perf_counter() - start)
