"""The dense truth: what every other file of this package must equal. Needs the whole B x B matrix at once.

Shapes: B pairs of the global batch, D width of an embedding.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def dense_contrastive_loss(image_BD: Tensor, text_BD: Tensor, logit_scale: Tensor | float) -> Tensor:
    """Mean cross-entropy of images against all texts and of texts against all images, in the inputs' dtype.

    `logit_scale` is the factor itself (CLIP's `logit_scale.exp()`). Differentiable by plain autograd, to any order.
    """
    logits_BB = logit_scale * (image_BD @ text_BD.T)
    targets_B = torch.arange(len(logits_BB), device=logits_BB.device)
    return (F.cross_entropy(logits_BB, targets_B) + F.cross_entropy(logits_BB.T, targets_B)) / 2
