"""Build captioned WebDataset shards from the public CIFAR-10 data set.

    tar xzf cifar-10-binary.tar.gz            # the "binary version", from www.cs.toronto.edu/~kriz/cifar.html
    python data_tools/make_cifar10.py cifar-10-batches-bin --output runs/cifar10-shards

Training pictures get the caption "a photo of a <class>."; test pictures get that and their label (.cls). Pictures are
stored as PNG, without loss, in the order of the batch files; classnames.txt holds one name a line (number = label).
"""

import argparse
import sys
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from clipscale.data.shard_writer import ShardWriter, write_file
from clipscale.errors import UserError, require

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
    counts = {}
    for split, paths in splits.items():
        with ShardWriter(output / split, samples_per_shard=per_shard) as writer:
            for path in paths:
                for label, pixels in rows(path):
                    require(label < len(names), f"{path}: label {label} has no name in {names_file}")
                    png = BytesIO()
                    Image.fromarray(pixels).save(png, "PNG")
                    sample = {"png": png.getvalue(), "txt": f"a photo of a {names[label]}."}
                    writer.write(f"{split}{writer.samples:06}", sample | ({"cls": label} if split == "test" else {}))
        counts[split] = writer.samples
    write_file(output / "classnames.txt", "\n".join(names) + "\n")
    return counts


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the folder with data_batch_1.bin")
    parser.add_argument("--output", type=Path, required=True, help="where the shards go")
    parser.add_argument("--samples-per-shard", type=int, default=5_000, metavar="N", help="default: 5000")
    arguments = parser.parse_args(argv)
    try:
        counts = convert(arguments.source, arguments.output, arguments.samples_per_shard)
    except (UserError, OSError) as error:
        print(f"make_cifar10.py: error: {error}", file=sys.stderr)
        return 2
    print(f"{arguments.output}: " + ", ".join(f"{count} {split} pictures" for split, count in counts.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
