"""The step under gradient caching (Gao et al., arXiv 2101.06983): memory for a chunk, not for the batch.

    result = gradcache_step(towers, batch.images, Held(batch.tokens, chunk=1024), batch.valid, ...)
    sum_gradients(towers.encoder_parameters(), world)      # parallel.py: once a step, then the optimizer

Three movements: embed every chunk without grad; take the loss and its gradients on all embeddings of all ranks at once
(loss/); embed every chunk again with grad and push its embeddings' gradients through. The chain rule makes the
parameters' gradients those of the whole batch, whatever the chunks.

Dropout, drop-path and patch dropout must draw the same in both passes. Randomness is keyed, not kept: a chunk's draws
are a function of (seed, step, rank, tower, chunk), so replaying needs no stored state and a resumed run draws the same.

Shapes: N slots of this rank, of which V valid; M chunk; D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from clipscale.counter import fold
from clipscale.data.load.replay import Inputs
from clipscale.loss import ContrastiveGrads
from clipscale.parts import UNTIMED, Parts
from clipscale.towers import Tower, Towers

LossAndGrads = Callable[..., ContrastiveGrads]


class StepResult(NamedTuple):
    """The same on every rank, the last two apart, which are of this rank."""

    loss: float  # mean over the valid pairs, in nats
    pairs: int  # valid pairs of all ranks; 0: nothing was learned, and no gradient was set
    image_accuracy: float
    text_accuracy: float
    logit_scale: float
    tokens_per_caption: float = 0.0  # mean number of tokens that the text tower ran for a caption
    kept_share: float = 0.0  # of the chunks of both towers: those whose graph was kept, which ran forward once


def gradcache_step(
    towers: Towers,
    images: Inputs,
    tokens: Inputs,
    valid: Tensor,
    *,
    loss_and_grads: LossAndGrads,
    key: int,
    grad_scale: float = 1.0,
    parts: Parts = UNTIMED,
) -> StepResult:
    """Add the gradient of the mean loss over all valid pairs of all ranks to every parameter's `.grad`.

    The towers' parameters get this rank's share: sum them over the ranks. `logit_scale.grad` is complete on every rank.

    Args:
        images: uint8 [N, 3, S, S], in chunks; walked first.
        tokens: int64 [N, L], in chunks; may be filled in while the images are walked.
        valid: bool [N], like the tokens; the other slots run through the towers but have no part in the loss.
        loss_and_grads: (image [V, D], text [V, D], s, image_grad=, text_grad=) -> ContrastiveGrads over all ranks, for
            the global mean. The side of a tower in which nothing learns is not wanted; that tower is not replayed.
        key: of this step and rank, for the towers' randomness.
        grad_scale: factor on every gradient (loss scaling for fp16).
        parts: counts the time of each tower's passes and of the loss.

    Raises:
        Whatever `loss_and_grads` raises, on embeddings that are not finite for one.
    """
    inputs = ((towers.image, images), (towers.text, tokens))
    with parts.part("image forward"):
        image_ND = embed(towers.image, images, key)
    with parts.part("text forward"):
        text_ND = embed(towers.text, tokens, key)
    logit_scale = towers.logit_scale()
    with parts.part("loss"):
        slots = valid.nonzero().squeeze(1).to(towers.image.device)
        image_VD, text_VD = image_ND[slots], text_ND[slots]
        grads = loss_and_grads(
            image_VD, text_VD, logit_scale, image_grad=_learns(towers.image), text_grad=_learns(towers.text)
        )
    if grads.pairs > 0:
        for (tower, batch), d_VD in zip(inputs, (grads.d_image_ND, grads.d_text_ND), strict=True):
            if d_VD is not None:
                with parts.part(f"{tower.name} backward"):
                    d_ND = d_VD.new_zeros(len(batch), d_VD.shape[1]).index_copy_(0, slots, d_VD * grad_scale)
                    replay_backward(tower, batch, d_ND, key)
        _add_logit_scale_grad(towers, grads.d_logit_scale * (logit_scale * grad_scale))
    return StepResult(
        grads.loss.item(),
        grads.pairs,
        grads.image_accuracy,
        grads.text_accuracy,
        logit_scale,
        tokens_per_caption=float(towers.context_length),
    )


def _learns(tower: Tower) -> bool:
    return any(parameter.requires_grad for parameter in tower.encoder.parameters())


def embed(tower: Tower, inputs: Inputs, key: int) -> Tensor:
    """Pass 1: [N, ...] -> embeddings [N, D], chunk by chunk, no activation kept."""
    out = []
    with torch.no_grad():
        for start, chunk in inputs.first(tower.device):
            with chunk_randomness(key, tower, start):
                out.append(tower(chunk))
    return torch.cat(out)


def replay_backward(tower: Tower, inputs: Inputs, d_embeddings_ND: Tensor, key: int) -> None:
    """Pass 2: the same chunks with grad and the same randomness; parameters' `.grad` gather."""
    for start, chunk in inputs.again(tower.device):
        with chunk_randomness(key, tower, start):
            embeddings = tower(chunk)
        embeddings.backward(d_embeddings_ND[start : start + len(chunk)].to(embeddings.dtype))


@contextmanager
def chunk_randomness(key: int, tower: Tower, start: int) -> Iterator[None]:
    """torch's generators, seeded for the chunk that begins at slot `start`; the outer state comes back afterwards."""
    on_gpu = tower.device.type == "cuda"
    seed = torch.manual_seed if on_gpu else torch.default_generator.manual_seed  # the first prepares absent GPUs too
    with torch.random.fork_rng(devices=[tower.device] if on_gpu else []):
        seed(fold(key, tower.name, start) >> 1)
        yield


def _add_logit_scale_grad(towers: Towers, d_log_scale: Tensor) -> None:
    """The parameter is log s, hence the factor s = d s / d log s in the caller."""
    parameter = towers.model.logit_scale
    grad = d_log_scale.to(parameter).reshape(parameter.shape)
    parameter.grad = grad if parameter.grad is None else parameter.grad + grad
