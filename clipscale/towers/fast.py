"""open_clip's transformers computed faster: its modules keep the weights and their names, their forwards are ours.

    speed_up(model.text, TowerSettings())                  # once, after building
    how_computed(model.text, torch.bfloat16)               # '12 blocks of fast attention (flash), 25 norms in bf16'

- A block's attention. torch's nn.MultiheadAttention copies q, k and v apart, and their gradients come as three tensors
  of zeros that are filled and summed; here they are views of one product. A causal mask is no tensor that is read for
  every head but a word to the kernel.
- LayerNorm under autocast. A GPU's autocast casts to float32 and open_clip back: 44 bytes a number forwards and
  backwards, where torch's kernel, which takes halves and sums in float32, moves 10.
- The residual stream. open_clip's pictures run in autocast's type behind `ln_pre`, its captions in float32.

All of it in training mode: an evaluation computes what open_clip computes, to the bit.

What is not known (custom attention, a mask of padding, an attentional pool, towers of timm and Hugging Face) stays.

Shapes: M chunk, L tokens, W width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from open_clip.transformer import LayerNorm, ResidualAttentionBlock, TextTransformer, Transformer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend

from clipscale.config import TowerSettings
from clipscale.words import counted

_HALVES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


class FastBlock(ResidualAttentionBlock):
    causal: bool  # the mask that comes is the causal one; else none comes

    def attention(
        self, q_x: Tensor, k_x: Tensor | None = None, v_x: Tensor | None = None, attn_mask: Tensor | None = None
    ) -> Tensor:
        """Self-attention of [M, L, W]."""
        if not self.training:
            return super().attention(q_x, k_x, v_x, attn_mask)
        attn = self.attn
        packed = F.linear(q_x, attn.in_proj_weight, attn.in_proj_bias).unflatten(2, (3, attn.num_heads, -1))
        q, k, v = (part.transpose(1, 2) for part in packed.unbind(2))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return attn.out_proj(mixed.transpose(1, 2).flatten(2))


class FastNorm(LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype or not self.training:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
            return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class HalfStream(Transformer):
    """Its blocks add up in autocast's type."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        device = x.device.type
        if self.training and torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        return super().forward(x, attn_mask)


def speed_up(encoder: nn.Module, settings: TowerSettings) -> None:
    """Swap the forwards that `settings` names; the state dict, hooks and modules stay."""
    text = isinstance(encoder, TextTransformer)
    own_masks = text and (encoder.cls_emb is not None or encoder.use_pad_mask)  # of padding, for each caption
    for module in encoder.modules():
        if settings.fast_attention and not own_masks and _known(module):
            module.__class__, module.causal = FastBlock, text and encoder.attn_mask is not None
        elif settings.fast_norms and type(module) is LayerNorm and module.elementwise_affine:
            module.__class__ = FastNorm
        elif settings.residual == "bf16" and type(module) is Transformer:
            module.__class__ = HalfStream


@contextmanager
def as_open_clip(model: nn.Module) -> Iterator[None]:
    """Within: the forwards are open_clip's own, for comparisons."""
    swapped = [module for module in model.modules() if type(module) in (FastBlock, FastNorm, HalfStream)]
    kinds = [type(module) for module in swapped]
    for module, kind in zip(swapped, kinds, strict=True):
        module.__class__ = kind.__base__
    try:
        yield
    finally:
        for module, kind in zip(swapped, kinds, strict=True):
            module.__class__ = kind


def _known(module: nn.Module) -> bool:
    """A block of open_clip's with self-attention by torch's module and nothing beside it."""
    if type(module) is not ResidualAttentionBlock or hasattr(module, "ln_1_kv"):
        return False
    attn = module.attn
    return type(attn) is nn.MultiheadAttention and attn.batch_first and attn.in_proj_weight is not None


def how_computed(encoder: nn.Module, dtype: torch.dtype) -> str:
    """What is fast in an encoder and what is not, in a few words. `dtype`: of its products."""
    blocks = [module for module in encoder.modules() if isinstance(module, ResidualAttentionBlock)]
    fast = [block for block in blocks if isinstance(block, FastBlock)]
    norms = sum(isinstance(module, FastNorm) for module in encoder.modules())
    parts = [f"{counted(len(fast), 'block')} of fast attention ({_backend(fast[0], dtype)})"] if fast else []
    if len(blocks) > len(fast):
        parts.append(f"{counted(len(blocks) - len(fast), 'block')} of open_clip's")
    if norms and dtype in _HALVES:
        parts.append(f"{counted(norms, 'norm')} in {_HALVES[dtype]}")
    if any(isinstance(module, HalfStream) for module in encoder.modules()):
        parts.append("residual stream in bf16")
    return ", ".join(parts) or f"{type(encoder).__name__} as it comes"


def _backend(block: FastBlock, dtype: torch.dtype) -> str:
    """Of torch's attention, for tensors such as this block's: flash, efficient, cudnn, or math, which keeps squares."""
    weight, heads = block.attn.in_proj_weight, block.attn.num_heads
    q = torch.empty(8, heads, 16, block.attn.head_dim, dtype=dtype, device=weight.device, requires_grad=True)
    chosen = SDPBackend(torch._fused_sdp_choice(q, q, q, is_causal=block.causal))
    return chosen.name.split("_")[0].lower()
