"""`clipscale train`: a recipe or a config file, and words on top of it."""

from __future__ import annotations

import argparse
from pathlib import Path

from clipscale.cli import rank
from clipscale.config.help import with_comments
from clipscale.config.load import dump_config, load_config
from clipscale.launch import end_with_parent, told_once
from clipscale.resilience.leaving import Leaving
from clipscale.tell import say

EXAMPLES = """\
examples:
  clipscale train quickstart
  clipscale train quickstart train.global_batch=4096 run.dir=runs/large-batch
  clipscale train quickstart --print-config
  torchrun --nproc-per-node 8 -m clipscale train vit_b32 data.sources.mine.urls='shards/{0000..0999}.tar'

Running the same command again resumes from the newest checkpoint in run.dir (resume=auto).
"""
LEFT = "the same command resumes from the newest checkpoint"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="+", metavar="RECIPE|CONFIG.yaml|key=value", help="merged from left to right")
    parser.add_argument("--print-config", action="store_true", help="show the resolved configuration and stop")


def run(arguments: argparse.Namespace, words: list[str]) -> int:
    with told_once():
        config = load_config(arguments.config)
    if arguments.print_config:
        print(with_comments(dump_config(config)), end="")
        return 0
    end_with_parent()
    leaving = Leaving(config.run.leave_before_seconds)
    try:
        with leaving.starting(config.run.dir):
            from clipscale.preflight.checks import check_training

            notes = check_training(config)
            from clipscale.training.trainer import train

            summary = train(config, notes, leaving)
    except KeyboardInterrupt:
        saved = any(Path(config.run.dir, "checkpoints").glob("step-*"))
        raise KeyboardInterrupt(LEFT if saved else "nothing was saved: the same command begins again") from None
    if rank() == 0:
        for line in summary:
            say(line)
    return 0
