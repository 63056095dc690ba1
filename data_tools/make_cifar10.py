"""Build captioned shards from the public CIFAR-10 data set.

python data_tools/make_cifar10.py cifar-10-batches-bin --output runs/cifar10-shards
"""

import sys
from functools import partial

from clipscale.shardkit.commands import cifar10, run_script

main = partial(run_script, cifar10, "make_cifar10.py")

if __name__ == "__main__":
    sys.exit(main())
