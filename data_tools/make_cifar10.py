"""Build captioned WebDataset shards from the public CIFAR-10 data set.

    tar xzf cifar-10-binary.tar.gz            # the "binary version", from www.cs.toronto.edu/~kriz/cifar.html
    python data_tools/make_cifar10.py cifar-10-batches-bin --output runs/cifar10-shards

Training pictures get the caption "a photo of a <class>."; test pictures get that and their label (.cls). Pictures are
stored as PNG, without loss, in the order of the batch files; classnames.txt holds one name a line (number = label).
The shards grow in a hidden folder and are moved in when all are done.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from clipscale.data.shard.writer import ShardWriter
from clipscale.errors import require
from clipscale.files import sync_folder, write_file
from clipscale.progress import progress_bar
from clipscale.shardkit.commands import positive, run

ROW_BYTES = 1 + 3 * 32 * 32  # a label, then the red, the green and the blue plane


def rows(path: Path) -> Iterator[tuple[int, np.ndarray]]:
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
    output.mkdir(parents=True, exist_ok=True)
    build = output / ".building"
    shutil.rmtree(build, ignore_errors=True)
    try:
        counts = {split: write_split(build / split, paths, names, per_shard) for split, paths in splits.items()}
        for path in build.iterdir():
            os.replace(path, output / path.name)
        sync_folder(output)
    finally:
        shutil.rmtree(build, ignore_errors=True)
    write_file(output / "classnames.txt", "\n".join(names) + "\n")
    return counts


def write_split(prefix: Path, paths: list[Path], names: list[str], per_shard: int) -> int:
    total = sum(path.stat().st_size for path in paths) // ROW_BYTES
    split = prefix.name
    with ShardWriter(prefix, samples_per_shard=per_shard) as writer, progress_bar(split) as progress:
        for path in paths:
            for label, pixels in rows(path):
                require(label < len(names), f"{path}: label {label} has no name among {', '.join(names)}")
                png = BytesIO()
                Image.fromarray(pixels).save(png, "PNG")
                sample = {"png": png.getvalue(), "txt": f"a photo of a {names[label]}."}
                writer.write(f"{split}{writer.samples:06}", sample | ({"cls": label} if split == "test" else {}))
                progress(writer.samples, total)
    return writer.samples


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the folder with data_batch_1.bin")
    parser.add_argument("--output", type=Path, required=True, help="where the shards go")
    parser.add_argument("--samples-per-shard", type=positive, default=5_000, metavar="N", help="default: 5000")
    arguments = parser.parse_args(argv)

    def work() -> int:
        counts = convert(arguments.source, arguments.output, arguments.samples_per_shard)
        print(f"{arguments.output}: " + ", ".join(f"{count} {split} pictures" for split, count in counts.items()))
        return 0

    return run("make_cifar10.py", work, left="no shard was added")


if __name__ == "__main__":
    sys.exit(main())
