"""A model as it is evaluated: without dropout, and back to what it was whatever happens meanwhile.

with evaluating(towers):
    towers.image(pixels)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from clipscale.towers import Towers


@contextmanager
def evaluating(towers: Towers) -> Iterator[None]:
    training = towers.model.training
    towers.model.eval()
    try:
        yield
    finally:
        towers.model.train(training)
