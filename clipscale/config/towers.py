"""The settings of `towers`: how the towers are computed, whatever weights they have. No torch import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class TowerSettings:
    """How the towers are computed in training. Weights and evaluations are the same whatever stands here."""

    fast_attention: bool = True  # open_clip's blocks: no copies of q, k and v, no mask in memory; to rounding the same
    fast_norms: bool = True  # LayerNorms in bf16 and fp16: in that type, their sums in float32; false: cast and back
    residual: Literal["open_clip", "bf16"] = "open_clip"  # what text blocks add up in: there float32 under autocast too
    checkpoint_blocks: bool = False  # keep of each block its input alone; the backward pass runs the block once more
    compile: bool = False  # blocks by torch.compile: a minute or more at first, then fewer passes over memory


AS_OPEN_CLIP = TowerSettings(fast_attention=False, fast_norms=False)
"""Every forward open_clip's own."""
