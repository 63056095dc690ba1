"""The contrastive loss of the whole batch, exact, in memory that does not grow with the batch.

    image, text = embed(...)                                      # [N, D] on each rank, normalised
    grads = contrastive_grads(image, text, logit_scale)           # over the pairs of all ranks
    image_chunk.backward(grads.d_image_ND[chunk])                 # into the towers, chunk by chunk

or, in a trainer of one's own,

    loss = contrastive_loss(image, text, model.logit_scale.exp())
    loss.backward()

for which `ClipLoss` is a module that can stand where open_clip's stands.

Read `reference.py` (what is computed), `statistics.py` and `tiles.py` (one block of it), `kernels.py` (the same, fast),
`ring.py` (all ranks' blocks), `contrastive.py`.
"""

from clipscale.loss.checks import NotFiniteError, OutOfRangeError
from clipscale.loss.clip_loss import ClipLoss
from clipscale.loss.contrastive import (
    ContrastiveGrads,
    contrastive_grads,
    contrastive_grads_in_place,
    contrastive_loss,
)
from clipscale.loss.reference import dense_contrastive_loss

__all__ = [
    "ClipLoss",
    "ContrastiveGrads",
    "NotFiniteError",
    "OutOfRangeError",
    "contrastive_grads",
    "contrastive_grads_in_place",
    "contrastive_loss",
    "dense_contrastive_loss",
]
