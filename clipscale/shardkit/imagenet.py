"""ImageNet as it is handed out -> rows to be packed: folders of classes, a tar of tars, or flat pictures with labels.

    found = find_pictures(Path("ILSVRC2012_img_train.tar"), labels=None)
    found.classes[0], found.rows[0]        # 'n01440764', Row(name='n01440764/n01440764_10026.JPEG', label=0, ...)

Classes count the synset ids in the order of their names, as torchvision's ImageFolder and open_clip's class names do.
Pictures in tars are not unpacked: a row says where its bytes lie.
"""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from clipscale.data.shard.tar import list_members
from clipscale.errors import UserError, require
from clipscale.shardkit.inputs import Refusal, Row
from clipscale.words import counted

_PICTURE = re.compile(r".*\.(jpeg|jpg|png|webp)", re.I)
_SYNSET = re.compile(r"n\d{8}")


@dataclass(frozen=True)
class Labels:
    """Where the classes of a flat set come from."""

    answers: Path  # a line for each picture
    synsets: Path | None = None  # a synset id a line, in the order that numbers count
    first: int | None = None  # the number of the first synset: 0 or 1; None: as the numbers show


class Found(NamedTuple):
    rows: list[Row]
    refusals: list[Refusal]
    classes: list[str]  # synset ids; the label counts them from 0


class Part(np.ndarray):
    """A stretch of a mapped file that slices as bytes do, without a copy of the whole."""

    def __getitem__(self, place):
        taken = super().__getitem__(place)
        return taken.tobytes() if isinstance(place, slice) else int(taken)


def find_pictures(source: Path, labels: Labels | None, track: Callable | None = None) -> Found:
    """Every picture of the set, in the order of folders, archives and names.

    Args:
        source: a folder of class folders, a tar of class tars, or with `labels` a folder or a tar of pictures.
        track: wraps the archives of a tar of tars for a progress bar.

    Raises:
        UserError: not such a set, or labels that do not fit it.
    """
    require(source.exists(), f"{source} does not exist")
    refusals: list[Refusal] = []
    classes: list[str] = []  # also those that have lost all their pictures: the others keep their numbers
    if source.is_dir():
        rows = _of_folder(source, classes) if labels is None else _of_flat_folder(source)
    else:
        rows = _of_tar(source, classes, refusals, track)
    require(
        bool(rows), f"{source} holds no pictures {'in folders or tars of classes' if labels is None else ''}".strip()
    )
    if labels is None:
        flat = next((row.name for row in rows if "/" not in row.name), None)
        require(flat is None, f"{source} holds {flat} outside of any class; for a flat set give --val-labels")
        synsets = [row.name.partition("/")[0] for row in rows]
        classes = sorted(set(classes))
    else:
        rows = [replace(row, name=row.name.rpartition("/")[2]) for row in rows]
        rows.sort(key=lambda row: row.name)
        synsets, classes = read_labels(labels, [row.name for row in rows])
    numbers = {synset: number for number, synset in enumerate(classes)}
    labelled = [
        replace(row, label=numbers[synset], facts={"synset": synset}) for row, synset in zip(rows, synsets, strict=True)
    ]
    return Found(labelled, refusals, classes)


# --- where the pictures lie -------------------------------------------------------------------------------------------


def _of_folder(source: Path, classes: list[str]) -> list[Row]:
    rows = []
    for folder in sorted(path for path in source.iterdir() if path.is_dir() and not path.name.startswith(".")):
        classes.append(folder.name)
        rows += [_row(f"{folder.name}/{name}", folder / name) for name in _picture_names(folder)]
    return rows


def _of_flat_folder(source: Path) -> list[Row]:
    return [_row(name, source / name) for name in _picture_names(source)]


def _picture_names(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if _PICTURE.fullmatch(name) and not name.startswith("."))


