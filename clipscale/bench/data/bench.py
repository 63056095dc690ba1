"""`clipscale bench data`: how fast pictures reach the training process, beside the open_clip recipe; part by part.

status = bench_data(options, "clipscale bench data --check")
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from clipscale.bench.common.results import finish, write
from clipscale.bench.common.stamp import package_version, result_name, stamp
from clipscale.bench.data.baseline import Baseline
from clipscale.bench.data.index import measure_index
from clipscale.bench.data.options import DataBench
from clipscale.bench.data.order import order_rows
from clipscale.bench.data.ours import open_pipeline
from clipscale.bench.data.photos import photo_shards, tiny_shards
from clipscale.bench.data.plots import draw
from clipscale.bench.data.report import markdown, tables, text
from clipscale.bench.data.soak import measure_soak
from clipscale.bench.data.speed import OURS, measure_speed
from clipscale.bench.data.stages import measure_stages
from clipscale.bench.data.transport import measure_transport
from clipscale.data.fetch.urls import expand_urls, is_local
from clipscale.data.pixels.decode import picture_size
from clipscale.errors import require
from clipscale.files import cache_folder
from clipscale.pool import cores
from clipscale.words import counted

_PACKAGES = ("webdataset", "open_clip_torch", "pillow", "torchvision", "simplejpeg", "numpy")
_LOOKED_AT = 256  # pictures whose sizes are told
_INDEX_REPEATS = 3
_TRANSPORT_PICTURES = 256
_TINY_SAMPLES = 20_000
_TRANSPORT_SECONDS = 2.0  # at most, of a turn


class _Run:
    """What the parts have in common."""

    def __init__(self, options: DataBench) -> None:
        self.options = options
        self.folder = cache_folder(options.cache_dir) / "bench"
        self.pattern = options.urls or photo_shards(self.folder, options.samples)
        self.urls = expand_urls(self.pattern)
        self.workers = options.workers or cores()
        self.baseline = Baseline(self.workers, options.batch, image_size=options.image_size)
        self.pipeline = open_pipeline(self.pattern, image_size=options.image_size, cache_dir=options.cache_dir)
        self.parts: dict[str, Callable[[], Any]] = {
            "speed": self._speed,
            "stages": self._stages,
            "transport": self._transport,
            "index": self._index,
            "order": order_rows,
            "soak": self._soak,
        }

    def _speed(self) -> dict[str, Any]:
        options = self.options
        return measure_speed(
            self.urls, self.pipeline, settings=self.baseline, rounds=options.rounds, seconds=options.seconds, say=_say
        )

    def _stages(self) -> dict[str, Any]:
        return measure_stages(
            self.urls, self.pipeline, self.baseline, pictures=min(2048, self.pipeline.sources[0].samples)
        )

    def _transport(self) -> dict[str, Any]:
        seconds = min(self.options.seconds, _TRANSPORT_SECONDS)
        return measure_transport(
            pictures=_TRANSPORT_PICTURES, side=self.options.image_size, rounds=self.options.rounds, seconds=seconds
        )

    def _index(self) -> list[dict[str, Any]]:
        tiny = expand_urls(tiny_shards(self.folder, _TINY_SAMPLES))
        return measure_index({"tiny members": tiny, "these": self.urls}, repeats=_INDEX_REPEATS)

    def _soak(self) -> dict[str, Any]:
        """Its shards are gigabytes, so they do not stay."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            return measure_soak(Path(folder), samples=self.options.soak, threads=self.workers, say=_say)


