"""Build WebDataset shards from pictures with captions (also: `clipscale shards make`).

python data_tools/make_shards.py captions.csv --output shards
"""

import sys
from functools import partial

from clipscale.shardkit.commands import make, run_script

main = partial(run_script, make, "make_shards.py")

if __name__ == "__main__":
    sys.exit(main())
