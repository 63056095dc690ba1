"""One case: a model and a batch. Every contestant from the same weights, then all in turn.

First each takes two untimed steps: in one its towers' operations are counted (and whatever compiles or tunes, does), in
the other its memory. Then they take turns (bench/common/turns.py), with a plain matrix product between the rounds.
"""

from __future__ import annotations

import gc
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from clipscale.bench.common.budget import refusal, repeats
from clipscale.bench.common.clock import seconds_of
from clipscale.bench.common.failures import first_line
from clipscale.bench.common.matmul import Matmul
from clipscale.bench.common.memory import watched_parts
from clipscale.bench.common.spread import Spread
from clipscale.bench.common.turns import Supplier, Turn, take_turns
from clipscale.bench.common.words import size_name
from clipscale.bench.step.captions import Lengths, tokens_of
from clipscale.bench.step.contestants import DENSE, OPEN_CLIP, Contestant, Shape, contestants
from clipscale.bench.step.flops import tower_flops
from clipscale.bench.step.ours import own_text
from clipscale.bench.step.peers import dense_step, full_length_text
from clipscale.bench.step.trainee import Trainee, batch_bytes, draw_batch
from clipscale.data.load.replay_plan import host_memory
from clipscale.device import is_out_of_memory
from clipscale.errors import require
from clipscale.loss.precision import OPERAND_DTYPE, exact_products

_LEAST_ROUNDS, _MOST_ROUNDS = 3, 9
_DISTINCT = 2048  # pictures of a batch, about
_FREE_SHARE = 0.7  # of the memory that is left, to be asked for


class Case(NamedTuple):
    model: str
    pairs: int
    shape: Shape

    def __str__(self) -> str:
        return f"{self.model}, batch {size_name(self.pairs)}"


@dataclass
class Budget:
    """Who may run, from how long a step took at the batch before: time grows with the batch."""

    seconds: float
    limit_seconds: float
    _pair_seconds: dict[tuple[str, str], float] = field(default_factory=dict)

    def record(self, case: Case, name: str, step_seconds: float) -> None:
        self._pair_seconds[case.model, name] = step_seconds / case.pairs

    def refusal(self, case: Case, name: str) -> str:
        """Why a contestant does not run; empty if it does."""
        return refusal(self._pair_seconds.get((case.model, name), 0.0) * case.pairs, self.limit_seconds)

    def rounds(self, step_seconds: float) -> int:
        """How many, where the slowest step takes so long."""
        return repeats(step_seconds, seconds=self.seconds, least=_LEAST_ROUNDS, most=_MOST_ROUNDS)


@dataclass
class Entry:
    """A contestant in this case, and what its untimed steps told."""

    contestant: Contestant
    status: str
    """Why there is no measurement; empty if there is one."""
    loss: float = 0.0
    flop: int = 0
    peaks: dict[str, int] = field(default_factory=dict)
    step_seconds: float = 0.0
    """Of a step that was watched: no faster than a plain one."""


