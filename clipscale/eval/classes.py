"""Class names, templates and class folders of a zero-shot evaluation, and whether they fit each other.

    classes = find_classes(config.eval.zeroshot)        # Classes(names=["dog", "cat"], labels={"cat": 1, "dog": 0})
    templates = class_templates(config.eval.zeroshot)   # ["a photo of a {}."]
    note = check_labels([b"3", b"0"], Subset.whole(names))      # what to tell of names that no label reaches

All that is known without a picture or a model, and without torch: the command line looks at these before it loads
anything.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from clipscale.config import ZeroShot
from clipscale.data.shard.labels import LabelError, label_of
from clipscale.errors import UserError, require
from clipscale.eval.lines import read_lines
from clipscale.eval.subset import Subset, find_subset
from clipscale.upstream.open_clip_files import imagenet_classes, imagenet_templates
from clipscale.upstream.timm_files import SUBSETS, imagenet_subset, imagenet_synsets
from clipscale.words import counted

IMAGENET, KEY = "imagenet", "eval.zeroshot"
_WORDNET_ID = re.compile(r"n\d{8}")
_SHOWN = 3  # folders that a message names


@dataclass(frozen=True)
class Classes:
    """Names in the order of their labels, and which class each folder of a tree is."""

    names: list[str]
    labels: dict[str, int] = field(default_factory=dict)  # class folder -> label; none for shards
    note: str = ""  # what to tell of how they were brought together
    subset: Subset | None = None  # which may be answered; None: all, each for its label


def find_classes(config: ZeroShot, key: str = KEY, own: list[str] | None = None) -> Classes:
    """The names, and for a tree the label of each class folder.

    Args:
        key: where the settings stand, for messages.
        own: names that come with the shards.

    Folders that are numbers are labels, and WordNet ids are ImageNet's classes where the names are ImageNet's. Others
    go by their names where those are class names, and else by their order, which is told. Without `classnames` a tree's
    folders are the names (ImageNet's, for its WordNet ids, its 1,000 folders or a subset), and shards have their own
    or ImageNet's. With a subset, folders of other classes are passed over, which is told.

    Raises:
        UserError: a names file that is missing, empty or has a gap; folders and names that contradict each other; a
            subset that is none of these names.
    """
    folders = None if config.folder is None else class_folders(config.folder, key)
    require(folders != [], f"{key}.folder {config.folder!r} has no class folders")
    if folders is not None and (config.classnames, config.subset) == (None, None):
        names = _names_of_folders(config.folder, folders, key)
        if not names:
            return Classes(*_own_names(folders, key))
    else:
        names = own if own and config.classnames is None else _names(config.classnames or IMAGENET, key)
    subset = None if config.subset is None else find_subset(config.subset, names, f"{key}.subset")
    if folders is None:
        return Classes(names, subset=subset)
    if subset is None:
        return Classes(names, *_labels(config, folders, names, key))
    return Classes(names, *_labels_within(config, folders, names, key, subset), subset)


def class_templates(config: ZeroShot, key: str = KEY, own: list[str] | None = None) -> list[str]:
    """`own`: those that come with the shards, used where the settings have none.

    Raises:
        UserError: a file that is missing, empty or has a gap, or a template that does not hold '{}' once.
    """
    if config.templates == IMAGENET or (config.templates is None and own is None):
        return imagenet_templates()
    templates = own if config.templates is None else read_lines(config.templates, f"{key}.templates")
    odd = [template for template in templates if template.count("{}") != 1]
    require(not odd, f"{key}.templates: {odd[:1]} must hold '{{}}' once, where the class name goes")
    return templates


def class_folders(root: str, key: str = KEY) -> list[str]:
    """The folders of an ImageFolder tree, sorted by name; hidden ones are none."""
    require(os.path.isdir(root), f"{key}.folder {root!r} is not a folder")
    return sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not hidden(entry.name))


def hidden(name: str) -> bool:
    """Files and folders that systems and notebooks leave behind: ._1.jpg, .ipynb_checkpoints."""
    return name.startswith(".")


def check_labels(notes: Iterable[bytes], subset: Subset, key: str = KEY) -> str:
    """What to tell of names above every label, which make the task another one; empty where there are none.

    Args:
        notes: what the .cls members hold.
        subset: `Subset.whole` of the names, or what `eval.zeroshot.subset` has made of them.

    Raises:
        UserError: a label that is no number, or that has no name.
    """
    classes = len(subset.right)
    highest = max((checked_label(note, subset, key) for note in notes), default=-1)
    if highest in (-1, classes - 1) or subset.mapped or len(subset.answers) < classes:
        return ""
    return (
        f"warning: {key}.classnames has {classes} names, and no label of the pictures is above {highest}: "
        f"{classes - highest - 1} classes that none belongs to are answers too; set it to the list of this set"
    )


def checked_label(note: bytes, subset: Subset, key: str = KEY) -> int:
    """The label in a .cls member. Raises UserError for what is no number, or has no right answer."""
    try:
        label = label_of(note)
    except LabelError as error:
        raise UserError(f"{error}: {note[:40]!r}; a .cls member holds the line number of a class name") from error
    classes = len(subset.right)
    wanted = f"{key}.subset must have them all" if subset.mapped else f"{key}.classnames must be the list of this set"
    require(label < classes, f"label {label} has no class name: there are {classes} (0 to {classes - 1}); {wanted}")
    require(
        bool(subset.right[label]),
        f"label {label} ({subset.titles[label]!r}) is none of the {subset.labels} classes of {key}.subset; labels are "
        "lines of the class names, from 0",
    )
    return label


# --- folders and names ------------------------------------------------------------------------------------------------


def _names(classnames: str, key: str) -> list[str]:
    return imagenet_classes() if classnames == IMAGENET else read_lines(classnames, f"{key}.classnames")


def _names_of_folders(root: str, folders: list[str], key: str) -> list[str]:
    """ImageNet's names where the folders are ImageNet's, [] where they are names themselves."""
    if _by_synset(folders):
        return imagenet_classes()
    ids = [name for name in folders if _WORDNET_ID.fullmatch(name)]
    numbers = [name for name in folders if _is_number(name)]
    if not ids and len(numbers) < len(folders):
        return []
    names = imagenet_classes()
    require(
        len(names) in (len(ids), len(numbers)) and len(folders) == len(names),
        f"{key}.folder {root!r} has {counted(len(folders), 'class folder')} ({_shown(folders)}), which are no "
        f"names and not ImageNet's 1,000; set {key}.classnames to a file with their names",
    )
    return names


def _own_names(folders: list[str], key: str) -> tuple[list[str], dict[str, int], str]:
    labels = {folder: label for label, folder in enumerate(folders)}
    note = f"{key}.classnames is not set: the {counted(len(folders), 'class folder')} are the names"
    return [folder.replace("_", " ") for folder in folders], labels, f"{note} ({_shown(folders)})"


def _labels(config: ZeroShot, folders: list[str], names: list[str], key: str) -> tuple[dict[str, int], str]:
    """(label of each folder, what to tell). By number, by name or by order; UserError where two of them disagree."""
    by_name = _by_name(folders, names)
    by_order = {folder: label for label, folder in enumerate(folders)}
    if all(map(_is_number, folders)):
        labels, note = {folder: int(folder) for folder in folders}, ""
        above = [folder for folder in folders if labels[folder] >= len(names)]
        require(
            not above,
            f"{key}.folder {config.folder!r}: the folders are labels, and {_shown(above)} has no class name: "
            f"there are {len(names)} (0 to {len(names) - 1}); {key}.classnames must be the list of this set",
        )
    elif len(by_name) == len(folders):
        labels, note = by_name, ""
    elif (config.subset in SUBSETS or names == imagenet_classes()) and _by_synset(folders):
        labels, note = _by_synset(folders), "" if config.subset is not None else _few_of_imagenet(folders, key)
    else:
        require(
            len(folders) == len(names),
            f"{key}.folder {config.folder!r} has {len(folders)} class folders, {key}.classnames="
            f"{config.classnames or IMAGENET!r} names {len(names)}, and {_shown(sorted(set(folders) - set(by_name)))} "
            "is none of them; name each folder by its class or its label, or each line i after the i-th folder",
        )
        labels = by_order
        pairs = ", ".join(f"{folder} = {names[label]}" for folder, label in list(by_order.items())[:_SHOWN])
        known = names == imagenet_classes() and all(map(_WORDNET_ID.fullmatch, folders))
        note = "" if known else f"class folders are taken in the order of their names, line by line: {pairs}, ..."
    other = next((folder for folder, label in by_name.items() if labels[folder] != label), None)
    require(
        other is None,
        f"{key}.folder {config.folder!r}: the folder {other!r} is label {labels.get(other)} by its "
        f"{'number' if _is_number(other or '') else 'place'}, and line {by_name.get(other)} (from 0) of "
        f"{key}.classnames by its name; bring the two in one order",
    )
    twice = [label for label, times in Counter(labels.values()).items() if times > 1]
    same = [folder for folder in folders if labels[folder] in twice[:1]]
    require(not twice, f"{key}.folder {config.folder!r}: {_shown(same)} are one class, {names[(twice or [0])[0]]!r}")
    return labels, note


def _labels_within(
    config: ZeroShot, folders: list[str], names: list[str], key: str, subset: Subset
) -> tuple[dict[str, int], str]:
    """As `_labels`, of the folders that have a place in the subset; a mapping has the folders' own labels."""
    what = f"{key}.subset={config.subset}"
    if subset.mapped:
        labels, note = _by_name(folders, subset.titles), ""
        missing = [title for label, title in enumerate(subset.titles) if label not in labels.values()]
        if missing:
            note = f"warning: no folder for {len(missing)} of the {len(subset.titles)} in {what} ({_shown(missing)})"
    else:
        found, note = _labels(config, folders, names, key)
        labels = {folder: label for folder, label in found.items() if subset.right[label]}
    outside = [folder for folder in folders if folder not in labels]
    numbers = [] if subset.mapped else [folder for folder in outside if _is_number(folder)]
    require(
        not numbers,
        f"{key}.folder {config.folder!r}: the folders are labels, lines of the class names, and {_shown(numbers)} is "
        f"none of the {subset.labels} of {what}; name them by WordNet ids or class names if they count otherwise",
    )
    require(bool(labels), f"{key}.folder {config.folder!r}: none of the folders ({_shown(folders)}) is in {what}")
    passed = f"{counted(len(outside), 'class folder')} not in {what} passed over ({_shown(outside)})" if outside else ""
    return labels, "; ".join(filter(None, [note, passed]))


def _few_of_imagenet(folders: list[str], key: str) -> str:
    """What to tell of fewer folders than ImageNet has: a set of its own, mostly, with a subset of its own."""
    labels = sorted(_by_synset(folders).values())
    if len(labels) == len(imagenet_classes()):
        return ""
    hint = next((name for name in SUBSETS if imagenet_subset(name) == labels), "FILE")
    return (
        f"warning: {counted(len(labels), 'class folder')} of ImageNet's 1,000, and all 1,000 are answers; "
        f"{key}.subset={hint} takes those alone"
    )


def _by_synset(folders: list[str]) -> dict[str, int]:
    """ImageNet's label of each folder; {} unless all are WordNet ids of its classes."""
    if not all(map(_WORDNET_ID.fullmatch, folders)):
        return {}
    known = {synset: label for label, synset in enumerate(imagenet_synsets())}
    return {folder: known[folder] for folder in folders} if set(folders) <= known.keys() else {}


def _by_name(folders: list[str], names: list[str]) -> dict[str, int]:
    """The label of each folder that is called like a class: exactly, or but for case, blanks, '_' and '-'."""
    exact = {name: label for label, name in reversed([*enumerate(names)])}
    alike: dict[str, list[int]] = {}
    for label, name in enumerate(names):
        alike.setdefault(_plain(name), []).append(label)
    found = {}
    for folder in folders:
        near = alike.get(_plain(folder), [])
        if folder in exact or len(near) == 1:
            found[folder] = exact.get(folder, near[0])
    return found


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdigit()


def _shown(folders: list[str]) -> str:
    return ", ".join(map(repr, folders[:_SHOWN])) + (", ..." if len(folders) > _SHOWN else "")
