"""The loss's doors: `contrastive_grads`, `contrastive_grads_in_place` for clipscale's own step, and `contrastive_loss`
for any trainer.

All evaluate the loss of the whole batch of a process group, without autograd and without its B x B logits
(`ring.py`, `tiles.py`), and give the same numbers; they differ in the convention for what is returned. That loss and
embedding gradients come first and the towers' backward pass later is gradient caching (arXiv 2101.06983).

Shapes: N pairs on this rank, B pairs of all ranks, D width.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from clipscale.loss.checks import (
    check_arguments,
    check_consumable,
    checked_scale,
    count_out_of_range,
    not_finite_error,
    out_of_range_error,
    refuse_transforms,
)
from clipscale.loss.engines import resolve_engine
from clipscale.loss.link import Group, open_link
from clipscale.loss.precision import accumulator_dtype, gradient_lift, resolve_precision, to_operand
from clipscale.loss.ring import Ring, Wanted, Work, ring_gradients, ring_statistics


class ContrastiveGrads(NamedTuple):
    """One evaluation of the loss. Tensors are float32, or float64 under precision fp64."""

    loss: Tensor
    """Mean over the B pairs of all ranks, in nats; 0 without a pair. [], the same on every rank."""
    d_image_ND: Tensor | None
    """Derivative of that mean in this rank's image embeddings; None where it was not wanted."""
    d_text_ND: Tensor | None
    d_logit_scale: Tensor | None
    """Its derivative in the factor `logit_scale`. [], the same on every rank."""
    pairs: int
    """B."""
    image_accuracy: float
    """Share of the B images whose own text has the largest logit of all texts (a tie is a miss)."""
    text_accuracy: float


@torch.no_grad()
def contrastive_grads(
    image_ND: Tensor,
    text_ND: Tensor,
    logit_scale: Tensor | float,
    *,
    group: Group = None,
    precision: str = "auto",
    engine: str = "auto",
    tile: int | None = None,
    image_grad: bool = True,
    text_grad: bool = True,
    scale_grad: bool = True,
) -> ContrastiveGrads:
    """Loss, its true derivatives and the in-batch accuracies, over the pairs of all ranks of `group`. Collective.

    Row i of `image_ND` pairs with row i of `text_ND`; ranks may hold different numbers of pairs, none included. A
    trainer that *sums* parameter gradients over the ranks gets the gradient of the mean over all pairs. `logit_scale`
    is the factor itself (CLIP's `logit_scale.exp()`), the same on every rank.

    Args:
        group: None is the default process group, or this process alone where there is none; "self" is this process's
            pairs only; or a process group, or a `link.Link`.
        precision: auto, fp16, bf16, tf32, fp32 or fp64 (see `precision.py`).
        engine: auto, triton or torch (see `engines.py`).
        tile: rows and columns of the logits that exist at a time; None is the engine's own choice.
        image_grad, text_grad: False for a side whose tower is locked: its gradient costs nothing then. The same on
            every rank.
        scale_grad: False where the scale is not learned; with no gradient wanted at all, pass 2 does not run.

    Raises:
        ValueError: for arguments that do not fit; and on every rank if the ranks do not agree, or any rank's
            embeddings are not finite (NotFiniteError), or, in precision fp16, far from normalised (norm below 1/2 or
            above 2).
        RuntimeError: inside torch.func transforms, and for forward-mode derivatives.
    """
    wanted = Wanted(image_grad, text_grad, scale_grad)
    return _evaluate(image_ND, text_ND, logit_scale, group, precision, engine, tile, wanted, in_place=False)


@torch.no_grad()
def contrastive_grads_in_place(
    image_ND: Tensor,
    text_ND: Tensor,
    logit_scale: Tensor | float,
    *,
    group: Group = None,
    precision: str = "auto",
    engine: str = "auto",
    tile: int | None = None,
    image_grad: bool = True,
    text_grad: bool = True,
    scale_grad: bool = True,
) -> ContrastiveGrads:
    """`contrastive_grads`, to the bit, which consumes its inputs: `d_image_ND` comes in the memory of `text_ND`, and
    `d_text_ND` in that of `image_ND`. The other side of one that is not wanted keeps its values. Collective.

    So one rank's peak, inputs included and beside statistics and workspace, is 12 N D bytes in fp16 and bf16, 16 in
    tf32 and fp32, whose operands are copies here; with more ranks see `ring.py`.

    Raises:
        ValueError: too, for inputs that are not contiguous, that share memory, or whose type is not the gradients'
            (float32; float64 under precision fp64). The inputs of any error are as they were.
    """
    wanted = Wanted(image_grad, text_grad, scale_grad)
    return _evaluate(image_ND, text_ND, logit_scale, group, precision, engine, tile, wanted, in_place=True)


