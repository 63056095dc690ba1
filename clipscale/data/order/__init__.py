"""Position -> (source, epoch, shard, index): arithmetic, a pure function of counts and a seed."""
