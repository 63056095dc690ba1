"""The classifier of a zero-shot evaluation: class names x templates -> an embedding for each class, shared and kept.

    classifiers = Classifiers(towers, tokenize, chunk, world)
    classifier_CD = classifiers.of(names, templates)        # collective
    classifiers.of(names, templates)                        # at once, until the text tower's weights are others

Prompts go through the text tower by length, in chunks cut at their longest (towers/rows.py), a chunk for each rank in
turn. Any number of ranks gives the same bits, and what is kept is what would be made again.

Kept in memory alone: a file would have to answer for the weights, the chunk, the types and the libraries that it came
from.

Shapes: C classes, K templates, P = C x K prompts, M of a chunk, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from clipscale.bits import hash_bits
from clipscale.data.tokenize import Tokenize
from clipscale.dist import World
from clipscale.eval.mode import evaluating
from clipscale.towers import Towers
from clipscale.towers.rows import arranged

_UNIT = 2.0**40
"""Embeddings are summed in whole multiples of 1/_UNIT, which float64 adds without rounding (up to 8,192 templates): the
order, and with it the number of ranks, changes no bit."""


class Classifiers:
    """Those of the towers' present weights.

    Args:
        chunk: captions of full length that go through the text tower at once.
        walk: passes each chunk on.
    """

    def __init__(
        self,
        towers: Towers,
        tokenize: Tokenize,
        chunk: int,
        world: World,
        walk: Callable[[Iterable], Iterator] = iter,
    ) -> None:
        self._towers, self._tokenize, self._chunk, self._world, self._walk = towers, tokenize, chunk, world, walk
        self._weights: list[int] = []
        self._kept: dict[tuple, Tensor] = {}  # on the CPU: a GPU's memory is shared out before training

    @torch.no_grad()
    def of(self, names: Sequence[str], templates: Sequence[str]) -> Tensor:
        """Each class's mean text embedding over the templates, normalised again: [C, D] on the tower's device.

        Collective; the same on every rank.

        Raises:
            SharedError: what went wrong on any rank.
        """
        device = self._towers.text.device
        weights = torch.stack([hash_bits(each) for each in self._towers.text.encoder.state_dict().values()]).tolist()
        if weights != self._weights:
            self._weights, self._kept = weights, {}
        key = self._tokenize.name, tuple(names), tuple(templates)
        if not all(self._world.gather(key in self._kept)):
            self._kept[key] = self._made(names, templates).cpu()
        return self._kept[key].to(device)

    def _made(self, names: Sequence[str], templates: Sequence[str]) -> Tensor:
        tower, world = self._towers.text, self._world

        def share() -> Tensor:
            """Of this rank's chunks: the embeddings summed over each class's templates, [C, D] float64."""
            tokens_PL = self._tokenize([template.replace("{}", name) for name in names for template in templates])
            lengths_P = tower.cut.lengths(tokens_PL) if tower.cut else None
            prompts_P = torch.arange(len(tokens_PL))
            chunks = arranged(prompts_P, tokens_PL, lengths_P, self._chunk)
            sums_CD = torch.zeros(len(names), self._towers.embed_dim, dtype=torch.float64, device=tower.device)
            for rows in self._walk(chunks[world.rank :: world.size]):
                embeddings_MD = tower(rows.inputs(tokens_PL).to(tower.device))[: rows.size]
                classes_M = (prompts_P[rows.slots] // len(templates)).to(tower.device)
                sums_CD.index_add_(0, classes_M, (embeddings_MD.double() * _UNIT).round())
            return sums_CD

        with evaluating(self._towers), tower.shared_casts():
            sums_CD = world.total(world.each(share))
        kind = torch.promote_types(next(tower.encoder.parameters()).dtype, torch.float32)  # as that of embeddings
        return F.normalize(sums_CD / (_UNIT * len(templates)), dim=-1).to(kind)
