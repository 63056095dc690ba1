"""Build captioned shards from npm's emoji-datasource-<vendor> packages.

python data_tools/make_emoji.py emoji-datasource-google-16.0.0.tgz emoji-datasource-twitter-16.0.0.tgz \
    --output runs/emoji-shards
"""

import sys
from functools import partial

from clipscale.shardkit.commands import emoji, run_script

main = partial(run_script, emoji, "make_emoji.py")

if __name__ == "__main__":
    sys.exit(main())
