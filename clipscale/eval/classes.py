"""Class names, templates and class folders of a zero-shot evaluation: all that is known without a picture or a model.

names, templates = class_names(config.eval.zeroshot), class_templates(config.eval.zeroshot)
check_folder(config.eval.zeroshot, names)  # as many class folders as names
note = check_labels([b"3", b"0"], classes=10)  # what to tell of names that no label reaches

No torch import: the command line looks at these before it loads anything.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from clipscale.config import ZeroShot
from clipscale.data.shard.labels import LabelError, label_of
from clipscale.errors import UserError, require
from clipscale.files import why_unreadable
from clipscale.open_clip_files import imagenet_classes, imagenet_templates


def class_names(config: ZeroShot) -> list[str]:
    """Raises UserError for a file that is missing, empty or has a gap."""
    if config.classnames == "imagenet":
        return imagenet_classes()
    return _lines(config.classnames, "eval.zeroshot.classnames")


def class_templates(config: ZeroShot) -> list[str]:
    """Raises UserError as `class_names`, or for a template that does not hold '{}' once."""
    if config.templates == "imagenet":
        return imagenet_templates()
    templates = _lines(config.templates, "eval.zeroshot.templates")
    odd = [template for template in templates if template.count("{}") != 1]
    require(not odd, f"eval.zeroshot.templates: {odd[:1]} must hold '{{}}' once, where the class name goes")
    return templates


def class_folders(root: str) -> list[str]:
    """The folders of an ImageFolder tree in the order of their names: folder i has label i."""
    require(os.path.isdir(root), f"eval.zeroshot.folder {root!r} is not a folder")
    return sorted(entry.name for entry in os.scandir(root) if entry.is_dir())


def check_folder(config: ZeroShot, names: list[str]) -> None:
    """Raise UserError unless `folder` has a folder for each name."""
    classes = len(class_folders(config.folder))
    require(
        classes == len(names),
        f"eval.zeroshot.folder {config.folder!r} has {classes} class folders, eval.zeroshot.classnames="
        f"{config.classnames!r} names {len(names)}; line i names the i-th folder by name",
    )


def check_labels(notes: Iterable[bytes], classes: int) -> str:
    """What to tell of names above every label, which make the task another one; empty where there are none.

    Args:
        notes: what the .cls members hold.
        classes: how many names there are.

    Raises:
        UserError: a label that is no number, or that has no name.
    """
    highest = max((checked_label(note, classes) for note in notes), default=-1)
    if highest in (-1, classes - 1):
        return ""
    return (
        f"warning: eval.zeroshot.classnames has {classes} names, and no label of the pictures is above {highest}: "
        f"{classes - highest - 1} classes that none belongs to are answers too; set it to the list of this set"
    )


def checked_label(note: bytes, classes: int) -> int:
    """The label in a .cls member. Raises UserError for what is no number, or none of `classes`."""
    try:
        label = label_of(note)
    except LabelError as error:
        raise UserError(f"{error}: {note[:40]!r}; a .cls member holds the line number of a class name") from error
    require(
        label < classes,
        f"label {label} has no class name: there are {classes} (0 to {classes - 1}); eval.zeroshot.classnames must be "
        "the list of this set",
    )
    return label


def _lines(path: str, setting: str) -> list[str]:
    """One a line. A line's number is a label, so an empty one between others is refused, not passed over."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").rstrip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{setting}={path!r} cannot be read: {why_unreadable(path, error)}") from error
    lines = [line.strip() for line in lines]
    require(bool(lines), f"{setting}={path!r} is empty; write one a line")
    require(all(lines), f"{setting}={path!r}: line {lines.index('') + 1 if '' in lines else 0} is empty; take it out")
    return lines
