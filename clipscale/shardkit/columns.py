"""Which columns of a list hold the pictures' paths, the captions and the labels: known by their names, never guessed.

columns = find_columns(Path("a.csv"), ["filepath", "id", "title"], Keys(image=None, caption=None, label=None))
columns                                          # Columns(image=0, caption=2, label=None)
find_columns(Path("a.csv"), ["file", "words"], Keys(None, None, None))
# UserError: a.csv has the columns 'file', 'words': say which holds the picture's path (--image-key NAME) and ...
"""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from clipscale.data.shard.judge import IMAGE_SUFFIXES, OTHER_PICTURE_SUFFIXES
from clipscale.errors import UserError, require
from clipscale.tell import tell

# What counts as a picture in a folder; the ones that shards cannot hold are then refused by name and cause.
_SUFFIXES = {*IMAGE_SUFFIXES, *OTHER_PICTURE_SUFFIXES, "pgm"} - {"svg"}  # a drawing is no picture of a folder
PICTURE_NAME = re.compile(rf".*\.({'|'.join(sorted(_SUFFIXES))})", re.I | re.S)
# open_clip's, and those of Hugging Face's image folders and of the usual exports
IMAGE_NAMES = {"filepath", "file_path", "path", "image_path", "image", "file_name", "filename"}
CAPTION_NAMES = {"caption", "title", "text"}
USUAL_NAMES = ("filepath", "caption")  # these are taken beside other known ones
_DELIMITERS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}


@dataclass(frozen=True)
class Keys:
    """Column names as a person gives them; None for image and caption: the known names."""

    image: str | None
    caption: str | None
    label: str | None


class Columns(NamedTuple):
    """Numbers of columns."""

    image: int
    caption: int
    label: int | None


def find_columns(source: Path, names: list[str], keys: Keys) -> Columns:
    """Of a list whose header, or first record, has these `names`.

    Raises:
        UserError: no column or several may be meant: told with the columns and the options that say which.
    """
    has = ", ".join(map(repr, names))
    require(len(names) > 1, f"{source} has the one column {has or repr('')}: need a picture and a caption")
    label = None if keys.label is None else _named(source, names, keys.label, "--label-key")
    image = _find(source, names, keys.image, IMAGE_NAMES, "--image-key")
    caption = _find(source, names, keys.caption, CAPTION_NAMES, "--caption-key")
    asked = [f"which holds the picture's path (--image-key NAME{_among(image, names)})"] * (len(image) != 1)
    asked += [f"which the caption (--caption-key NAME{_among(caption, names)})"] * (len(caption) != 1)
    if asked:
        raise UserError(f"{source} has the columns {has}: say {' and '.join(asked)}{_hint(names, image)}")
    return Columns(image[0], caption[0], label)


def choose_columns(source: Path, names: list[str], keys: Keys) -> Columns:
    """`find_columns`, telling which were taken where nobody named them and they are not the usual two."""
    found = find_columns(source, names, keys)
    taken = names[found.image], names[found.caption]
    if keys.image is None and keys.caption is None and taken != USUAL_NAMES:
        tell(f"{source}: pictures from the column {taken[0]!r}, captions from {taken[1]!r}")
    return found


def lacks_header(first_row: list[str], keys: Keys) -> bool:
    """Whether a table's first row is data already: a picture's name and one more field, and no column is named."""
    named = any((keys.image, keys.caption, keys.label))
    return len(first_row) == 2 and not named and bool(PICTURE_NAME.fullmatch(first_row[0]))


def delimiter_of(source: Path, first_line: str, usual: str, keys: Keys) -> str:
    """The usual one of its suffix, unless the header has known columns by another only: open_clip's .csv have tabs."""
    if usual in first_line:
        return usual
    for other, name in _DELIMITERS.items():
        names = next(csv.reader([first_line], delimiter=other), [])
        try:
            find_columns(source, names, keys)
        except UserError:
            continue
        tell(f"{source}: {name} separate its columns, not {_DELIMITERS[usual]}")
        return other
    return usual


def _named(source: Path, names: list[str], wanted: str, option: str) -> int:
    times, has = names.count(wanted), ", ".join(map(repr, names))
    require(times > 0, f"{source} has no column {wanted!r} (it has {has}): name it by {option}")
    require(times == 1, f"{source} has {times} columns {wanted!r} (it has {has}): rename one")
    return names.index(wanted)


def _find(source: Path, names: list[str], wanted: str | None, known: set[str], option: str) -> list[int]:
    """The columns that may be meant: the usual one alone, where it is there."""
    if wanted is not None:
        return [_named(source, names, wanted, option)]
    usual = [number for number, name in enumerate(names) if name in USUAL_NAMES and name in known]
    if len(usual) == 1:
        return usual
    return [number for number, name in enumerate(names) if name.strip().casefold() in known]


def _among(found: list[int], names: list[str]) -> str:
    return f": {' or '.join(repr(names[number]) for number in found)}" if found else ""


def _hint(names: list[str], image: list[int]) -> str:
    plain = {name.strip().casefold() for name in names}
    if not image and ("url" in plain or {"key", "status"} <= plain):
        return (
            "; tables of img2dataset name no files: its shards need no packing, and what it wrote with "
            "output_format=files is packed as a folder"
        )
    if any(map(PICTURE_NAME.fullmatch, names)):
        return "; if this is no header, write one before it: filepath, caption, ..."
    return ""
