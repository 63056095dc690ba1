"""What shards are made of: pictures with captions, from a CSV, TSV or JSONL list or a folder with .txt beside them.

    for row in read_source(Path("captions.csv"), Keys(image=None, caption=None, label="label")):
        ...                                        # Row(name, path, caption, label, place) or Refusal(name, cause, ...)

Whatever cannot be used comes back as a `Refusal` that says what, where and why, or as `PassedOver` where it is no
sample at all (hidden files, other formats); nothing is dropped in silence. Columns of lists: columns.py; the pictures
themselves are read by pictures.py.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TextIO

import numpy as np

from clipscale.data.shard.labels import LabelError, label_of
from clipscale.errors import UserError
from clipscale.shardkit.columns import PICTURE_NAME, Columns, Keys, choose_columns, delimiter_of, lacks_header

LIST_FORMATS = {".csv": ",", ".tsv": "\t", ".jsonl": None, ".ndjson": None}


@dataclass(frozen=True)
class Row:
    """One picture to be packed. `name` is the path as the source has it, `place` where the source says so."""

    name: str
    path: str
    caption: str | None
    label: int | None
    place: str
    offset: int = 0  # of the picture in the file, bytes
    size: int | None = None  # bytes; None: the whole file
    facts: dict[str, str] = field(default_factory=dict)  # more that its JSON shall hold


@dataclass(frozen=True)
class Refusal:
    name: str
    cause: str
    place: str = ""
    detail: str = ""


@dataclass(frozen=True)
class PassedOver:
    """A file or folder that is no sample and no part of one: counted by cause, not listed."""

    name: str
    cause: str


def in_random_order(rows: list[Row], seed: int) -> list[Row]:
    """Ranks of raw Philox words: unlike Generator.permutation the same in every version of numpy."""
    words = np.random.Philox(key=np.array([seed, 0], dtype=np.uint64)).random_raw(len(rows))
    return [rows[index] for index in np.argsort(words, kind="stable").tolist()]


# --- sources: a list or a folder -> rows and refusals -----------------------------------------------------------------


def read_source(source: Path, keys: Keys) -> Iterator[Row | Refusal | PassedOver]:
    if source.is_dir():
        if any((keys.image, keys.caption, keys.label)):
            raise UserError(f"{source} is a folder: --image-key, --caption-key and --label-key are for lists")
        return read_folder(source)
    if not source.exists():
        raise UserError(f"{source} does not exist")
    if source.suffix.lower() not in LIST_FORMATS:
        raise UserError(f"{source}: neither a folder nor a list ending in {', '.join(LIST_FORMATS)}")
    delimiter = LIST_FORMATS[source.suffix.lower()]
    rows = read_jsonl(source, keys) if delimiter is None else read_table(source, delimiter, keys)
    return (make_row(source.parent, *row) if isinstance(row, tuple) else row for row in rows)


def open_list(source: Path, newline: str) -> TextIO:
    """Bytes that are not UTF-8 come through as lone surrogates: a bad caption costs one row, odd paths still open."""
    return open(source, encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def read_table(source: Path, delimiter: str, keys: Keys) -> Iterator[tuple | Refusal]:
    with open_list(source, newline="") as file:
        first_line = next(filter(str.strip, file), "")
        file.seek(0)
        reader = csv.reader(file, delimiter=delimiter_of(source, first_line, delimiter, keys), strict=True)
        first, columns = None, None
        while True:
            line = reader.line_num + 1
            try:
                fields = next(reader)
            except StopIteration:
                break
            except csv.Error as error:
                if first is None:
                    raise UserError(f"{source}, line {line}: cannot read the header ({error})") from error
                yield Refusal(source.name, "broken row", place(line, reader.line_num), str(error))
                continue
            if not fields:  # an empty line
                continue
            if first is None:
                first = fields
                if not lacks_header(fields, keys):
                    columns = choose_columns(source, fields, keys)
                    continue
                columns = Columns(0, 1, None)
            if len(fields) != len(first):
                detail = f"{len(fields)} fields instead of {len(first)}"
                yield Refusal(fields[0], "broken row", place(line, reader.line_num), detail)
                continue
            image, caption, label = columns
            yield fields[image], fields[caption], None if label is None else fields[label], place(line, reader.line_num)
        if first is None:
            raise UserError(f"{source} is empty")


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
                found = choose_columns(source, names, keys)
                columns = [None if index is None else names[index] for index in found]
            image, caption, label = columns
            missing = [key for key in (image, caption, label) if key is not None and record.get(key) is None]
            if missing or not isinstance(record[image], str) or not isinstance(record[caption], str):
                detail = f"no {missing[0]!r}" if missing else f"{image!r} and {caption!r} must be text"
                yield Refusal(str(record.get(image)), "broken row", place(number), detail)
                continue
            yield record[image], record[caption], None if label is None else record[label], place(number)
    if columns is None:
        raise UserError(f"{source} holds no JSON object")


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
                raise LabelError("label is not a number")
            label = label_of(str(label).encode(errors="replace"))
        except LabelError as error:
            return Refusal(name, str(error), where, repr(label))
    return Row(name, os.path.join(folder, name), caption.strip(), label, where)


def check_caption(caption: str) -> str | None:
    try:
        caption.encode("utf-8")
    except UnicodeEncodeError:
        return "caption not UTF-8"
    return None if caption.strip() else "empty caption"


def read_folder(source: Path) -> Iterator[Row | Refusal | PassedOver]:
    unreadable, visited = [], set()
    for parent, folders, files in os.walk(source, onerror=unreadable.append, followlinks=True):
        if os.path.realpath(parent) in visited:  # links may lead in circles
            folders.clear()
            continue
        visited.add(os.path.realpath(parent))
        inside = partial(os.path.join, os.path.relpath(parent, source) if parent != str(source) else "")
        yield from (PassedOver(inside(name), "hidden folder") for name in sorted(folders) if is_hidden(name))
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        yield from _read_files(parent, sorted(files), inside)
    for error in unreadable:
        yield Refusal(os.path.relpath(error.filename, source), "unreadable folder", detail=error.strerror)


def _read_files(parent: str, files: list[str], inside: Callable[[str], str]) -> Iterator[Row | Refusal | PassedOver]:
    """Of one folder. `inside`: a file's name as the source has it."""
    names = [name for name in files if not is_hidden(name)]
    pictures = [name for name in names if PICTURE_NAME.fullmatch(name)]
    captions = {Path(name).stem: name for name in names if Path(name).suffix == ".txt"}
    yield from (PassedOver(inside(name), "hidden file") for name in files if is_hidden(name))
    others = set(names) - set(pictures) - set(captions.values())
    yield from (PassedOver(inside(name), other_format(name)) for name in names if name in others)
    taken = set()
    for name in pictures:
        path, shown, stem = os.path.join(parent, name), inside(name), Path(name).stem
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
        yield Refusal(inside(captions[stem]), "missing file", detail="a caption without a picture")


def is_hidden(name: str) -> bool:
    """What systems and editors leave behind: .DS_Store, ._a.jpg, .ipynb_checkpoints, __MACOSX."""
    return name.startswith(".") or name == "__MACOSX"


def other_format(name: str) -> str:
    """The cause of a file that is not read for its format."""
    suffix = Path(name).suffix.lower()
    return f"other format, {suffix}" if 1 < len(suffix) <= 9 else "other format"
