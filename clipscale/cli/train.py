"""`clipscale train`: a config, and words on top of it."""

from __future__ import annotations

import argparse

from clipscale.cli import rank
from clipscale.config_load import dump_config, load_config

EXAMPLES = """\
examples:
  clipscale train configs/quickstart.yaml
  clipscale train configs/quickstart.yaml train.global_batch=4096 run.dir=runs/large-batch
  clipscale train configs/quickstart.yaml --print-config
  torchrun --nproc-per-node 8 -m clipscale train configs/vit_b32.yaml data.sources.mine.urls='shards/{0000..0999}.tar'

Running the same command again resumes from the newest checkpoint in run.dir (resume=auto).
"""
LEFT = "the same command resumes from the newest checkpoint"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="+", metavar="CONFIG.yaml|key=value", help="merged from left to right")
    parser.add_argument("--print-config", action="store_true", help="show the resolved configuration and stop")


def run(arguments: argparse.Namespace, words: list[str]) -> int:
    config = load_config(arguments.config)
    if arguments.print_config:
        print(dump_config(config), end="")
        return 0
    from clipscale.train import train

    summary = train(config)
    if rank() == 0:
        print("\n".join(summary))
    return 0
