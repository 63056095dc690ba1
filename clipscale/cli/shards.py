"""`clipscale shards make|check|inspect|imagenet|emoji`: shardkit's commands, which data_tools/ offers too."""

from __future__ import annotations

import argparse

from clipscale.errors import UserError, reason
from clipscale.shardkit.commands import COMMANDS, describe

EXAMPLES = """\
examples:
  clipscale shards make captions.csv --output shards
  clipscale shards check 'shards/*.tar'
  clipscale shards inspect shards/train-0000.tar --output sheet.html
  clipscale shards imagenet ILSVRC2012_img_train.tar --output imagenet
  clipscale shards emoji emoji-datasource-google-16.0.0.tgz emoji-datasource-twitter-16.0.0.tgz --output emoji
"""
LEFT = "no shard was added, no report was written"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, command in COMMANDS.items():
        describe(actions.add_parser(name, help=command.WHAT), command, f"clipscale shards {name}")


def run(arguments: argparse.Namespace, words: list[str]) -> int:
    try:
        return COMMANDS[arguments.action].run(arguments)
    except OSError as error:  # files and folders that cannot be read or written
        raise UserError(reason(error)) from error
