"""The encoders: uint8 pictures and token ids -> L2-normalised embeddings [M, D], one chunk at a time."""

from clipscale.towers.build import Towers, build_towers, try_backward
from clipscale.towers.tower import Tower, autocast_dtype, learns, refuse_batchnorm

__all__ = ["Tower", "Towers", "autocast_dtype", "build_towers", "learns", "refuse_batchnorm", "try_backward"]
