"""Build WebDataset shards from pictures with captions: a CSV, TSV or JSONL list, or a folder with side-by-side .txt.

    python data_tools/make_shards.py captions.csv --output shards
    python data_tools/make_shards.py pictures/ --output shards --prefix validation --samples-per-shard 5000

Flow: the source gives rows (picture path, caption, label) and refusals -> rows are shuffled -> each picture is read and
decoded once, as training will, to prove that it can be -> its bytes go into the shards unchanged. What cannot be used
is counted by cause and listed in <output>/refused.jsonl. Reading and checking: clipscale/data/shard_inputs.py.
"""

import argparse
import glob
import json
import os
import shutil
import sys
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from clipscale.config_data import Data
from clipscale.data.shard_inputs import Keys, Refusal, Row, read_pictures, read_source
from clipscale.data.shard_writer import ShardWriter, sync_folder, write_file
from clipscale.errors import UserError

EXAMPLES = """\
examples:
  python data_tools/make_shards.py captions.csv --output shards
      the columns filepath and caption, or the first two; paths are relative to the list's folder
  python data_tools/make_shards.py labels.jsonl --output shards --prefix test --image-key image --label-key label
  python data_tools/make_shards.py pictures/ --output shards --prefix validation
      every picture below pictures/ that has a caption beside it: a/cat.jpg and a/cat.txt

The result: <output>/<prefix>-0000.tar, ..., each sample as <9 digits>.jpg/.png/.webp, .txt, .cls (with --label-key) and
.json (its path and size), and <output>/refused.jsonl, one line for each row or file that could not be used.
exit status: 0 shards written; 2 wrong arguments or input, or no usable sample.
"""

# --- shards -----------------------------------------------------------------------------------------------------------


def make_shards(arguments: argparse.Namespace, console: Console) -> tuple[list[Path], int, list[Refusal]]:
    """(shards, samples in them, refusals). Shards are written in a folder of their own and moved in at the end."""
    output, prefix = arguments.output, arguments.prefix
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file: --output must be a folder")
    old = sorted(path for path in output.glob(f"{glob.escape(prefix)}-*.tar") if is_shard_of(path, prefix))
    if old and not arguments.overwrite:
        raise UserError(
            f"{output} already holds {len(old)} shards {prefix}-*.tar: choose another --prefix or --overwrite"
        )

    keys = Keys(arguments.image_key, arguments.caption_key, arguments.label_key)
    rows, refusals, seen = [], [], set()
    with console.status(Text(f"reading {arguments.source}")):
        for row in read_source(arguments.source, keys):
            if isinstance(row, Refusal):
                refusals.append(row)
            elif (row.path, row.caption) in seen:
                refusals.append(Refusal(row.name, "duplicate row", row.place))
            else:
                seen.add((row.path, row.caption))
                rows.append(row)
    del seen
    if arguments.shuffle:
        # Ranks of raw Philox words: unlike Generator.permutation the same in every version of numpy.
        words = np.random.Philox(key=np.array([arguments.seed, 0], dtype=np.uint64)).random_raw(len(rows))
        rows = [rows[index] for index in np.argsort(words, kind="stable").tolist()]

    output.mkdir(parents=True, exist_ok=True)
    build = output / f".{prefix}.building"
    shutil.rmtree(build, ignore_errors=True)
    try:
        shards, samples = pack(rows, refusals, build, arguments, console)
        if samples:
            for path in shards:
                os.replace(path, output / path.name)
            for path in set(old) - {output / path.name for path in shards}:
                path.unlink()
            sync_folder(output)
    finally:
        shutil.rmtree(build, ignore_errors=True)
    write_refused(output, prefix, refusals)
    return [output / path.name for path in shards], samples, refusals


