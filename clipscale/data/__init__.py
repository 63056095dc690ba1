"""Shards -> samples -> step batches.

A worked example, for two shards of 3 and 2 usable samples, a global batch of 4, one stream and two ranks:

    shards   a.tar: cat dog owl      b.tar: fox elk                 shard/, source.py: what is usable, and where
    order    epoch 0: elk cat dog owl fox | epoch 1: owl fox ...    order/: a pure function of (counts, seed)
    batches  step 0: elk cat dog owl      | step 1: fox, owl ...    always 4 positions; step 1 lies in two epochs
    ranks    rank 0: elk cat, rank 1: dog owl                       Pipeline.rank_positions: a partition for any world
    slots    pixels = crop(position), tokens, valid                 load/: decoded in the background
    state    position 4 after step 0                                one integer resumes the run
"""