def _of_tar(source: Path, classes: list[str], refusals: list[Refusal], track: Callable | None) -> list[Row]:
    """Pictures of a tar, and of the tars in it."""
    if source.stat().st_size == 0:
        raise UserError(f"{source} is empty")
    with open(source, "rb") as file:
        whole = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    outer = list_members(whole.view(Part))
    require(bool(outer.members), f"{source} is neither a folder nor a tar with members ({outer.cut or 'no member'})")
    require(not outer.cut, f"{source} is damaged, so that classes or pictures are missing ({outer.cut}): get it again")
    rows = []
    for name, offset, size in track(outer.members) if track else outer.members:
        name = name.removeprefix("./")
        if _PICTURE.fullmatch(name):
            rows.append(_row(name, source, offset, size))
        elif name.endswith(".tar"):
            stem = Path(name).stem
            inner = list_members(whole[offset : offset + size].view(Part))
            classes.append(stem)
            if inner.cut:
                refusals.append(Refusal(name, "damaged archive", detail=inner.cut))
            rows += [
                _row(f"{stem}/{Path(member.name).name}", source, offset + member.offset, member.size)
                for member in inner.members
                if _PICTURE.fullmatch(member.name)
            ]
    return rows


def _row(name: str, path: Path, offset: int = 0, size: int | None = None) -> Row:
    return Row(name, str(path), None, None, "", offset, size)


# --- labels of a flat set ---------------------------------------------------------------------------------------------


def read_labels(labels: Labels, names: list[str]) -> tuple[list[str], list[str]]:
    """(the synset of each picture, the classes). `names`: of the pictures, sorted.

    A line is a synset id or a number (the pictures in their order), or a picture's name and then one of the two.
    Numbers need `labels.synsets`, for there are several ways to count: the official ground truth counts from 1, in the
    order of the development kit and not of the names.
    """
    lines = [line.replace(",", " ").split() for line in _lines(labels.answers)]
    if lines and not _is_label(lines[0][-1]) and not _is_label(lines[0][min(1, len(lines[0]) - 1)]):
        lines = lines[1:]  # a header
    if all(len(line) == 1 for line in lines):
        require(
            len(lines) == len(names),
            f"{labels.answers} has {counted(len(lines), 'label')} for {counted(len(names), 'picture')}: need one each",
        )
        answers = [line[0] for line in lines]
    else:
        by_name = {Path(line[0]).stem: line[1] for line in lines if len(line) > 1}
        missing = next((name for name in names if Path(name).stem not in by_name), None)
        require(missing is None, f"{labels.answers} has no label for {missing}")
        answers = [by_name[Path(name).stem] for name in names]
    odd = next((answer for answer in answers if not _is_label(answer)), None)
    require(odd is None, f"{labels.answers}: {odd!r} is neither a synset id such as n01440764 nor a class number")
    synsets = None if labels.synsets is None else [line.split()[0] for line in _lines(labels.synsets)]
    if any(answer.isdigit() for answer in answers):
        answers = _count(answers, synsets, labels)
    classes = sorted(set(answers if synsets is None else synsets))
    unknown = sorted(set(answers) - set(classes))
    require(not unknown, f"{labels.answers} has the synset {''.join(unknown[:1])!r}, which {labels.synsets} lacks")
    return answers, classes


def _count(answers: list[str], synsets: list[str] | None, labels: Labels) -> list[str]:
    """Numbers to synset ids."""
    require(
        synsets is not None,
        f"{labels.answers} holds numbers: give --synsets, a file with a synset id a line in the order they count",
    )
    require(
        all(map(str.isdigit, answers)), f"{labels.answers} holds numbers and synset ids: it must hold one of the two"
    )
    numbers, first = [int(answer) for answer in answers], labels.first
    if first is None and 0 in numbers:
        first = 0
    elif first is None and max(numbers) == len(synsets):
        first = 1
    require(
        first is not None, f"{labels.answers}: whether its numbers count from 0 or 1 does not show; say --first-label"
    )
    low, high = min(numbers), max(numbers)
    require(
        first <= low and high - first < len(synsets),
        f"{labels.answers} has the numbers {low} to {high}, {labels.synsets} has synsets {first} to "
        f"{first + len(synsets) - 1}",
    )
    return [synsets[number - first] for number in numbers]


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a text file ({error})") from error


def _is_label(text: str) -> bool:
    return text.isdigit() or bool(_SYNSET.fullmatch(text))
