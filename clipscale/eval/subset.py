"""Which of the class names may be answered, and which answer is right for which label: `eval.zeroshot.subset`.

    subset = find_subset("imagenet_r", names)           # 200 of ImageNet's 1,000 classes
    subset = find_subset("objectnet.json", names)       # {"backpack": 414, "still_camera": ["Polaroid camera", 759]}
    subset.answers                                      # [414, 732, 759]: lines of the names, ascending
    subset.right[1], subset.titles[1]                   # [732, 759], "still_camera": of pictures with label 1

A file is one of two. Lines, each a class: labels stay the lines of the names. Or JSON, class folder -> its class or
classes: labels are the places of the folders in it, from 0. A class is a whole number (a line of the names, from 0), a
name, or, of ImageNet's 1,000, a WordNet id.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any

from clipscale.errors import UserError, require
from clipscale.eval.lines import lines_of, read_file
from clipscale.upstream.timm_files import SUBSETS, imagenet_subset, imagenet_synsets
from clipscale.words import counted, did_you_mean


@dataclass(frozen=True)
class Subset:
    answers: list[int]  # classes, ascending
    right: list[list[int]]  # by label: the answers that are right; []: of pictures that have no place here
    titles: list[str]  # by label: what it is called
    mapped: bool = False  # labels are those of a mapping's folders, not of the names

    @classmethod
    def whole(cls, names: list[str]) -> Subset:
        """All are answers, each for its own label."""
        return cls.of([*range(len(names))], names)

    @classmethod
    def of(cls, classes: list[int], names: list[str]) -> Subset:
        """Some of the names, each for its own label."""
        among = set(classes)
        return cls(sorted(among), [[label] if label in among else [] for label in range(len(names))], names)

    @property
    def labels(self) -> int:
        """How many labels have a right answer."""
        return sum(map(bool, self.right))


def find_subset(subset: str, names: list[str], setting: str = "eval.zeroshot.subset") -> Subset:
    """Raises UserError for a file that cannot be read, and for what names no class, or the same one twice."""
    what = f"{setting}={subset}"
    if subset in SUBSETS:
        require(
            len(names) == len(imagenet_synsets()),
            f"{what} takes 200 of ImageNet's 1,000 classes, and there are {counted(len(names), 'class name')}; set it "
            "to null, or classnames to imagenet",
        )
        return Subset.of(imagenet_subset(subset), names)
    require(
        subset != "objectnet" or os.path.exists(subset),
        f"{what}: which ImageNet classes ObjectNet's folders are comes with ObjectNet and with no package; write it as "
        f'a JSON file {{"folder": ["class name", 414], ...}} and set {setting} to that',
    )
    text, known = read_file(subset, setting), _Known(names)
    if text.lstrip().startswith("{"):
        found = _mapped(text, known, what)
    else:
        classes = [known.find(word, f"{what}: line {at}") for at, word in enumerate(lines_of(text, what), 1)]
        twice = next((each for each in classes if classes.count(each) > 1), None)
        require(twice is None, f"{what} has class {twice} ({names[twice or 0]!r}) twice; take one out")
        found = Subset.of(classes, names)
    require(len(found.answers) > 1, f"{what} leaves fewer than two classes to answer; name more")
    return found


class _Known:
    """Classes by what they are called."""

    def __init__(self, names: list[str]) -> None:
        self._names = names
        self._by_name: dict[str, list[int]] = {}
        synsets = imagenet_synsets()
        for called in (names, synsets if len(names) == len(synsets) else []):
            for number, word in enumerate(called):
                self._by_name.setdefault(word, []).append(number)

    def find(self, word: Any, what: str) -> int:
        """Raises UserError for a number that is no line of the names, and for a word that is none or several."""
        if isinstance(word, str) and word.isascii() and word.isdigit():
            word = int(word)
        if isinstance(word, int) and not isinstance(word, bool):
            require(
                0 <= word < len(self._names),
                f"{what}: there is no class {word}: there are {len(self._names)} (0 to {len(self._names) - 1})",
            )
            return word
        require(isinstance(word, str), f"{what}: {word!r} is no class; write a name or its number")
        found = self._by_name.get(word, [])
        hint = did_you_mean(word, self._by_name) if not found else ""
        require(bool(found), f"{what}: {word!r} is none of the {len(self._names)} class names; {hint or 'mend it'}")
        require(
            len(found) == 1, f"{what}: {word!r} is the name of classes {' and '.join(map(str, found))}; write a number"
        )
        return found[0]


def _mapped(text: str, known: _Known, what: str) -> Subset:
    try:
        pairs = json.loads(text, object_pairs_hook=list)
    except ValueError as error:
        raise UserError(f"{what} is no JSON: {error}") from error
    titles = [folder for folder, _ in pairs]
    twice = next((folder for folder in titles if titles.count(folder) > 1), None)
    require(twice is None, f"{what} has {twice!r} twice; take one out")
    right = []
    for folder, classes in pairs:
        its = classes if isinstance(classes, list) else [classes]
        require(bool(its), f"{what}: {folder!r} has no class; name one, or take it out")
        right.append(sorted({known.find(word, f"{what}: {folder!r}") for word in its}))
    return Subset(sorted({each for its in right for each in its}), right, titles, mapped=True)
