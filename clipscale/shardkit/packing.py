"""A set of shards, written whole or not at all: `<output>/<prefix>-0000.tar`, ... and `refused.jsonl`.

    written = pack(rows, refusals, Destination(Path("shards"), "train", 10_000, overwrite=False), encoding, jobs=8)
    written.paths, written.samples, written.refusals

Keys count the samples of the set in 9 digits; members are the picture, `.txt`, `.cls` and `.json`, as far as a sample
has them. The shards grow in a hidden folder and are moved in when all are done, so that an interrupted run adds none.
Equal rows give equal bytes, whatever the number of processes.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

from clipscale.data.shard.writer import ShardWriter
from clipscale.escape import printable
from clipscale.files import write_file
from clipscale.progress import progress_bar
from clipscale.shardkit.destination import Destination, building
from clipscale.shardkit.inputs import Refusal, Row
from clipscale.shardkit.pictures import Encoding, Picture, read_pictures


class Written(NamedTuple):
    paths: list[Path]
    samples: int
    refusals: list[Refusal]


def pack(rows: list[Row], refusals: list[Refusal], to: Destination, encoding: Encoding, jobs: int) -> Written:
    """Write the shards of `rows` in their order. `refusals`: what has been refused before, to be listed too."""
    old, refusals = to.old_shards(), list(refusals)
    with building(to.output, to.prefix or "shards", old) as build:
        names, samples = _build(rows, refusals, to, build, encoding, jobs)
    _write_refused(to.output, to.prefix, refusals)
    return Written([to.output / name for name in names], samples, refusals)


def _build(
    rows: list[Row], refusals: list[Refusal], to: Destination, build: Path, encoding: Encoding, jobs: int
) -> tuple[list[str], int]:
    most_shards = -(-len(rows) // to.samples_per_shard)
    # So that names sort and fit one brace pattern; img2dataset's have 5 digits.
    digits = max(4 if to.prefix else 5, len(str(max(most_shards - 1, 0))))
    with (
        progress_bar("packing") as progress,
        ShardWriter(f"{build}/{to.prefix}", samples_per_shard=to.samples_per_shard, digits=digits) as writer,
    ):
        for done, (row, picture) in enumerate(read_pictures(rows, encoding, jobs), 1):
            if isinstance(picture, Refusal):
                refusals.append(picture)
            else:
                key = f"{writer.samples:09d}"
                writer.write(key, _members(key, row, picture))
            progress(done, len(rows))
    return [path.name for path in writer.paths], writer.samples


def _members(key: str, row: Row, picture: Picture) -> dict[str, bytes | str | int | dict]:
    facts = row.facts | {
        "key": key,
        "uid": uid(picture.sha256, row.caption or ""),
        "filepath": printable(row.name),
        "width": picture.width,
        "height": picture.height,
        "original_width": picture.original_width,
        "original_height": picture.original_height,
        "sha256": picture.sha256,
    }
    sample = {picture.extension: picture.data, "json": facts, "txt": row.caption, "cls": row.label}
    return {extension: value for extension, value in sample.items() if value is not None}


def uid(sha256: str, caption: str) -> str:
    """32 hex digits for the pair, the same in every set that holds it: what `select.uids` lists."""
    return hashlib.sha256(f"{sha256} {caption}".encode()).hexdigest()[:32]


def _write_refused(output: Path, prefix: str, refusals: list[Refusal]) -> None:
    """refused.jsonl: this prefix's refusals, after those that other prefixes have in it."""
    path = output / "refused.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []  # not at U+2028
    mine = f'{{"prefix": {json.dumps(prefix, ensure_ascii=False)}, '
    lines = [line for line in lines if not line.startswith(mine)]
    for refusal in refusals:
        fields = {"prefix": prefix, "path": refusal.name, "cause": refusal.cause}
        fields |= {"place": refusal.place} if refusal.place else {}
        fields |= {"detail": refusal.detail} if refusal.detail else {}
        lines.append(json.dumps({key: printable(value) for key, value in fields.items()}, ensure_ascii=False))
    write_file(path, "".join(f"{line}\n" for line in lines))
