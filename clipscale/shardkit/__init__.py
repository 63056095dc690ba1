"""The work behind `clipscale shards ...` and data_tools/: pictures packed into shards, shards checked and looked at."""
