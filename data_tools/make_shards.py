"""Build WebDataset shards from pictures with captions: a CSV, TSV or JSONL list, or a folder with side-by-side .txt.

    python data_tools/make_shards.py captions.csv --output shards
    python data_tools/make_shards.py pictures/ --output shards --prefix validation --samples-per-shard 5000

Flow: the source gives rows (picture path, caption, label) and refusals -> rows are shuffled -> each picture is read,
identified by its first bytes and decoded once to prove that it can be -> its bytes go into the shards unchanged. What
cannot be used is counted by cause and listed in <output>/refused.jsonl.
"""

import argparse
import csv
import glob
import io
import json
import os
import re
import shutil
import sys
import warnings
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from clipscale.data.shard_writer import ShardWriter, sync_folder, write_file

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

LIST_FORMATS = {".csv": ",", ".tsv": "\t", ".jsonl": None, ".ndjson": None}
# What counts as a picture in a folder; the ones that shards cannot hold are then refused by name and cause.
PICTURE_NAME = re.compile(r".*\.(jpg|jpeg|jpe|jfif|png|webp|gif|bmp|tif|tiff|avif|heic|heif|jp2|jxl|ppm|pgm)", re.I)
# Extension in the shard, Pillow's name of the format.
FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}


class InputError(ValueError):
    """Something the caller has to change: shown as one line, exit status 2."""


@dataclass(frozen=True)
class Row:
    """One picture to be packed. `name` is the path as the source has it, `place` where the source says so."""

    name: str
    path: str
    caption: str
    label: int | None
    place: str


@dataclass(frozen=True)
class Refusal:
    name: str
    cause: str
    place: str = ""
    detail: str = ""


@dataclass(frozen=True)
class Keys:
    """Column names; None for image and caption: the defaults, else the first two columns."""

    image: str | None
    caption: str | None
    label: str | None


# --- sources: a list or a folder -> rows and refusals -----------------------------------------------------------------


def read_source(source: Path, keys: Keys) -> Iterator[Row | Refusal]:
    if source.is_dir():
        if any((keys.image, keys.caption, keys.label)):
            raise InputError(f"{source} is a folder: --image-key, --caption-key and --label-key are for lists")
        return read_folder(source)
    if not source.exists():
        raise InputError(f"{source} does not exist")
    if source.suffix.lower() not in LIST_FORMATS:
        raise InputError(f"{source}: neither a folder nor a list ending in {', '.join(LIST_FORMATS)}")
    delimiter = LIST_FORMATS[source.suffix.lower()]
    rows = read_jsonl(source, keys) if delimiter is None else read_table(source, delimiter, keys)
    return (make_row(source.parent, *row) if isinstance(row, tuple) else row for row in rows)


