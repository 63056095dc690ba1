"""clipscale's own step, planned and taken as the trainer does: all that this benchmark knows of it is here.

step = OwnStep(trainee, batch, image_chunk=64, text_chunk=64, keep_bytes="auto")
step.take()                        # one whole step, optimizer included; the loss
step.kept_share                    # of all samples of both towers, whose graphs were kept in it
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from clipscale.bench.common.memory import begin_part
from clipscale.bench.step.flops import not_towers
from clipscale.bench.step.trainee import Batch, Trainee
from clipscale.config import Config, GradCache, Train
from clipscale.config.data import Replay
from clipscale.data.load.replay import Held
from clipscale.dist import World
from clipscale.loss import ContrastiveGrads, contrastive_grads_in_place
from clipscale.optim import loss_scale
from clipscale.step import StepResult, TowerPlan, gradcache_step
from clipscale.step.gradcache import TwoPasses, captions_of
from clipscale.step.places import Places
from clipscale.step.planning import plan_line, plan_step
from clipscale.telemetry.parts import OTHER, Parts


class OwnStep:
    """A step on `batch`. `keep_bytes`: what the graphs kept from pass 1 to pass 2 may take; auto: what is free."""

    def __init__(
        self,
        trainee: Trainee,
        batch: Batch,
        *,
        image_chunk: int,
        text_chunk: int,
        keep_bytes: int | str,
        loss_precision: str = "auto",
    ) -> None:
        self._trainee, self._loss_precision = trainee, loss_precision
        self._tokens = batch.tokens.int()  # as the loader gives them
        self._images = Held(batch.images, image_chunk)
        self._valid = torch.ones(len(batch), dtype=torch.bool)
        settings = GradCache(image_chunk=image_chunk, text_chunk=text_chunk, keep_bytes=keep_bytes)
        config = Config(train=Train(global_batch=len(batch)), gradcache=settings, replay=Replay(kind="host"))
        self._plan = plan_step(config, trainee.towers, World(0, 1, 0, trainee.device), None)
        self.how = f"gradcache_step; {plan_line(self._plan, trainee.towers, len(batch))}"
        self.result: StepResult | None = None
        """Of the last step."""
        self._parts, self._steps = _SeenParts(trainee.device), 0

    def part_seconds(self) -> dict[str, float]:
        """Of a step, on the average of those since the last call."""
        steps, self._steps = max(self._steps, 1), 0
        return {name: seconds / steps for name, seconds in self._parts.take().items() if name != OTHER}

    def take(self) -> float:
        trainee = self._trainee
        trainee.begin()
        self.result = gradcache_step(
            trainee.towers,
            self._images,
            self._tokens,
            self._valid,
            plan=self._plan,
            loss_and_grads=self._loss,
            key=0,
            positions=torch.arange(len(self._tokens)),
            grad_scale=loss_scale(trainee.scaler, trainee.device),
            parts=self._parts,
        )
        with self._parts.part("optimizer"):
            trainee.finish(clip=math.inf)
        self._steps += 1
        return self.result.loss

    def _loss(self, image_VD: Tensor, text_VD: Tensor, logit_scale: float, **wanted: bool) -> ContrastiveGrads:
        with not_towers():
            return contrastive_grads_in_place(image_VD, text_VD, logit_scale, precision=self._loss_precision, **wanted)


class _SeenParts(Parts):
    """A step's parts, whose memory may be watched as well."""

    def enter(self, name: str) -> None:
        super().enter(name)
        begin_part(name)


def own_text(trainee: Trainee, batch: Batch, d_text_ND: Tensor, *, chunk: int) -> Callable[[], None]:
    """The text tower's part of a step that keeps nothing: both passes, for given gradients of its embeddings."""
    tower, plan = trainee.towers.text, TowerPlan(chunk, by_chunk=bool(trainee.towers.draws_by_chunk()["text"]))
    places, positions = Places(torch.ones(len(batch), dtype=torch.bool)), torch.arange(len(batch))

    def take() -> None:
        trainee.begin()
        captions = captions_of(tower, batch.tokens, plan)
        passes = TwoPasses(tower, captions, 0, positions, by_chunk=plan.by_chunk)
        passes.embed()
        passes.replay(d_text_ND, places, 1.0)

    return take
