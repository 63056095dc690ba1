"""The contrastive loss and in-batch accuracy on held-out pairs: the same pairs in the same batches every time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from clipscale.config import Loss, Validation
from clipscale.data.order.repeats import count_repeats
from clipscale.data.source import Source
from clipscale.data.tokenize import Tokenize, caption_hashes
from clipscale.dist import World
from clipscale.errors import SharedError
from clipscale.eval.mode import evaluating
from clipscale.eval.pictures import ShardPictures, batches
from clipscale.eval.view import View
from clipscale.loss import ContrastiveGrads, contrastive_grads
from clipscale.towers import Towers
from clipscale.words import counted


@dataclass(frozen=True)
class ValidationResult:
    """Means over the batches."""

    loss: float
    image_accuracy: float  # share of pictures whose own caption is the nearest of the batch
    text_accuracy: float
    pairs: int
    batch: int  # pairs in each loss, those left out included
    bad: int  # pairs left out: pictures that could not be decoded
    repeated_captions: int  # that stand in their batch behind an equal one: those pairs tie, and a tie is a miss


@torch.no_grad()
def evaluate_validation(
    towers: Towers,
    source: Source,
    tokenize: Tokenize,
    world: World,
    config: Validation,
    loss: Loss,
    *,
    chunk: int,
    view: View,
    threads: int,
    walk: Callable[[Iterable], Iterator] = iter,
) -> ValidationResult:
    """Collective; the same result on every rank. Puts the model in eval mode for the time.

    Batches of `config.batch` pairs over all ranks, in the order of the shards; a last batch that is not full is left
    out (unless it is the only one), because a contrastive loss depends on how many pairs it is taken over.
    `walk` passes on each chunk of pictures.
    """
    total = min(config.samples, source.samples)
    size = min(config.batch, total)
    pictures = ShardPictures(source)
    results, slots, repeats = [], 0, 0

    def embed(start: int) -> tuple[Tensor, Tensor, Tensor]:
        """This rank's share of the batch from `start` on: [n, D] twice, and the captions' hashes [n]."""
        mine = range(start + world.rank, start + size, world.size)
        images, texts, hashes = [_nothing(towers)], [_nothing(towers)], [torch.zeros(0, dtype=torch.int64)]
        found = batches(pictures, mine, batch=chunk, view=view, threads=threads)
        for pixels, captions, valid in walk(found):
            if valid.any():
                tokens = tokenize([text.decode() for text, ok in zip(captions, valid, strict=True) if ok])
                images.append(towers.image(pixels[valid].to(towers.image.device)))
                texts.append(towers.text(tokens.to(towers.text.device)))
                hashes.append(caption_hashes(tokens))
        return torch.cat(images), torch.cat(texts), torch.cat(hashes)

    with evaluating(towers):
        for start in range(0, total - size + 1, size):
            image_ND, text_ND, hashes_N = world.each(partial(embed, start))
            result = contrastive_grads(
                image_ND,
                text_ND,
                towers.logit_scale(),
                precision=loss.precision,
                engine=loss.engine,
                tile=loss.tile,
                image_grad=False,
                text_grad=False,
                scale_grad=False,
            )
            everyone = world.collect(hashes_N)
            repeats += 0 if everyone is None else count_repeats(everyone.numpy())
            slots += size
            if result.pairs > 0:
                results.append(result)
    if not results:
        raise SharedError(f"validation: none of the {counted(slots, 'picture')} of {source.name!r} can be decoded")
    pairs = sum(result.pairs for result in results)
    return ValidationResult(
        loss=_mean(results, lambda result: result.loss.item()),
        image_accuracy=_mean(results, lambda result: result.image_accuracy),
        text_accuracy=_mean(results, lambda result: result.text_accuracy),
        pairs=pairs,
        batch=size,
        bad=slots - pairs,
        repeated_captions=world.broadcast(repeats),
    )


def _nothing(towers: Towers) -> torch.Tensor:
    """No embedding yet, [0, D]: a rank without a readable picture takes part all the same."""
    return torch.zeros(0, towers.embed_dim, device=towers.image.device)


def _mean(results: list[ContrastiveGrads], pick) -> float:
    return sum(pick(result) for result in results) / len(results)
