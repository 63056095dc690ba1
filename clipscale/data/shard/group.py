"""Which members of a tar are one sample, as webdataset groups them, and which belong to none.

names, passed = ["a/1.jpg", "a/1.txt", "a/._2.jpg", "README"], []
dict(group(names, passed))                               # {'a/1': {'jpg': 0, 'txt': 1}}
[why_passed(names[number]) for number in passed]         # ['hidden file', 'no suffix']
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_META = re.compile(r"__[^/]*__($|/)")  # webdataset's `skip_meta`
_MAX_PARTS = 16  # of one key in different places: a hostile tar can have a million


def group(names: list[str], passed: list[int] | None = None) -> Iterator[tuple[str, dict[str, int]]]:
    """Runs of members that share a key, as suffix -> number of the member; webdataset's `group_by_keys`.

    Where webdataset raises, at a suffix that the sample has already, a sample of the same key begins.

    passed: takes the numbers of members that belong to no sample and are no metadata of webdataset's (`__info__`).
    """
    current, sample = None, {}
    for number, name in enumerate(names):
        base = name[name.rfind("/") + 1 :]
        stem, dot, suffix = base.partition(".")
        if not dot or not stem or (name[0] == "_" and _META.match(name)):
            if passed is not None and base and not _META.match(name):
                passed.append(number)
            continue
        key = name[: len(name) - len(suffix) - 1]
        suffix = suffix.lower()
        if key != current or suffix in sample:
            if sample:
                yield current, sample
            current, sample = key, {}
        sample[suffix] = number
    if sample:
        yield current, sample


def why_passed(name: str) -> str:
    """Of a member that `group` passed over."""
    return "hidden file" if name[name.rfind("/") + 1 :].startswith(".") else "no suffix"


def lying_apart(names: list[str]) -> dict[str, list[set[str]]]:
    """The keys that stand in several places of the tar, with the suffixes that each has in the first few of them."""
    first: dict[str, set[str]] = {}
    apart: dict[str, list[set[str]]] = {}
    for key, sample in group(names):
        if key not in first:
            first[key] = set(sample)
        elif len(parts := apart.setdefault(key, [first[key]])) < _MAX_PARTS:
            parts.append(set(sample))
    return apart
