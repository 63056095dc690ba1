"""Build the shapes set (procedural pictures with captions) as shards.

python data_tools/make_shapes.py shapes
"""

import sys
from functools import partial

from clipscale.shardkit.commands import run_script, shapes

main = partial(run_script, shapes, "make_shapes.py")

if __name__ == "__main__":
    sys.exit(main())
