"""ImageNet as it is handed out -> rows to be packed: folders of classes, a tar of tars, or flat pictures with labels.

    found = find_pictures(Path("ILSVRC2012_img_train.tar"), labels=None)
    found.classes[0], found.rows[0]        # 'n01440764', Row(name='n01440764/n01440764_10026.JPEG', label=0, ...)

Classes count the synset ids in the order of their names, as torchvision's ImageFolder and open_clip's class names do;
names that are numbers (0, 1, ..., 11) are the labels themselves. Pictures in tars are not unpacked: a row says where
its bytes lie. What is not read (hidden files, other formats) is counted: `Found.passed_over`.
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
from clipscale.shardkit.inputs import PassedOver, Refusal, Row, is_hidden, other_format
from clipscale.tell import tell
from clipscale.words import counted

_PICTURE = re.compile(r".*\.(jpeg|jpg|png|webp)", re.I | re.S)
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
    passed_over: list[PassedOver]
    classes: list[str]  # synset ids; the label counts them from 0


class Part(np.ndarray):
    """A stretch of a mapped file that slices as bytes do, without a copy of the whole."""

    def __getitem__(self, place):
        taken = super().__getitem__(place)
        return taken.tobytes() if isinstance(place, slice) else int(taken)


def find_pictures(
    source: Path, labels: Labels | None, track: Callable | None = None, first_label: int | None = None
) -> Found:
    """Every picture of the set, in the order of folders, archives and names.

    Args:
        source: a folder of class folders, a tar of class tars, or with `labels` a folder or a tar of pictures.
        track: wraps the archives of a tar of tars for a progress bar.
        first_label: what the names of classes that are numbers count from, without `labels`.

    Raises:
        UserError: not such a set, or labels that do not fit it.
    """
    require(source.exists(), f"{source} does not exist")
    found = Found([], [], [], [])
    if source.is_dir():
        rows = _of_folder(source, found) if labels is None else _of_flat_folder(source, found)
    else:
        rows = _of_tar(source, found, track)
    require(
        bool(rows), f"{source} holds no pictures {'in folders or tars of classes' if labels is None else ''}".strip()
    )
    if labels is None:
        known = set(found.classes)
        flat = next((row.name for row in rows if "/" not in row.name or row.name.partition("/")[0] not in known), None)
        require(flat is None, f"{source} holds {flat} outside of any class; for a flat set give --val-labels")
        synsets = [row.name.partition("/")[0] for row in rows]
        classes = in_order(source, known, first_label)
        if empty := sorted(known - set(synsets)):
            tell(
                f"{source}: {len(empty)} of {len(classes)} classes have no picture ({empty[0]}); they keep their labels"
            )
    else:
        rows = [replace(row, name=row.name.rpartition("/")[2]) for row in rows]
        rows.sort(key=lambda row: row.name)
        synsets, classes = read_labels(labels, [row.name for row in rows])
    numbers = {synset: number for number, synset in enumerate(classes)}
    labelled = [
        replace(row, label=numbers[synset], facts={"synset": synset}) for row, synset in zip(rows, synsets, strict=True)
    ]
    return found._replace(rows=labelled, classes=classes)


def in_order(source: Path, classes: set[str], first_label: int | None) -> list[str]:
    """The classes in the order of their labels: of their names, or the numbers that their names are.

    Args:
        first_label: what such numbers count from; None: 0.

    Raises:
        UserError: some names are numbers and others not, so that the two orders differ; or numbers that are no labels.
    """
    numbers = {name for name in classes if name.isascii() and name.isdecimal()}
    if not numbers or (numbers != classes and sorted(numbers) == sorted(numbers, key=int)):
        require(first_label is None, "--first-label and --synsets belong to --val-labels (or the classes are numbers)")
        return sorted(classes)
    word = min(classes - numbers, default="")
    require(
        not word,
        f"{source}: some of its classes are numbers ({min(numbers)}), others not ({word}): whether the numbers are the "
        "labels does not show; move one kind away, or name all in one way",
    )
    by_number: dict[int, str] = {}
    for name in sorted(numbers):
        twin = by_number.setdefault(int(name), name)
        require(twin == name, f"{source} has the classes {twin} and {name}, which are one number: rename or merge them")
    wanted = range(first_label or 0, (first_label or 0) + len(by_number))
    missing = next((number for number in wanted if number not in by_number), None)
    require(
        missing is None,
        f"{source}: its {len(by_number)} classes are numbers, {min(by_number)} to {max(by_number)}, but there is no "
        f"{missing}: labels count from 0, or from --first-label, without a gap; make an empty class for each that is "
        "missing, or rename them",
    )
    tell(f"{source}: its classes are the numbers {wanted[0]} to {wanted[-1]}: their labels are 0 to {len(wanted) - 1}")
    return [by_number[number] for number in wanted]


# --- where the pictures lie -------------------------------------------------------------------------------------------


def _of_folder(source: Path, found: Found) -> list[Row]:
    rows = []
    for entry in sorted(source.iterdir()):
        if not entry.is_dir() or is_hidden(entry.name):
            _pass_over(found, entry.name, entry.is_dir(), "outside of any class")
            continue
        found.classes.append(entry.name)
        names = _picture_names(entry, found, f"{entry.name}/")
        rows += [_row(f"{entry.name}/{name}", entry / name) for name in names]
    return rows


def _of_flat_folder(source: Path, found: Found) -> list[Row]:
    return [_row(name, source / name) for name in _picture_names(source, found)]


def _picture_names(folder: Path, found: Found, place: str = "") -> list[str]:
    """Sorted. `place`: what stands before a name that is passed over."""
    names = []
    for name in sorted(os.listdir(folder)):
        if _is_picture(name):
            names.append(name)
        else:
            _pass_over(found, place + name, (folder / name).is_dir())
    return names


def _is_picture(name: str) -> bool:
    return bool(_PICTURE.fullmatch(name)) and not is_hidden(Path(name).name)


def _pass_over(found: Found, name: str, is_folder: bool = False, why: str | None = None) -> None:
    """Note a file or folder that is not read. `why`: where neither its name nor its format is the cause."""
    if is_hidden(Path(name).name):
        cause = "hidden folder" if is_folder else "hidden file"
    elif is_folder:
        cause = "folder inside of a class" if "/" in name else "folder"
    else:
        cause = (why if _is_picture(name) else None) or other_format(name)
    found.passed_over.append(PassedOver(name, cause))


def _of_tar(source: Path, found: Found, track: Callable | None) -> list[Row]:
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
        if _is_picture(name):
            rows.append(_row(name, source, offset, size))
        elif name.endswith(".tar") and not is_hidden(Path(name).name):
            stem = Path(name).stem
            inner = list_members(whole[offset : offset + size].view(Part))
            found.classes.append(stem)
            if inner.cut:
                found.refusals.append(Refusal(name, "damaged archive", detail=inner.cut))
            for member in inner.members:
                inside = f"{stem}/{Path(member.name).name}"
                if _is_picture(member.name):
                    rows.append(_row(inside, source, offset + member.offset, member.size))
                else:
                    _pass_over(found, inside)
        else:
            _pass_over(found, name)
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
        by_number = sorted(names, key=_by_numbers)
        odd = next(
            ((first, second) for first, second in zip(names, by_number, strict=True) if first != second), ("", "")
        )
        require(
            by_number == names,
            f"{labels.answers} has labels without names, and whether {odd[0]} or {odd[1]} comes first does not show "
            "(letters or numbers): write each picture's name before its label",
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


def _by_numbers(name: str) -> list[tuple[int, str]]:
    """For sorting as people count: 2.jpg before 10.jpg."""
    return [(int(piece), "") if piece.isdecimal() else (-1, piece) for piece in re.split(r"(\d+)", name)]


def _is_label(text: str) -> bool:
    return (text.isascii() and text.isdigit()) or bool(_SYNSET.fullmatch(text))
