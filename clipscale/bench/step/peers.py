"""What clipscale's step is held against: open_clip's own loop, and plain full-batch code over the same towers.

    take = open_clip_step(trainee, batch, chunk=64)    # train_one_epoch, --accum-freq 8 for 512 pairs
    take = dense_step(trainee, batch)                  # forward, ClipLoss, backward: everything at once
    take()                                             # one whole step, optimizer included; the loss

open_clip's loader hands over float pictures, normalised already: that part is done before, untimed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from open_clip.loss import ClipLoss
from torch import Tensor

from clipscale.bench.common.memory import begin_part
from clipscale.bench.step.flops import not_towers
from clipscale.bench.step.trainee import Batch, Trainee
from clipscale.towers.fast import as_open_clip

_BACKWARD_TOO = 3  # of a product of two factors: forward and, for each factor's gradient, once more
_PRECISION = {"fp32": "fp32", "bf16": "amp_bf16", "fp16": "amp"}


def open_clip_step(trainee: Trainee, batch: Batch, *, chunk: int) -> Callable[[], float]:
    """A step on `batch` in chunks of `chunk` pairs, both towers alike; with one chunk, open_clip's plain step."""
    from open_clip_train.train import train_one_epoch

    loader = _Loader(trainee, batch, chunk)
    trainee.towers.model.output_dict = True  # as open_clip's factory sets it for training
    arguments = SimpleNamespace(
        device=str(trainee.device),
        precision=_PRECISION[trainee.precision],
        accum_freq=loader.num_batches,
        batch_size=chunk,
        grad_clip_norm=None,
        log_every_n_steps=100,
        world_size=1,
        rank=0,
        skip_scheduler=True,
        **dict.fromkeys(("distill", "horovod", "wandb"), False),
    )
    scaler = trainee.scaler if trainee.scaler.is_enabled() else None
    loss_fn, told = ClipLoss(), []

    def loss(**features: Any) -> dict[str, Tensor]:
        with not_towers(_BACKWARD_TOO):
            losses = loss_fn(**features)
        told.append(losses["contrastive_loss"].detach())
        return losses

    def take() -> float:
        told.clear()
        data = {"train": SimpleNamespace(dataloader=loader, set_epoch=lambda epoch: None)}
        model = trainee.towers.model
        with as_open_clip(model):
            train_one_epoch(model, data, loss, 0, trainee.optimizer, scaler, None, None, arguments, tb_writer=None)
        return told[-1].item()

    return take


class _Loader:
    """A step's batches as open_clip's loader gives them, ready in host memory."""

    def __init__(self, trainee: Trainee, batch: Batch, chunk: int) -> None:
        self.num_samples, self.num_batches = len(batch), -(-len(batch) // chunk)
        pictures = trainee.towers.image.prepare(batch.images[: batch.distinct], torch.float32)
        if trainee.device.type == "cuda":
            pictures = pictures.pin_memory()
        images, tokens = pictures.split(chunk), batch.tokens.split(chunk)
        self._batches = [(images[place % len(images)][: len(part)], part) for place, part in enumerate(tokens)]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self._batches)


def dense_step(trainee: Trainee, batch: Batch) -> Callable[[], float]:
    """Without any chunk: every activation of the batch is there at once."""
    towers, loss_fn = trainee.towers, ClipLoss()
    autocast = towers.image.autocast

    def take() -> float:
        trainee.begin()
        begin_part("forward")
        images, tokens = (side.to(trainee.device, non_blocking=True) for side in (batch.images, batch.tokens))
        image_ND, text_ND = towers.image(images), towers.text(tokens)
        begin_part("loss")
        with torch.autocast(trainee.device.type, autocast) if autocast else nullcontext(), not_towers(_BACKWARD_TOO):
            loss = loss_fn(image_ND, text_ND, towers.model.logit_scale.exp())
        begin_part("backward")
        trainee.scaler.scale(loss).backward()
        trainee.finish()
        return loss.item()

    return take


def full_length_text(trainee: Trainee, batch: Batch, d_text_ND: Tensor, *, chunk: int) -> Callable[[], None]:
    """Both passes over the captions as plain code takes them: in order, every one at the full length."""
    tower = trainee.towers.text

    def take() -> None:
        trainee.begin()
        chunks = [part.to(trainee.device, non_blocking=True) for part in batch.tokens.split(chunk)]
        with torch.no_grad():
            embeddings = [tower(part) for part in chunks]
        del embeddings
        for part, d_text_MD in zip(chunks, d_text_ND.split(chunk), strict=True):
            tower(part).backward(d_text_MD)

    return take