def open_list(source: Path, newline: str):
    """Bytes that are not UTF-8 come through as lone surrogates: a bad caption costs one row, odd paths still open."""
    return open(source, encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def read_table(source: Path, delimiter: str, keys: Keys) -> Iterator[tuple | Refusal]:
    with open_list(source, newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        first, columns = None, None
        while True:
            line = reader.line_num + 1
            try:
                fields = next(reader)
            except StopIteration:
                break
            except csv.Error as error:
                if first is None:
                    raise InputError(f"{source}, line {line}: cannot read the header ({error})") from error
                yield Refusal(source.name, "broken row", place(line, reader.line_num), str(error))
                continue
            if not fields:  # an empty line
                continue
            if first is None:
                first = fields
                columns = find_columns(source, fields, keys, may_lack_header=True)
                if columns is not None:
                    continue
                columns = (0, 1, None)  # no header: this row is data already
            if len(fields) != len(first):
                detail = f"{len(fields)} fields instead of {len(first)}"
                yield Refusal(fields[0], "broken row", place(line, reader.line_num), detail)
                continue
            image, caption, label = columns
            yield fields[image], fields[caption], None if label is None else fields[label], place(line, reader.line_num)
        if first is None:
            raise InputError(f"{source} is empty")


def read_jsonl(source: Path, keys: Keys) -> Iterator[tuple | Refusal]:
    columns = None
    with open_list(source, newline="\n") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                problem = None if isinstance(record, dict) else "not an object"
            except ValueError as error:
                problem = str(error)
            except RecursionError:
                problem = "nested too deep"
            if problem is not None:
                yield Refusal(source.name, "broken row", place(number), problem)
                continue
            if columns is None:
                names = list(record)
                found = find_columns(source, names, keys)
                columns = [None if index is None else names[index] for index in found]
            image, caption, label = columns
            missing = [key for key in (image, caption, label) if key is not None and record.get(key) is None]
            if missing or not isinstance(record[image], str) or not isinstance(record[caption], str):
                detail = f"no {missing[0]!r}" if missing else f"{image!r} and {caption!r} must be text"
                yield Refusal(str(record.get(image)), "broken row", place(number), detail)
                continue
            yield record[image], record[caption], None if label is None else record[label], place(number)
    if columns is None:
        raise InputError(f"{source} holds no JSON object")


def find_columns(source: Path, names: list[str], keys: Keys, may_lack_header: bool = False) -> tuple | None:
    """Indices of image, caption and label column, or None: `names` is not a header but the first row of data."""

    def find(wanted: str, option: str) -> int:
        if wanted not in names:
            raise InputError(
                f"{source} has no column {wanted!r} (it has {', '.join(map(repr, names))}): name it by {option}"
            )
        return names.index(wanted)

    label = None if keys.label is None else find(keys.label, "--label-key")
    if keys.image is None and keys.caption is None and not {"filepath", "caption"} <= set(names):
        if len(names) < 2:
            raise InputError(f"{source} has the one column {names[0] if names else ''!r}: need a picture and a caption")
        if may_lack_header and label is None and PICTURE_NAME.fullmatch(names[0]):
            return None
        return 0, 1, label
    return find(keys.image or "filepath", "--image-key"), find(keys.caption or "caption", "--caption-key"), label


def place(first: int, last: int | None = None) -> str:
    return f"line {first}" if last is None or last <= first else f"lines {first}-{last}"


def make_row(folder: Path, name: str, caption: str, label, where: str) -> Row | Refusal:
    """`folder` is what relative paths are relative to."""
    if not name.strip():
        return Refusal(name, "empty path", where)
    refused = check_caption(caption)
    if refused is not None:
        return Refusal(name, refused, where)
    if label is not None:
        try:
            if isinstance(label, bool | float):
                raise ValueError
            label = int(label)
        except (TypeError, ValueError):
            return Refusal(name, "label not an integer", where, repr(label))
    return Row(name, os.path.join(folder, name), caption.strip(), label, where)


def check_caption(caption: str) -> str | None:
    try:
        caption.encode("utf-8")
    except UnicodeEncodeError:
        return "caption not UTF-8"
    return None if caption.strip() else "empty caption"


def read_folder(source: Path) -> Iterator[Row | Refusal]:
    unreadable, visited = [], set()
    for parent, folders, files in os.walk(source, onerror=unreadable.append, followlinks=True):
        if os.path.realpath(parent) in visited:  # links may lead in circles
            folders.clear()
            continue
        visited.add(os.path.realpath(parent))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        names = sorted(name for name in files if not name.startswith("."))
        pictures = [name for name in names if PICTURE_NAME.fullmatch(name)]
        captions = {Path(name).stem: name for name in names if Path(name).suffix == ".txt"}
        taken = set()
        for name in pictures:
            path, stem = os.path.join(parent, name), Path(name).stem
            shown = os.path.relpath(path, source)
            if stem not in captions:
                yield Refusal(shown, "no caption file")
            elif stem in taken:
                yield Refusal(shown, "duplicate key", detail=f"another picture has the caption {captions[stem]}")
            else:
                taken.add(stem)
                try:
                    data = Path(parent, captions[stem]).read_bytes()
                except OSError as error:
                    yield Refusal(shown, "unreadable file", detail=f"{captions[stem]}: {error.strerror}")
                    continue
                caption = data.decode("utf-8-sig", errors="surrogateescape")
                refused = check_caption(caption)
                yield Row(shown, path, caption.strip(), None, "") if refused is None else Refusal(shown, refused)
        for stem in sorted(captions.keys() - {Path(name).stem for name in pictures}):
            shown = os.path.relpath(os.path.join(parent, captions[stem]), source)
            yield Refusal(shown, "missing file", detail="a caption without a picture")
    for error in unreadable:
        yield Refusal(os.path.relpath(error.filename, source), "unreadable folder", detail=error.strerror)


# --- pictures ---------------------------------------------------------------------------------------------------------


def sniff(data: bytes) -> str | None:
    """Extension by the first bytes, whatever the file is called."""
    if data.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return None


def read_picture(row: Row, max_pixels: int) -> Refusal | tuple[str, bytes, int, int]:
    """(extension, bytes, width, height) of a picture that decodes to its end. The header decides on the size first."""
    try:
        data = Path(row.path).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return Refusal(row.name, "missing file", row.place)
    except (OSError, ValueError) as error:  # a folder, no permission, a name with a null byte
        return Refusal(row.name, "unreadable file", row.place, str(error))
    extension = sniff(data)
    if extension is None:
        return Refusal(row.name, "unknown format", row.place, "empty file" if not data else "not JPEG, PNG or WebP")
    try:
        with Image.open(io.BytesIO(data), formats=[FORMATS[extension]]) as image:
            width, height = image.size
            if width * height > max_pixels:
                return Refusal(row.name, "too large", row.place, f"{width} x {height} is over {max_pixels} pixels")
            image.load()
    except Exception as error:  # Pillow's decoders raise what they like: OSError, SyntaxError, struct.error, ...
        return Refusal(row.name, "broken image", row.place, f"{type(error).__name__}: {error}")
    return extension, data, width, height


def read_pictures(rows: Iterable[Row], max_pixels: int, workers: int) -> Iterator[tuple]:
    """(row, what read_picture says) in the order of `rows`, read and decoded by threads that stay a little ahead."""
    with ThreadPoolExecutor(workers) as pool:
        ahead = deque()
        try:
            for row in rows:
                ahead.append((row, pool.submit(read_picture, row, max_pixels)))
                if len(ahead) >= 8 * workers:
                    row, future = ahead.popleft()
                    yield row, future.result()
            while ahead:
                row, future = ahead.popleft()
                yield row, future.result()
        finally:
            for _, future in ahead:
                future.cancel()


# --- shards -----------------------------------------------------------------------------------------------------------


def make_shards(arguments: argparse.Namespace, console: Console) -> tuple[list[Path], int, list[Refusal]]:
    """(shards, samples in them, refusals). Shards are written in a folder of their own and moved in at the end."""
    output, prefix = arguments.output, arguments.prefix
    if output.exists() and not output.is_dir():
        raise InputError(f"{output} is a file: --output must be a folder")
    old = sorted(path for path in output.glob(f"{glob.escape(prefix)}-*.tar") if is_shard_of(path, prefix))
    if old and not arguments.overwrite:
        raise InputError(
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
                extension, data, width, height = picture
                key = f"{writer.samples:09d}"
                facts = {"key": key, "filepath": printable(row.name), "width": width, "height": height}
                sample = {extension: data, "txt": row.caption, "json": facts}
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
    add("--max-pixels", type=positive, default=89_478_485, metavar="N", help="refuse larger ones, default: 89478485")
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
            raise InputError(f"--prefix {arguments.prefix!r}: must be a plain file name")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow on odd metadata of pictures that decode well
            shards, samples, refusals = make_shards(arguments, console)
    except (InputError, OSError) as error:
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
