"""CIFAR-10's binary version -> captioned shards.

convert(Path("cifar-10-batches-bin"), Path("shards"), per_shard=5_000)      # {'train': 50000, 'test': 10000}
# shards/train-0000.tar, ..., shards/test-0000.tar, ..., shards/classnames.txt
"""

from __future__ import annotations

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from clipscale.data.shard.writer import ShardWriter
from clipscale.errors import require
from clipscale.files import write_file
from clipscale.progress import progress_bar
from clipscale.shardkit.destination import building

ROW_BYTES = 1 + 3 * 32 * 32  # a label, then the red, the green and the blue plane


def read_batch(path: Path) -> Iterator[tuple[int, np.ndarray]]:
    """(label, uint8 [32, 32, 3]) of each picture in one batch file."""
    data = np.fromfile(path, np.uint8)
    require(data.size > 0 and data.size % ROW_BYTES == 0, f"{path}: {data.size} bytes is no multiple of {ROW_BYTES}")
    for row in data.reshape(-1, ROW_BYTES):
        yield int(row[0]), row[1:].reshape(3, 32, 32).transpose(1, 2, 0)


def convert(source: Path, output: Path, per_shard: int) -> dict[str, int]:
    """Write every shard; returns how many pictures each split has.

    Raises:
        UserError: a file of the data set that is missing or cut short.
    """
    names_file = source / "batches.meta.txt"
    require(names_file.is_file(), f"{names_file} is missing: {source} must be the unpacked binary version of CIFAR-10")
    names = names_file.read_text().split()
    splits = {
        "train": [source / f"data_batch_{number}.bin" for number in range(1, 6)],
        "test": [source / "test_batch.bin"],
    }
    missing = [str(path) for paths in splits.values() for path in paths if not path.is_file()]
    require(not missing, f"missing: {', '.join(missing)}")
    with building(output, "cifar10") as build:
        counts = {split: write_split(build / split, paths, names, per_shard) for split, paths in splits.items()}
    write_file(output / "classnames.txt", "\n".join(names) + "\n")
    return counts


def write_split(prefix: Path, paths: list[Path], names: list[str], per_shard: int) -> int:
    total = sum(path.stat().st_size for path in paths) // ROW_BYTES
    split = prefix.name
    with ShardWriter(prefix, samples_per_shard=per_shard) as writer, progress_bar(split) as progress:
        for path in paths:
            for label, pixels in read_batch(path):
                require(label < len(names), f"{path}: label {label} has no name among {', '.join(names)}")
                png = BytesIO()
                Image.fromarray(pixels).save(png, "PNG")
                sample = {"png": png.getvalue(), "txt": f"a photo of a {names[label]}."}
                writer.write(f"{split}{writer.samples:06}", sample | ({"cls": label} if split == "test" else {}))
                progress(writer.samples, total)
    return writer.samples
