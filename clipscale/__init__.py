"""clipscale: CLIP image-text pretraining at very large batches, exact and in constant memory."""

__version__ = "0.1.0"
