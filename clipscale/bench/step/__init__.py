"""`clipscale bench step`: a whole training step, beside open_clip's own loop and a plain full-batch step."""
