"""What timm knows of ImageNet's classes, read from its files: importing it takes seconds, and torch.

imagenet_synsets()[0]                   # "n01440764": label 0
imagenet_subset("imagenet_a")[:3]       # [6, 11, 13]: labels of the 200 classes of ImageNet-A
"""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path

from clipscale.errors import UserError

SUBSETS = ("imagenet_a", "imagenet_r")


def imagenet_synsets() -> list[str]:
    """The WordNet id of each of the 1,000 classes, by label."""
    return list(_lines("imagenet_synsets.txt"))


def imagenet_subset(name: str) -> list[int]:
    """`name`: one of SUBSETS. Ascending labels."""
    return sorted(map(int, _lines(f"{name}_indices.txt")))


@cache
def _lines(name: str) -> tuple[str, ...]:
    found = importlib.util.find_spec("timm")
    try:
        place = Path(found.submodule_search_locations[0], "data", "_info", name)
        return tuple(place.read_text(encoding="utf-8").split())
    except OSError as error:
        raise UserError(f"this timm has no {name}, ImageNet's classes; pip install --upgrade timm") from error