class CaseRun:
    """Measures one case."""

    def __init__(self, trainee: Trainee, case: Case, lengths: Lengths, budget: Budget, *, peers: bool, seed: int):
        self.trainee, self.case, self.budget, self._peers = trainee, case, budget, peers
        self.device = trainee.device
        chunk = case.shape.image_chunk
        distinct = min(case.pairs, max(_DISTINCT // chunk, 1) * chunk)
        wanted = batch_bytes(trainee, case.pairs) + 5 * batch_bytes(trainee, distinct)
        require(
            wanted <= _FREE_SHARE * host_memory().left,
            f"--batches: {case} takes {wanted / 2**30:.1f} GiB of host memory for its pictures; leave it out",
        )
        self.batch = draw_batch(trainee, case.pairs, lengths, distinct=distinct, seed=seed)

    def run(self) -> dict[str, Any]:
        """The numbers of the case, ready for JSON."""
        pair_bytes, free_bytes = self._pair_bytes(), int(_FREE_SHARE * self._free_bytes())
        field = contestants(
            self.trainee,
            self.batch,
            self.case.shape,
            peers=self._peers,
            free_bytes=free_bytes,
            pair_bytes=pair_bytes,
        )
        entries = [Entry(one, one.problem or self.budget.refusal(self.case, one.name)) for one in field]
        matmul = self._matmul()
        matmul.sample(3)
        for entry in entries:
            if not entry.status:
                _say(f"{self.case}: {entry.contestant.name}")
                self._guarded(entry)
        turns = self._turns([entry for entry in entries if not entry.status], lambda: matmul.sample(1))
        text = self._text(lambda: matmul.sample(1))
        matmul.sample(3)
        rates = matmul.summary()
        tokens_N = tokens_of(self.batch.tokens)
        return {
            "model": self.case.model,
            "batch": self.case.pairs,
            "image_chunk": self.case.shape.image_chunk,
            "text_chunk": self.case.shape.text_chunk,
            "precision": self.trainee.precision,
            "mean_tokens": tokens_N.double().mean().item(),
            "matmul": rates,
            "rows": [self._row(entry, turns, rates["tflops"]) for entry in entries],
            "text": text,
        }

    def _matmul(self) -> Matmul:
        """In the type of the towers' products."""
        precision, device = self.trainee.precision, self.device
        return Matmul(
            OPERAND_DTYPE[precision],
            device,
            time=lambda call: seconds_of(call, device),
            within=lambda: exact_products(precision, device),
        )

    # --- the untimed steps --------------------------------------------------------------------------------------------

    def _pair_bytes(self) -> int:
        """What the graph of a pair takes, from a plain step on a few."""
        few = self.batch.first(min(self.case.pairs, self.case.shape.image_chunk))
        _, peaks = watched_parts(dense_step(self.trainee, few), self.device, known=self._known())
        return max(peaks.values()) // len(few)

    def _prepare(self, entry: Entry) -> None:
        one, losses = entry.contestant, []
        self.trainee.restore()
        entry.flop = tower_flops(lambda: losses.append(one.take()))
        entry.loss = losses[0]
        self.trainee.begin()

        def watch() -> None:
            _, entry.peaks = watched_parts(one.take, self.device, known=self._known())

        entry.step_seconds = seconds_of(watch, self.device)

    def _known(self) -> list[torch.Tensor]:
        return [*self.trainee.tensors(), self.batch.images, self.batch.tokens]

    def _guarded(self, entry: Entry) -> None:
        """What goes wrong is this entry's, and the others go on."""
        try:
            self._prepare(entry)
        except Exception as error:  # a stranger's loop may raise anything: told, and the bench goes on
            entry.status = "out of memory" if is_out_of_memory(error) else f"failed: {first_line(error)}"
        if entry.status:
            self.trainee.begin()
            gc.collect()  # outside the handler, whose traceback holds the tensors
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _free_bytes(self) -> int:
        if self.device.type != "cuda":
            return host_memory().left
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.device)[0]

    # --- the timed ones -----------------------------------------------------------------------------------------------

    def _turns(self, entries: list[Entry], between: Callable[[], None]) -> dict[str, list[Turn]]:
        """Every contestant's, one a round."""
        if not entries:
            return {}
        self.trainee.restore()
        takes = {entry.contestant.name: entry.contestant.take for entry in entries}
        for own in filter(None, (entry.contestant.own for entry in entries)):
            own.part_seconds()  # what was watched is not told
        try:
            turns = self._in_turn(takes, max(entry.step_seconds for entry in entries), between)
        except Exception as error:  # as in `_guarded`, though whose it was is not known
            for entry in entries:
                entry.status = f"failed: {first_line(error)}"
            return {}
        for name, done in turns.items():
            self.budget.record(
                self.case, name, statistics.median(_step_seconds(turn, self.case.pairs) for turn in done)
            )
        return turns

    def _in_turn(
        self, takes: dict[str, Callable[[], Any]], step_seconds: float, between: Callable[[], None]
    ) -> dict[str, list[Turn]]:
        def supplier(name: str, take: Callable[[], Any]) -> Supplier:
            def one() -> int:
                take()
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
                return self.case.pairs

            return Supplier(name, one, ahead=0, filling=1)

        def say(line: str) -> None:
            _say(f"  {line}")
            self.trainee.restore_weights()
            between()

        rounds = self.budget.rounds(step_seconds)
        field = [supplier(*item) for item in takes.items()]
        return take_turns(field, rounds=rounds, seconds=self.budget.seconds / rounds, say=say)[1]

    def _text(self, between: Callable[[], None]) -> dict[str, Any]:
        """Both passes of the text tower, for a caption: as clipscale walks them, and at the full length."""
        towers = self.trainee.towers
        d_text_ND = torch.randn(self.case.pairs, towers.embed_dim, generator=torch.Generator().manual_seed(0)).to(
            self.device
        )
        chunk = self.case.shape.text_chunk
        takes = {
            "own": own_text(self.trainee, self.batch, d_text_ND, chunk=chunk),
            "full": full_length_text(self.trainee, self.batch, d_text_ND, chunk=chunk),
        }
        _say(f"{self.case}: the text tower alone")
        turns = self._in_turn(takes, seconds_of(takes["full"], self.device), between)
        self.trainee.begin()
        own, full = ([1e6 * turn.wall_seconds / turn.items for turn in turns[name]] for name in takes)
        ratios = [slow / fast for fast, slow in zip(own, full, strict=True)]
        named = {"own_us": own, "full_us": full, "full_to_own": ratios}
        return {name: _spread(values) for name, values in named.items()} | {"length": towers.context_length}

    def _row(self, entry: Entry, turns: dict[str, list[Turn]], matmul_tflops: float) -> dict[str, Any]:
        one = entry.contestant
        row: dict[str, Any] = {"contestant": one.name, "status": entry.status or "measured"}
        row |= {"how": one.how, "package": one.package}
        if entry.status:
            return row
        own = turns[one.name]
        seconds = [_step_seconds(turn, self.case.pairs) for turn in own]
        row["step_seconds"] = _spread(seconds)
        row["samples_per_second"] = _spread([turn.items / turn.wall_seconds for turn in own])
        for key, other in (("to_open_clip", OPEN_CLIP), ("to_full_batch", DENSE)):
            pairs = zip(seconds, (_step_seconds(turn, self.case.pairs) for turn in turns.get(other, [])), strict=False)
            row[key] = statistics.median(theirs / ours for ours, theirs in pairs) if other in turns else None
        tflops = entry.flop / row["step_seconds"]["median"] / 1e12
        return row | {
            "loss": entry.loss,
            "seconds_by_part": one.own.part_seconds() if one.own else {},
            "kept_share": one.own.result.kept_share if one.own else 0.0,
            "tokens_per_caption": one.own.result.tokens_per_caption if one.own else float(self.batch.tokens.shape[1]),
            "tower_flop": entry.flop,
            "tflops": tflops,
            "ratio_to_matmul": tflops / matmul_tflops,
            "peak_bytes": max(entry.peaks.values()),
            "peak_bytes_by_part": {name: peak for name, peak in entry.peaks.items() if name},
        }


def _step_seconds(turn: Turn, pairs: int) -> float:
    return turn.wall_seconds * pairs / turn.items


def _spread(values: list[float]) -> dict[str, Any]:
    return {**Spread.of(values)._asdict(), "all": values}


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
