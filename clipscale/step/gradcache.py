"""The step under gradient caching (Gao et al., arXiv 2101.06983): memory for a chunk, not for the batch.

    plan = StepPlan(image=TowerPlan(chunk=256), text=TowerPlan(chunk=1024))
    result = gradcache_step(towers, batch.images, batch.tokens, batch.valid, plan=plan, ...)
    sum_gradients(towers.encoder_parameters(), world)      # parallel.py: once a step, then the optimizer

Three movements: embed every chunk without grad; take the loss and its gradients on all embeddings of all ranks at once
(loss/); embed every chunk again with grad and push its embeddings' gradients through. The chain rule makes the
parameters' gradients those of the whole batch, whatever the chunks. As many chunks as the plan has memory for are
embedded with grad at once, and their graphs kept: these need no second time.

Dropout must draw the same in both passes. Randomness is keyed, not kept: the draws of a tower that makes them chunk by
chunk are a function of (seed, step, rank, tower, chunk), so replaying needs no stored state and a resumed run draws the
same. Patch dropout and drop path draw by position (towers/draws.py), whatever the chunks.

Shapes: N slots of this rank, of which V valid; M of a chunk; D width; L tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from clipscale.counter import fold
from clipscale.data.load.replay import Inputs, handed_over
from clipscale.loss import ContrastiveGrads
from clipscale.step.places import Places, compact_
from clipscale.step.plan import StepPlan, TowerPlan
from clipscale.step.trace import Trace
from clipscale.step.walks import Captions, Chunk, Pictures, Walk
from clipscale.telemetry.parts import UNTIMED, Parts
from clipscale.towers import Tower, Towers, learns

LossAndGrads = Callable[..., ContrastiveGrads]


class StepResult(NamedTuple):
    """The same on every rank, but for the last two."""

    loss: float  # mean over the valid pairs, in nats
    pairs: int  # valid pairs of all ranks; 0: nothing was learned, and no gradient was set
    image_accuracy: float
    text_accuracy: float
    logit_scale: float
    tokens_per_caption: float  # that the text tower ran in a pass
    kept_share: float  # of this rank's pictures and captions: those that went through their tower once


def gradcache_step(
    towers: Towers,
    images: Inputs,
    tokens: Tensor,
    valid: Tensor,
    *,
    plan: StepPlan,
    loss_and_grads: LossAndGrads,
    key: int,
    positions: Tensor | None = None,
    grad_scale: float = 1.0,
    parts: Parts = UNTIMED,
    trace: Trace | None = None,
) -> StepResult:
    """Add the gradient of the mean loss over all valid pairs of all ranks to every parameter's `.grad`.

    The towers' parameters get this rank's share: sum them over the ranks. `logit_scale.grad` is complete on every rank.

    Args:
        images: uint8 [N, 3, S, S], in chunks; walked first.
        tokens: integers [N, L] in host memory; may be filled in while the images are walked.
        valid: bool [N], like the tokens; the other slots run through the towers but have no part in the loss.
        plan: the chunks, and what is kept.
        loss_and_grads: (image [V, D], text [V, D], s, image_grad=, text_grad=) -> ContrastiveGrads over all ranks, for
            the global mean. The embeddings are its own, to overwrite. The side of a tower in which nothing learns is
            not wanted; that tower is not replayed.
        key: of this step and rank, for layers that draw by chunk.
        positions: int64 [N] in host memory, unique in the run: for layers that draw by position.
        grad_scale: factor on every gradient (loss scaling for fp16).
        parts: counts the time of each tower's passes and of the loss.
        trace: is told of each chunk of pass 2.

    Raises:
        Whatever `loss_and_grads` raises, on embeddings that are not finite for one (NotFiniteError). No gradient is set
            then.
    """
    image = TwoPasses(
        towers.image, Pictures(images, plan.image), key, positions, by_chunk=plan.image.by_chunk, trace=trace
    )
    with parts.part("image forward"):
        image_ND = image.embed()
    with parts.part("text forward"):
        captions = captions_of(towers.text, tokens, plan.text)
        text = TwoPasses(towers.text, captions, key, positions, by_chunk=plan.text.by_chunk, trace=trace)
        text_ND = text.embed()
    logit_scale = towers.logit_scale()
    with parts.part("loss"):
        sides_VD = compact_(image_ND, valid), compact_(text_ND, valid)
        grads = loss_and_grads(*sides_VD, logit_scale, image_grad=image.learns, text_grad=text.learns)
    del image_ND, text_ND, sides_VD
    if grads.pairs > 0:
        places = Places(valid)
        for tower, d_VD in ((image, grads.d_image_ND), (text, grads.d_text_ND)):
            if d_VD is not None:
                with parts.part(f"{tower.tower.name} backward"):
                    tower.replay(d_VD, places, grad_scale)
        _add_logit_scale_grad(towers, grads.d_logit_scale * (logit_scale * grad_scale))
    return StepResult(
        grads.loss.item(),
        grads.pairs,
        grads.image_accuracy,
        grads.text_accuracy,
        logit_scale,
        tokens_per_caption=text.walk.tokens / max(len(text.walk), 1),
        kept_share=(image.walk.kept + text.walk.kept) / max(len(image.walk) + len(text.walk), 1),
    )


def captions_of(tower: Tower, tokens_NL: Tensor, plan: TowerPlan) -> Captions:
    """By length, where the tower can be cut and does not draw by chunk."""
    return Captions(tokens_NL, plan, tower.cut.lengths(tokens_NL) if tower.cut and not plan.by_chunk else None)


class Encoder(Protocol):
    """What two passes ask of a tower."""

    name: str
    encoder: nn.Module

    @property
    def device(self) -> torch.device: ...

    def shared_casts(self) -> AbstractContextManager: ...

    def __call__(self, inputs, positions: Tensor | None = None) -> Tensor:
        """A chunk's inputs, as its walk has them -> embeddings [M, D]."""


