"""`clipscale bench eval`: what share of a zero-shot evaluation's time is the image tower's."""
