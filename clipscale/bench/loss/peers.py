"""The same loss by other packages, each by its public function, on the same tensors.

None is needed: what is not installed, or does not import here, becomes a contestant with a `problem`.

- inf-cl (Inf-CL, arXiv 2410.17243) computes one direction a call and wants the width in heads of at most 256. In a
  process without a group its Triton kernels are called directly, which saves the peer its exchange with itself; then
  the scale must be multiplied in before, since its own argument's gradient is summed over the ranks of a group.
- memeff takes the temperature as a number, so there is no gradient for it, and by default ("stable") returns gradients
  times sqrt(B temperature), which is undone in the error.
- siglip-kernel computes the sigmoid loss, which needs one logit matrix product less: 6 B^2 D.
- open_clip's ClipLoss holds the logits of both directions.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor

from clipscale.bench.common.failures import first_line
from clipscale.bench.loss.contestants import Contestant, Evaluation, as_leaves, differentiate, in_two_passes
from clipscale.bench.loss.inputs import Inputs
from clipscale.bench.loss.team import Outcome, Team
from clipscale.loss.precision import exact_products

SIGMOID_BIAS = -10.0  # SigLIP's initial value

Loss = Callable[[Inputs, Tensor, Tensor, Tensor], Tensor]


def peer_contestants(team: Team) -> list[Contestant]:
    """Every peer, those that cannot be measured here included."""
    contestants = [
        _peer(team, "inf-cl", "inf_cl", _inf_cl, "inf-cl", "cal_inf_loss, both directions"),
        _peer(
            team,
            "memeff",
            "memeff",
            _memeff,
            "memeff",
            "MemoryEfficientCLIPLoss(normalized_inputs=True); no gradient for the scale",
            factor=lambda inputs: math.sqrt(inputs.batch / inputs.scale),
        ),
        _peer(
            team,
            "siglip-kernel",
            "siglip_kernel",
            _siglip,
            "siglip-kernel",
            f"fused_siglip_loss, the sigmoid loss with bias {SIGMOID_BIAS:g}: rates on 6 B^2 D, errors on its own loss",
            kind="sigmoid",
            operations=6,
        ),
    ]
    open_clip = partial(_peer, team, module="open_clip", package="open_clip_torch")
    if team.device.type == "cuda":
        contestants.append(open_clip("open_clip, autocast", load=_open_clip_autocast, how="ClipLoss in bf16 autocast"))
    return [*contestants, open_clip("open_clip", load=_open_clip, how="ClipLoss, in the inputs' type")]


def _peer(
    team: Team,
    name: str,
    module: str,
    load: Callable[[], Loss],
    package: str,
    how: str,
    *,
    factor: Callable[[Inputs], float] = lambda inputs: 1.0,
    **fields,
) -> Contestant:
    problem, loss_fn = "", None
    if team.world.size > 1:
        problem = "one rank only"
    else:
        try:
            loss_fn = load()
        except ModuleNotFoundError as error:
            missing = (error.name or "").split(".")[0]
            problem = "not installed" if missing == module else f"failed: {first_line(error)}"
        except Exception as error:  # a stranger's import may raise anything: told, and the bench goes on
            problem = f"failed: {first_line(error)}"

    def products(precision: str) -> AbstractContextManager:
        """float32 products as the row says; in half precision everything as torch has it by default."""
        return exact_products(precision, team.device) if precision in ("tf32", "fp32") else nullcontext()

    def forward(inputs: Inputs) -> Evaluation:
        leaves = as_leaves(inputs, inputs.image_ND, inputs.text_ND)
        with products(inputs.precision):
            return Evaluation(loss_fn(inputs, *leaves), leaves, inputs.first)

    def backward(inputs: Inputs, evaluation: Evaluation) -> list[Outcome]:
        with products(inputs.precision):
            return [differentiate(inputs, evaluation, factor=factor(inputs))]

    if team.simulated > 1:
        how += "; on one rank"
    return in_two_passes(name, forward, backward, f"{how}; autograd", package, problem=problem, **fields)


def _inf_cl() -> Loss:
    cal_inf_loss = importlib.import_module("inf_cl").cal_inf_loss

    def loss(inputs: Inputs, image_ND: Tensor, text_ND: Tensor, scale: Tensor) -> Tensor:
        width = image_ND.shape[1]
        head = math.gcd(width, 256)
        if head < 16:
            raise ValueError(f"width {width}: inf-cl needs a multiple of 16")
        by_image = cal_inf_loss(scale * image_ND, text_ND, head_dim=head)
        return (by_image + cal_inf_loss(scale * text_ND, image_ND, head_dim=head)) / 2

    return loss


def _memeff() -> Loss:
    loss_class = importlib.import_module("memeff").MemoryEfficientCLIPLoss

    def loss(inputs: Inputs, image_ND: Tensor, text_ND: Tensor, scale: Tensor) -> Tensor:
        return loss_class(temperature=1 / inputs.scale, normalized_inputs=True)(image_ND, text_ND)

    return loss


def _siglip() -> Loss:
    fused_siglip_loss = importlib.import_module("siglip_kernel").fused_siglip_loss

    def loss(inputs: Inputs, image_ND: Tensor, text_ND: Tensor, scale: Tensor) -> Tensor:
        return fused_siglip_loss(image_ND, text_ND, scale.log(), scale.new_full((), SIGMOID_BIAS))

    return loss


def _open_clip(context: Callable = nullcontext) -> Loss:
    loss_fn = importlib.import_module("open_clip.loss").ClipLoss()

    def loss(inputs: Inputs, image_ND: Tensor, text_ND: Tensor, scale: Tensor) -> Tensor:
        with context():
            return loss_fn(image_ND, text_ND, scale)

    return loss


def _open_clip_autocast() -> Loss:
    return _open_clip(lambda: torch.autocast("cuda", dtype=torch.bfloat16))