def bench_data(options: DataBench, command: str) -> int:
    """Measure, print and write; the exit status: 1 when memory was not flat, or with `check` when a bar was missed.

    `command` is what was typed, for the record.
    """
    require(
        options.urls is None or all(map(is_local, expand_urls(options.urls))),
        f"--urls={options.urls}: give local shards; the speed of a network is not what is compared",
    )
    print("shards: making them where they are not there yet, and their index", flush=True)
    run = _Run(options)
    document, folder = _document(options, run, command), Path(options.output)
    for part in (*options.parts, *(["soak"] if options.soak else [])):
        print(f"measuring: {part}", flush=True)
        document[part] = run.parts[part]()
        write(document, folder, markdown(document, []))
    document["bars"] = bars(document)
    document["finished"] = True
    _finish(document, folder)
    missed = [bar for bar in document["bars"] if not bar["met"]]
    return int(any(options.check or bar["always"] for bar in missed))


def bars(document: dict[str, Any]) -> list[dict[str, Any]]:
    """What this project promises, of the parts that were measured. `always`: the status tells it without --check."""
    found = []
    if document["speed"]:
        row = next(row for row in document["speed"]["rows"] if row["contestant"] == OURS["process"])
        found += [
            _bar("images/s, of the recipe's", row["images_per_second_to_recipe"], at_least=3.0),
            _bar("CPU per image, of the recipe's", row["cpu_us_to_recipe"], at_most=1 / 3),
        ]
    if document["order"]:
        row = next(row for row in document["order"] if row["layout"] == "default")
        found += [
            _bar("set-up of the order, ms", row["setup_ms"], at_most=50.0),
            _bar("a rank's slice of a batch, ms", row["slice_cold_ms"], at_most=25.0),
            _bar("tar neighbours in a batch, of chance", row["neighbours_over_chance"], at_most=2.0),
        ]
    if document["transport"]:
        found.append(
            _bar("time of transport, of a DataLoader's", document["transport"]["ratio"]["median"], at_most=1 / 3)
        )
    if document["soak"]:
        growth = max(size["resident_bytes"] for size in document["soak"]["growth"].values()) / 2**20
        bound = document["soak"]["bound_bytes"] / 2**20
        found.append(_bar("growth of resident memory, MiB", growth, at_most=bound) | {"always": True})
    return found


def _bar(what: str, value: float, *, at_least: float | None = None, at_most: float | None = None) -> dict[str, Any]:
    if at_least is not None:
        bound, met = f"at least {at_least:.3g}", value >= at_least
    else:
        bound, met = f"at most {at_most:.3g}", value <= at_most
    return {"what": what, "bound": bound, "value": value, "met": met, "always": False}


def _document(options: DataBench, run: _Run, command: str) -> dict[str, Any]:
    device = torch.device("cpu")
    source = run.pipeline.sources[0]
    places = [(shard, index) for shard, count in enumerate(source.counts) for index in range(min(count, 16))]
    pictures = [source.read(*place).image for place in places[:_LOOKED_AT]]
    sizes = [picture_size(picture) for picture in pictures]
    kilobytes = sum(map(len, pictures)) / len(pictures) / 1e3
    short_side = sum(min(size[:2]) for size in sizes) / len(sizes)
    notes = [
        f"{counted(source.samples, 'sample' if options.urls else 'synthetic photo')} in "
        f"{counted(len(source.shards), 'shard')}: "
        f"{kilobytes:.1f} KB a picture, short side {short_side:.0f} on the average of {len(pictures)}; read before, so "
        "that they come from memory.",
        "Packages: " + ", ".join(f"{name} {package_version(name)}" for name in _PACKAGES) + ".",
    ]
    parts: dict[str, Any] = dict.fromkeys(("speed", "stages", "transport", "index", "order", "soak", "bars"))
    return {
        "format": 1,
        "name": options.name or result_name("data", device),
        "command": command,
        "finished": False,
        "stamp": stamp(device),
        "arguments": asdict(options),
        "notes": notes,
        **parts,
    }


def _finish(document: dict[str, Any], folder: Path) -> None:
    """Tables, notes, pictures, and where everything lies."""
    for table in tables(document):
        print("\n" + text(table))
    print("\n" + "\n".join(document["notes"]))
    finish(document, folder, draw=draw, markdown=markdown)


def _say(line: str) -> None:
    print(f"  {line}", flush=True)
