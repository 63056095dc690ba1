"""When a run's numbers go wrong: steps are skipped and counted, collapse is noticed, `train.on_divergence` decides.

    guard = Guard(config, towers, world, state.health)
    guard.look(row, 4096, trouble, keys)       # after each step; raises Diverged where it is one too many
    guard.problem()                            # why no checkpoint may be written now, or ''
    state.health = guard.record()

Every rank calls these alike, and raises alike: what they go by is the same on all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from clipscale.config import Config
from clipscale.dist import World
from clipscale.errors import SharedError
from clipscale.guard.health import Health, collapse_sign, has_learned, problem
from clipscale.guard.nonfinite import Trouble, explain
from clipscale.telemetry.faults import report_fault
from clipscale.towers import Towers
from clipscale.upstream.open_clip_files import logit_scale_init
from clipscale.words import counted

_FIX = "lower optim.lr or lengthen optim.warmup_steps"


class Diverged(SharedError):
    """The run cannot go on as it is. On every rank, in one line with the fix.

    step: the last one.
    kind: divergence or collapse (telemetry/faults.py).
    what: without the fix.
    """

    def __init__(self, step: int, kind: str, what: str, fix: str) -> None:
        super().__init__(f"{what}; {fix}")
        self.step, self.kind, self.what = step, kind, what


class Guard:
    def __init__(self, config: Config, towers: Towers, world: World, recorded: Mapping[str, Any]) -> None:
        known = {field.name for field in dataclasses.fields(Health)}
        self.health = Health(**{name: value for name, value in recorded.items() if name in known})
        self._config, self._towers, self._world = config, towers, world

    def record(self) -> dict[str, Any]:
        """For RunState.health."""
        return dataclasses.asdict(self.health)

    def problem(self) -> str:
        """Why the state after the last step must not become a checkpoint; '' for nothing."""
        return problem(self.record())

    def look(
        self,
        row: Mapping[str, Any],
        pairs: int,
        trouble: Trouble | None,
        keys: Callable[[Sequence[int]], list[str]],
    ) -> None:
        """Take in a step: its row of metrics, and what was wrong where it was skipped; collective then.

        Args:
            pairs: valid pairs of all ranks.
            keys: shard and key of the samples in these slots of this rank.

        Raises:
            Diverged: a weight is not finite; `train.max_nonfinite_steps` in a row were skipped; or
                `train.collapse_steps` in a row had a sign of collapse.
        """
        if trouble is not None:
            self._skipped(row["step"], trouble, keys)
        elif pairs > 0:  # else nothing was learned, and nothing can be told
            self.health.nonfinite_in_a_row = 0
            self._look_for_collapse(row, pairs)

    def _skipped(self, step: int, trouble: Trouble, keys: Callable[[Sequence[int]], list[str]]) -> None:
        health, most = self.health, self._config.train.max_nonfinite_steps
        what, broken = explain(trouble, self._towers, keys, self._world)
        health.nonfinite_in_a_row += 1
        count = health.nonfinite_in_a_row
        report_fault(
            "nonfinite",
            f"step {step}: {what}",
            action=f"step skipped, {count} in a row, the weights stay as they were",
            step=step,
            lost_steps=1,
        )
        precision = "use train.precision=bf16 or fp32" if self._towers.image.autocast else "look at the samples named"
        if broken:
            self._diverged(step, f"step {step}: weights are not finite", _FIX, first=count == 1)
        elif count >= most:
            what = f"step {step}: {counted(count, 'step')} in a row without a finite gradient"
            self._diverged(step, f"{what} (train.max_nonfinite_steps)", f"{_FIX}, or {precision}", first=count == most)

    def _look_for_collapse(self, row: Mapping[str, Any], pairs: int) -> None:
        health, config = self.health, self._config
        most = config.train.collapse_steps
        if most == 0:
            return
        health.learned |= has_learned(row["loss"], pairs)
        late = row["samples"] > config.warmup_samples + most * config.train.global_batch
        sign = collapse_sign(row, pairs=pairs, scale_init=logit_scale_init(config.model), chance=health.learned or late)
        health.collapsed_in_a_row = health.collapsed_in_a_row + 1 if sign else 0
        if health.collapsed_in_a_row >= most:
            step, first = row["step"], health.collapsed_in_a_row == most
            what = f"step {step}: collapsed: {sign}, for {counted(health.collapsed_in_a_row, 'step')}"
            fix = f"{_FIX}, or train.grad_clip_norm"
            self._diverged(step, f"{what} (train.collapse_steps)", fix, first=first, kind="collapse")

    def _diverged(self, step: int, what: str, fix: str, *, first: bool, kind: str = "divergence") -> None:
        """Args:
        first: it was not told yet.
        """
        if self._config.train.on_divergence != "skip":
            raise Diverged(step, kind, what, fix)
        if first:
            report_fault(kind, what, action=f"going on (train.on_divergence=skip); {fix}", step=step)