def pack(rows: list[Row], refusals: list[Refusal], build: Path, arguments, console: Console) -> tuple[list[Path], int]:
    most_shards = -(-len(rows) // arguments.samples_per_shard)
    digits = max(4, len(str(max(most_shards - 1, 0))))  # so that names sort, and fit one brace pattern
    columns = (
        TextColumn("packing"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
        TextColumn("refused: {task.fields[refused]}"),
    )
    size = arguments.samples_per_shard
    with (
        Progress(*columns, console=console, transient=True) as bar,
        ShardWriter(build / arguments.prefix, samples_per_shard=size, digits=digits) as writer,
    ):
        task = bar.add_task("packing", total=len(rows), refused=len(refusals))
        for row, picture in read_pictures(rows, arguments.max_pixels, arguments.workers):
            if isinstance(picture, Refusal):
                refusals.append(picture)
            else:
                key = f"{writer.samples:09d}"
                facts = {"key": key, "filepath": printable(row.name), "width": picture.width, "height": picture.height}
                sample = {picture.extension: picture.data, "txt": row.caption, "json": facts}
                if row.label is not None:
                    sample["cls"] = row.label
                writer.write(key, sample)
            bar.update(task, advance=1, refused=len(refusals))
    return writer.paths, writer.samples


def is_shard_of(path: Path, prefix: str) -> bool:
    return path.name[len(prefix) + 1 : -len(".tar")].isdigit()


def printable(text: str) -> str:
    """Text that UTF-8 can hold: odd bytes of a path as backslash escapes."""
    return text.encode("utf-8", errors="backslashreplace").decode("utf-8")


def write_refused(output: Path, prefix: str, refusals: list[Refusal]) -> None:
    """refused.jsonl: this prefix's refusals, after those that other prefixes have in it."""
    path = output / "refused.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    mine = f'{{"prefix": {json.dumps(prefix, ensure_ascii=False)}, '
    lines = [line for line in lines if not line.startswith(mine)]
    for refusal in refusals:
        fields = {"prefix": prefix, "path": refusal.name, "cause": refusal.cause}
        fields |= {"place": refusal.place} if refusal.place else {}
        fields |= {"detail": refusal.detail} if refusal.detail else {}
        lines.append(json.dumps({key: printable(value) for key, value in fields.items()}, ensure_ascii=False))
    write_file(path, "".join(f"{line}\n" for line in lines))


# --- command line -----------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="make_shards.py",
        description="Pack pictures and captions into WebDataset shards. Picture bytes are kept as they are;\n"
        "every picture is decoded once, and what cannot be used is counted by cause.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("source", type=Path, help="list ending in .csv, .tsv or .jsonl, or a folder of pictures with .txt beside them")
    add("--output", type=Path, required=True, metavar="DIR", help="folder for the shards (made if absent)")
    add("--prefix", default="train", help="shards are named PREFIX-0000.tar, ...; default: train")
    add("--samples-per-shard", type=positive, default=10_000, metavar="N", help="default: 10000")
    add("--image-key", metavar="NAME", help="column of the picture path, default: filepath, else the first column")
    add("--caption-key", metavar="NAME", help="column of the caption, default: caption, else the second column")
    add("--label-key", metavar="NAME", help="column of an integer class label, which goes into .cls")
    add("--seed", type=natural, default=0, metavar="N", help="of the order, default: 0")
    add("--no-shuffle", dest="shuffle", action="store_false", help="keep the order of the source")
    add("--max-pixels", type=positive, default=Data.max_pixels, metavar="N", help="refuse larger; default: %(default)s")
    add("--workers", type=positive, default=min(16, os.cpu_count() or 1), metavar="N", help="threads, default: cores")
    add("--overwrite", action="store_true", help="replace shards of this prefix in the output folder")
    return parser


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return int(text)


def natural(text: str) -> int:
    if not 0 <= int(text) < 2**64:
        raise argparse.ArgumentTypeError(f"{text} is not 0 to 2^64 - 1")
    return int(text)


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    console = Console(stderr=True)
    Image.MAX_IMAGE_PIXELS = None  # --max-pixels takes its place
    Image.init()  # load the decoders before threads ask for them
    try:
        if not arguments.prefix or "/" in arguments.prefix or arguments.prefix.startswith("."):
            raise UserError(f"--prefix {arguments.prefix!r}: must be a plain file name")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow on odd metadata of pictures that decode well
            shards, samples, refusals = make_shards(arguments, console)
    except (UserError, OSError) as error:
        print(f"make_shards.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("make_shards.py: interrupted, no shard was added", file=sys.stderr)
        return 130
    print_counts(samples, refusals)
    if not samples:
        where = arguments.output / "refused.jsonl"
        print(f"make_shards.py: error: no usable sample in {arguments.source}; see {where}", file=sys.stderr)
        return 2
    mebibytes = sum(path.stat().st_size for path in shards) / 2**20
    names = shards[0].name if len(shards) == 1 else f"{len(shards)} shards, {shards[0].name} to {shards[-1].name}"
    print(f"{arguments.output}: {samples:,} samples in {names}, {mebibytes:,.1f} MiB")
    return 0


def print_counts(samples: int, refusals: list[Refusal]) -> None:
    table = Table("", "count", "first one")
    table.columns[1].justify = "right"
    table.add_row("written", f"{samples:,}", "")
    first = {refusal.cause: refusal for refusal in reversed(refusals)}
    for cause, count in Counter(refusal.cause for refusal in refusals).most_common():
        shown = f"{printable(first[cause].name)} {first[cause].place}".strip()
        table.add_row(f"refused: {cause}", f"{count:,}", Text(shown))
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
