"""The sizes of a step on one rank: how many slots, cut into which chunks, how many bytes of pixels.

    shape = StepShape(slots=1000, chunk=256, side=224, ahead=4)
    shape.chunks, shape.spans               # 4, [(0, 256), (256, 512), (512, 768), (768, 1000)]
    shape.step_bytes                        # 150,528,000

A chunk is the slots that go through the image tower at once, and what the loader hands over at once.

Shapes: N slots of this rank, M slots of a chunk (the last one may have fewer), n chunks, S side of a picture.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class StepShape:
    slots: int  # N
    chunk: int  # M, at most N
    side: int  # S, pixels
    ahead: int  # chunks decoded ahead of the step that is computed on, as wanted
    kept: int = 0  # first slots, whole chunks of them, whose pictures need not wait for the second pass

    @classmethod
    def fit(cls, slots: int, *, chunk: int, side: int, ahead_steps: int, ahead_bytes: int, kept: int = 0) -> StepShape:
        """Chunks of `chunk` slots, or of all there are; ahead, what `ahead_steps` steps have and `ahead_bytes` hold."""
        shape = cls(slots, min(chunk, slots), side, ahead=0, kept=kept)
        return replace(shape, ahead=min(ahead_steps * shape.chunks, ahead_bytes // shape.chunk_bytes))

    @property
    def chunks(self) -> int:
        return -(-self.slots // self.chunk)

    @property
    def spans(self) -> list[tuple[int, int]]:
        """(start, stop) of each chunk."""
        return list(spans(0, self.slots, self.chunk))

    @property
    def held_spans(self) -> list[tuple[int, int]]:
        """Those of the chunks that wait for the second pass."""
        return [span for span in self.spans if span[0] >= self.kept]

    @property
    def held_slots(self) -> int:
        return self.slots - self.kept

    @property
    def held_bytes(self) -> int:
        return self.held_slots * self.picture_bytes

    @property
    def picture_bytes(self) -> int:
        return picture_bytes(self.side)

    @property
    def chunk_bytes(self) -> int:
        return self.chunk * self.picture_bytes

    @property
    def step_bytes(self) -> int:
        return self.slots * self.picture_bytes


def picture_bytes(side: int) -> int:
    """Of uint8 [3, side, side]."""
    return 3 * side * side


def spans(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    """[start, stop) cut into parts of `size`; the last one may be shorter."""
    for first in range(start, stop, size):
        yield first, min(first + size, stop)