def _evaluate(
    image_ND: Tensor,
    text_ND: Tensor,
    logit_scale: Tensor | float,
    group: Group,
    precision: str,
    engine: str,
    tile: int | None,
    wanted: Wanted,
    *,
    in_place: bool,
) -> ContrastiveGrads:
    refuse_transforms(image_ND, text_ND, logit_scale)
    check_arguments(image_ND, text_ND, tile)
    scale = checked_scale(logit_scale)
    precision = resolve_precision(precision, image_ND.device, torch.promote_types(image_ND.dtype, text_ND.dtype))
    code = resolve_engine(engine, image_ND.device, precision)
    if in_place:
        check_consumable(image_ND, text_ND, accumulator_dtype(precision))
    ring = Ring.join(open_link(group), image_ND, precision, wanted)
    strays = count_out_of_range(image_ND, text_ND, precision)
    work = Work(
        ring,
        image_ND=to_operand(image_ND, precision, contiguous=False, copy=in_place),
        scale=scale,
        engine=code,
        precision=precision,
        tile=tile,
        owner=ring.position,
        text_MD=to_operand(text_ND, precision, contiguous=ring.size > 1, copy=in_place),
    )
    statistics = ring_statistics(work)
    own = torch.cat([statistics.sums, strays, statistics.missing])
    everyone = ring.link.gather(own.view(torch.int64)).view(torch.float64)
    sums, largest_missing = everyone[:, :-1].sum(0), everyone[:, -1].max()
    total, missing, missing_diag, diag, images_right, texts_right, strays = sums.tolist()
    # X_ii is finite only where both embeddings of the pair are, so the sum of the diagonal speaks for all of them.
    if not math.isfinite(total + diag):
        raise not_finite_error(image_ND, text_ND, ring.link.rank, precision)
    if strays:
        raise out_of_range_error(image_ND, text_ND, ring.link)
    pairs, dtype = max(ring.total_pairs, 1), accumulator_dtype(precision)
    d_image_ND = d_text_ND = d_scale = None
    if any(wanted):
        origin = torch.tensor(diag / pairs, dtype=dtype).item()  # as the tiles will have it
        lift = gradient_lift(precision, largest_missing.item())
        d_image_ND, d_text_ND, wrong = ring_gradients(
            work, statistics, image_ND, text_ND, wanted, origin=origin, lift=lift, in_place=in_place
        )
        if wanted.logit_scale:
            right = origin * missing - missing_diag  # sum of -((1 - p_ii) + (1 - q_ii)) (X_ii - origin)
            d_scale = ((ring.link.sum(wrong) + right) / (2 * pairs)).to(dtype)
    return ContrastiveGrads(
        loss=(sums[0] / (2 * pairs)).to(dtype),
        d_image_ND=d_image_ND,
        d_text_ND=d_text_ND,
        d_logit_scale=d_scale,
        pairs=ring.total_pairs,
        image_accuracy=images_right / pairs,
        text_accuracy=texts_right / pairs,
    )


def contrastive_loss(
    image_ND: Tensor,
    text_ND: Tensor,
    logit_scale: Tensor | float,
    group: Group = None,
    *,
    precision: str = "auto",
    engine: str = "auto",
    tile: int | None = None,
) -> Tensor:
    """The symmetric contrastive loss over the pairs of all ranks of `group`, [] and differentiable once. Collective.

    Gradients follow open_clip's convention (`local_loss=False, gather_with_grad=True`), so that a tower wrapped in DDP,
    which averages over the ranks, ends with the gradient of the mean over all pairs: the embeddings' gradients are
    that mean's times the number of ranks, and `logit_scale`'s is complete on every rank. They come in the inputs'
    types: half-precision embeddings round them to that type, and in fp16 they vanish where a large batch or a loss near
    0 makes them small. A GradScaler helps; float32 embeddings under precision='fp16' keep every digit.

    Call it outside of code that torch.compile compiles.

    Both passes run in the forward, so the backward does not communicate. An input that requires no gradient (on all
    ranks alike) costs none: with one locked tower pass 2 is two thirds, without any gradient only pass 1 runs.

    Arguments and errors are those of `contrastive_grads`; and RuntimeError for a backward pass under create_graph=True.
    """
    refuse_transforms(image_ND, text_ND, logit_scale)
    factor = logit_scale if isinstance(logit_scale, Tensor) else torch.tensor(logit_scale, dtype=torch.float64)
    options = {"group": open_link(group), "precision": precision, "engine": engine, "tile": tile}
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (image_ND, text_ND, factor)):
        return _ContrastiveLoss.apply(image_ND, text_ND, factor, options)
    return contrastive_grads(
        image_ND, text_ND, factor, **options, image_grad=False, text_grad=False, scale_grad=False
    ).loss


class _ContrastiveLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, image_ND, text_ND, logit_scale, options):
        image_grad, text_grad, scale_grad, _ = ctx.needs_input_grad
        wanted = {"image_grad": image_grad, "text_grad": text_grad, "scale_grad": scale_grad}
        grads = contrastive_grads(image_ND, text_ND, logit_scale, **options, **wanted)
        d_scale = grads.d_logit_scale.to(logit_scale).expand_as(logit_scale) if scale_grad else None
        ctx.save_for_backward(grads.d_image_ND, grads.d_text_ND, d_scale)
        ctx.dtypes = image_ND.dtype, text_ND.dtype
        ctx.size = options["group"].size
        return grads.loss

    @staticmethod
    def backward(ctx, d_loss):
        # Autograd is on here for create_graph only. `once_differentiable` would make a gradient penalty a constant.
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph=True asks contrastive_loss for a second derivative, and it has a first one only: "
                "use dense_contrastive_loss where you need more"
            )
        *embeddings_grads, d_scale = ctx.saved_tensors
        factor = d_loss * ctx.size
        d_image_ND, d_text_ND = (
            None if d_ND is None else torch.mul(d_ND, factor, out=torch.empty_like(d_ND, dtype=dtype))
            for d_ND, dtype in zip(embeddings_grads, ctx.dtypes, strict=True)
        )
        return d_image_ND, d_text_ND, None if d_scale is None else (d_loss * d_scale).to(d_scale), None
