"""What learns from a batch: the towers under gradient caching, their loss, and the optimizer with its loss scale.

    learner = Learner(config, towers, world, parts)
    learner.begin(snapshot)                    # or None: a new run
    result = learner.gradients(batch, plan=plan, step=7)          # summed over the ranks
    grad_norm = learner.update(step=7)

Steps are numbered from 1. One whose loss or gradient is not finite is skipped, on every rank alike: weights and moments
stay, and `trouble` says what it was. (A loss scale of fp16 is lowered, by its own rule.)
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from clipscale.checkpoint import Snapshot
from clipscale.config import Config
from clipscale.counter import fold
from clipscale.data.load.loader import StepBatch
from clipscale.dist import World
from clipscale.errors import SharedError, UserError, require
from clipscale.guard.nonfinite import Trouble, bad_embeddings, bad_gradient
from clipscale.loss import (
    ContrastiveGrads,
    NotFiniteError,
    OutOfRangeError,
    contrastive_grads,
    contrastive_grads_in_place,
)
from clipscale.loss.link import Link
from clipscale.optim import build_optimizer, loss_scale, restore_optimizer
from clipscale.parallel import broadcast_parameters, sum_gradients
from clipscale.resilience.injection import injected
from clipscale.step import StepPlan, StepResult, Trace, gradcache_step
from clipscale.telemetry.parts import Parts
from clipscale.tell import tell
from clipscale.towers import Towers
from clipscale.weights.start import begin_from


class Learner:
    """One rank's. Every rank calls each of its methods alike.

    Args:
        link: of the loss to the other ranks; None: torch.distributed's.
    """

    def __init__(self, config: Config, towers: Towers, world: World, parts: Parts, link: Link | None = None) -> None:
        self.link = link
        self.config, self.towers, self.world, self.parts = config, towers, world, parts
        self.optimizer = build_optimizer(towers.model, config.optim, peak_lr=config.peak_lr)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=towers.image.autocast == torch.float16)
        self.trouble: Trouble | None = None  # of the step that was skipped last; None once one is made
        self._trace: Trace | None = None  # of the last step

    def begin(self, snapshot: Snapshot | None) -> None:
        """Take over a checkpoint's weights, moments and loss scale; without one, the main rank those of `model.init`,
        which it tells of. Collective. UserError where they do not fit."""
        if snapshot is not None:
            self._restore(snapshot)
        elif self.config.model.init is not None:
            for line in self.world.lead(partial(begin_from, self.config.model, self.towers), patient=True):
                tell(line)
        broadcast_parameters(self.towers.model, self.world)

    def _restore(self, snapshot: Snapshot) -> None:
        before, kind = snapshot.config.optim.kind, self.config.optim.kind
        require(
            before == kind,
            f"optim.kind={kind}, but the checkpoint was written under {before}; put it back, or start "
            "a run of its own (run.dir)",
        )
        theirs, options = snapshot.config.optim.options, self.config.optim.options
        require(
            theirs == options,
            f"optim.options={options}, but the checkpoint was written under {theirs}, and its moments may be other "
            "ones; put them back, or start a run of its own (run.dir)",
        )
        try:
            self.towers.model.load_state_dict(snapshot.model)
            for line in restore_optimizer(self.optimizer, self.towers.model, snapshot.optimizer):
                tell(line)
        except UserError:
            raise
        except (RuntimeError, ValueError) as error:
            raise UserError(f"the checkpoint does not fit the model of this config: {error}") from error
        if snapshot.state.scaler:  # empty unless that part of the run was in fp16 too
            self.scaler.load_state_dict(snapshot.state.scaler)

    def gradients(self, batch: StepBatch, *, plan: StepPlan, step: int) -> StepResult:
        """Gradients of the mean over the whole step's valid pairs, summed over the ranks.

        Of a loss that is not finite: no gradient, no pairs, NaN for the figures, and `trouble` is set.
        """
        self.optimizer.zero_grad(set_to_none=True)
        self.trouble, self._trace = None, Trace()
        try:
            result = gradcache_step(
                self.towers,
                batch.images,
                batch.tokens,
                batch.valid,
                plan=plan,
                loss_and_grads=partial(self._loss, step),
                key=fold(self.config.seed, "towers", step - 1, self.world.rank),
                positions=torch.from_numpy(batch.positions),
                grad_scale=loss_scale(self.scaler, self.world.device),
                parts=self.parts,
                trace=self._trace,
            )
        except NotFiniteError as error:
            scale, nan = self.towers.logit_scale(), math.nan
            usable = 0 < scale < math.inf
            self.trouble = bad_embeddings(error, batch.valid) if usable else Trouble(f"the logit scale is {scale}")
            return StepResult(nan, 0, nan, nan, scale, tokens_per_caption=nan, kept_share=nan)
        if result.pairs:
            with self.parts.part("communication"):
                sum_gradients(self.towers.encoder_parameters(), self.world)
        return result

    def _loss(
        self, step: int, image_VD: Tensor, text_VD: Tensor, logit_scale: float, **wanted: bool
    ) -> ContrastiveGrads:
        """The tiled loss of the whole step.

        Raises:
            NotFiniteError: on every rank, where embeddings of any, or the logit scale, are not finite.
        """
        loss, rank = self.config.loss, self.world.rank
        if injected("nan_embedding", step=step, rank=rank):
            text_VD[:1] = math.nan
        if not 0 < logit_scale < math.inf:  # the loss would raise before it has talked to the other ranks
            image_VD.fill_(math.nan)
            logit_scale = 1.0
        wider = loss.precision == "fp64"  # gradients that do not fit into the memory of float32 embeddings
        grads = contrastive_grads if wider else contrastive_grads_in_place
        try:
            result = grads(
                image_VD,
                text_VD,
                logit_scale,
                group=self.link,
                precision=loss.precision,
                engine=loss.engine,
                tile=loss.tile,
                **wanted,
            )
        except NotFiniteError:
            raise
        except OutOfRangeError as error:
            raise SharedError(
                f"step {step}: {error.fact}; set loss.precision=bf16 or fp32, or lower optim.lr"
            ) from error
        except ValueError as error:
            raise UserError(f"step {step}: {error}") from error
        if injected("nan_gradient", step=step, rank=rank) and result.d_image_ND is not None:
            result.d_image_ND[:1] = math.nan
        return result

    def update(self, *, step: int) -> float:
        """Clip and step, unless the gradient is not finite. Returns its norm before clipping."""
        self.scaler.unscale_(self.optimizer)
        parameters = [parameter for parameter in self.towers.model.parameters() if parameter.grad is not None]
        total = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])
        grad_norm = total.item()
        if math.isfinite(grad_norm):
            limit = self.config.train.grad_clip_norm or math.inf
            torch.nn.utils.clip_grads_with_norm_(parameters, limit, total)
            self.scaler.step(self.optimizer)
        else:  # not clipped: each parameter still shows whether it is its own that is not finite
            self.trouble = bad_gradient(self.towers, self._trace, grad_norm)
        self.scaler.update()
        return grad_norm
