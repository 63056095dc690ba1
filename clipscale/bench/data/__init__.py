"""`clipscale bench data`: the way of pictures to the training process, beside the open_clip recipe."""
