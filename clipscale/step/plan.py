"""How a step goes through the towers: the sizes of its chunks, and whose graphs are kept from pass 1 to pass 2.

    plan = StepPlan(image=TowerPlan(chunk=256), text=TowerPlan(chunk=1024))       # nothing is kept
    plan.image.kept_samples(10_000)                                               # 0

The plan of a run is made before its first step (planning.py) and lies in its checkpoints: what is kept and how large
the chunks are decides the last bits of a step.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class GraphCost:
    """Bytes that the graph of a chunk keeps: `fixed` and, of each sample, `sample` + `token` x its tokens."""

    fixed: float = 0.0
    sample: float = 0.0
    token: float = 0.0
    block: float = 0.0
    """Of each sample, at full length, while the backward pass runs the largest checkpointed block again."""

    def of(self, samples: int, tokens: int = 0) -> float:
        """Of a chunk of `samples` that hold `tokens` in all."""
        return self.fixed + self.sample * samples + self.token * tokens

    def peak(self, samples: int, tokens: int = 0) -> float:
        """The same, with the block that is run again."""
        return self.of(samples, tokens) + self.block * samples


@dataclass(frozen=True)
class TowerPlan:
    """One tower's part."""

    chunk: int
    """Samples that go through the tower at once, with gradients; of captions, of full length."""
    forward_chunk: int | None = None
    """Those that go through it at once in pass 1 where nothing is kept: a multiple of `chunk`; None: the same."""
    keep_bytes: int = 0
    """What the graphs of the first chunks may hold, up to which they are kept."""
    cost: GraphCost = field(default_factory=GraphCost)
    """Of its graphs; read only where something may be kept."""
    by_chunk: bool = False
    """Some of its layers draw for a chunk as a whole: both passes take the same chunks, in the order of the slots."""

    @property
    def wide(self) -> int:
        """Samples of a chunk of pass 1 where nothing is kept."""
        return self.forward_chunk or self.chunk

    def kept_samples(self, samples: int) -> int:
        """How many of a step's first samples are kept, of a tower whose samples are all alike: whole wide chunks."""
        if self.keep_bytes <= 0:
            return 0
        of_one = self.cost.of(self.chunk) * (self.wide // self.chunk)
        chunks = int(self.keep_bytes // max(of_one, 1.0))
        return min(samples, chunks * self.wide)


@dataclass(frozen=True)
class StepPlan:
    """Both towers' parts."""

    image: TowerPlan
    text: TowerPlan

    @property
    def chunks(self) -> tuple[int, int]:
        """Pictures, and captions of full length, that go through their tower at once."""
        return self.image.chunk, self.text.chunk
