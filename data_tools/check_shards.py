"""Verify shards to their last byte (also: `clipscale shards check`).

python data_tools/check_shards.py 'data/train-*.tar'
"""

import sys
from functools import partial

from clipscale.shardkit.commands import check, run_script

main = partial(run_script, check, "check_shards.py")

if __name__ == "__main__":
    sys.exit(main())
