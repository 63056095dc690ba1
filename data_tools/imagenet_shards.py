"""Build labelled shards from ImageNet as it is handed out (also: `clipscale shards imagenet`).

python data_tools/imagenet_shards.py ILSVRC2012_img_train.tar --output imagenet
"""

import sys
from functools import partial

from clipscale.shardkit.commands import imagenet, run_script

main = partial(run_script, imagenet, "imagenet_shards.py")

if __name__ == "__main__":
    sys.exit(main())
