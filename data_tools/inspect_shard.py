"""Look into a shard: a contact sheet (also: `clipscale shards inspect`).

python data_tools/inspect_shard.py data/train-0000.tar --output sheet.png
"""

import sys
from functools import partial

from clipscale.shardkit.commands import inspect, run_script

main = partial(run_script, inspect, "inspect_shard.py")

if __name__ == "__main__":
    sys.exit(main())
