"""The training run: the loop, its batches, its update, its checkpoints, and what it says."""