class TwoPasses:
    """One tower in one step: its embeddings, and then its gradients."""

    def __init__(
        self,
        tower: Encoder,
        walk: Walk,
        key: int,
        positions: Tensor | None = None,
        *,
        by_chunk: bool = False,
        trace: Trace | None = None,
    ) -> None:
        self.tower, self.walk, self._key, self._positions, self._by_chunk = tower, walk, key, positions, by_chunk
        self._trace = trace
        self.learns = learns(tower.encoder)
        self._kept: list[tuple[slice | Tensor, Tensor]] = []  # slots, embeddings

    def embed(self) -> Tensor:
        """Pass 1: embeddings [N, D] by slot, chunk by chunk; activations of kept chunks alone outlive it."""
        out_ND = None
        with self.tower.shared_casts():
            for chunk in self.walk.first(self.tower.device):
                with torch.set_grad_enabled(chunk.kept and self.learns):
                    embeddings = self._run(chunk)
                if embeddings.requires_grad:
                    self._kept.append((chunk.slots, embeddings))
                if out_ND is None:
                    out_ND = embeddings.new_empty(len(self.walk), embeddings.shape[1], requires_grad=False)
                slots = chunk.slots
                if isinstance(slots, Tensor):
                    slots = handed_over(slots, out_ND.device)
                out_ND[slots] = embeddings.detach()[: chunk.size]
        return out_ND

    def replay(self, d_VD: Tensor, places: Places, grad_scale: float) -> None:
        """Pass 2: kept graphs, and the other chunks again with grad and the same randomness; `.grad` gathers."""
        self._kept.reverse()
        while self._kept:
            slots, embeddings = self._kept.pop()
            self._backward(embeddings, slots, d_VD, places, grad_scale)
            del embeddings  # and with it the graph, before the next
        with self.tower.shared_casts():
            for chunk in self.walk.again(self.tower.device):
                self._backward(self._run(chunk), chunk.slots, d_VD, places, grad_scale)

    def _run(self, chunk: Chunk) -> Tensor:
        positions_M = None
        if self._positions is not None:
            positions_M = self._positions[chunk.slots]
            filled = positions_M[-1:].expand(len(chunk.inputs) - chunk.size)
            positions_M = handed_over(torch.cat([positions_M, filled]), self.tower.device)
        with chunk_randomness(self._key, self.tower, chunk.first) if self._by_chunk else nullcontext():
            return self.tower(chunk.inputs, positions_M)

    def _backward(
        self, embeddings: Tensor, slots: slice | Tensor, d_VD: Tensor, places: Places, grad_scale: float
    ) -> None:
        if not embeddings.requires_grad:  # what learns in the encoder has no part in them
            return
        d_MD = places.rows_of(d_VD, slots, len(embeddings)) * grad_scale
        embeddings.backward(d_MD.to(embeddings.dtype))
        if self._trace is not None:
            self._trace.note(self.tower.name, self.tower.encoder, slots, d_MD)


@contextmanager
def chunk_randomness(key: int, tower: Encoder, start: int) -> Iterator[None]:
    """torch's generators, seeded for the chunk that begins at slot `start`; the outer state comes back afterwards."""
    on_gpu = tower.device.type == "cuda"
    seed = torch.manual_seed if on_gpu else torch.default_generator.manual_seed  # the first prepares absent GPUs too
    with torch.random.fork_rng(devices=[tower.device] if on_gpu else []):
        seed(fold(key, tower.name, start) >> 1)
        yield


def _add_logit_scale_grad(towers: Towers, d_log_scale: Tensor) -> None:
    """The parameter is log s, hence the factor s = d s / d log s in the caller."""
    parameter = towers.model.logit_scale
    if not parameter.requires_grad:
        return
    grad = d_log_scale.to(parameter).reshape(parameter.shape)
    parameter.grad = grad if parameter.grad is None else parameter.grad + grad
