"""What learns from a batch: the towers under gradient caching, their loss, and the optimizer with its loss scale.

    learner = Learner(config, towers, world, parts)
    learner.restore(snapshot)
    result = learner.gradients(batch, plan=plan, step=7)          # summed over the ranks
    grad_norm = learner.update(step=7)

Steps are numbered from 1.
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
from clipscale.errors import UserError, require
from clipscale.loss import ContrastiveGrads, contrastive_grads, contrastive_grads_in_place
from clipscale.loss.link import Link
from clipscale.optim import build_optimizer, loss_scale, restore_optimizer
from clipscale.parallel import sum_gradients
from clipscale.parts import Parts
from clipscale.step import StepPlan, StepResult, gradcache_step
from clipscale.tell import tell
from clipscale.towers import Towers


class Learner:
    """One rank's. Every rank calls each of its methods alike.

    Args:
        link: of the loss to the other ranks; None: torch.distributed's.
    """

    def __init__(self, config: Config, towers: Towers, world: World, parts: Parts, link: Link | None = None) -> None:
        self.link = link
        self.config, self.towers, self.world, self.parts = config, towers, world, parts
        self.optimizer = build_optimizer(towers.model, config.optim)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=towers.image.autocast == torch.float16)
        self.nonfinite_in_a_row = 0

    def restore(self, snapshot: Snapshot) -> None:
        """Take over a checkpoint's weights, moments and loss scale. UserError where they do not fit."""
        before, kind = snapshot.config.optim.kind, self.config.optim.kind
        require(
            before == kind,
            f"optim.kind={kind}, but the checkpoint was written under {before}; put it back, or start "
            "a run of its own (run.dir)",
        )
        try:
            self.towers.model.load_state_dict(snapshot.model)
            restore_optimizer(self.optimizer, snapshot.optimizer)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"the checkpoint does not fit the model of this config: {error}") from error
        if snapshot.state.scaler:  # empty unless that part of the run was in fp16 too
            self.scaler.load_state_dict(snapshot.state.scaler)

    def gradients(self, batch: StepBatch, *, plan: StepPlan, step: int) -> StepResult:
        """Gradients of the mean over the whole step's valid pairs, summed over the ranks."""
        self.optimizer.zero_grad(set_to_none=True)
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
        )
        if result.pairs:
            with self.parts.part("communication"):
                sum_gradients(self.towers.encoder_parameters(), self.world)
        return result

    def _loss(
        self, step: int, image_VD: Tensor, text_VD: Tensor, logit_scale: float, **wanted: bool
    ) -> ContrastiveGrads:
        """The tiled loss of the whole step; embeddings that are not finite end the run, naming side and row."""
        loss = self.config.loss
        wider = loss.precision == "fp64"  # gradients that do not fit into the memory of float32 embeddings
        grads = contrastive_grads if wider else contrastive_grads_in_place
        try:
            return grads(
                image_VD,
                text_VD,
                logit_scale,
                group=self.link,
                precision=loss.precision,
                engine=loss.engine,
                tile=loss.tile,
                **wanted,
            )
        except ValueError as error:
            raise UserError(f"step {step}: {error}") from error

    def update(self, *, step: int) -> float:
        """Clip and step; a gradient that is not finite is skipped and counted. Returns its norm before clipping."""
        self.scaler.unscale_(self.optimizer)
        limit = self.config.train.grad_clip_norm or math.inf
        grad_norm = torch.nn.utils.clip_grad_norm_(self.towers.model.parameters(), limit).item()
        if math.isfinite(grad_norm):
            self.scaler.step(self.optimizer)
            self.nonfinite_in_a_row = 0
        else:
            self.nonfinite_in_a_row += 1
            tell(f"step {step}: gradient norm is {grad_norm}, step skipped")
            require(
                self.nonfinite_in_a_row < self.config.train.max_nonfinite_steps,
                f"step {step}: {self.nonfinite_in_a_row} steps in a row without a finite gradient "
                "(train.max_nonfinite_steps); lower optim.lr, or use train.precision=bf16 or fp32",
            )
        self.scaler.update()
        return grad_norm
