"""Captioned shards from the public CIFAR-10 data set; the work is shardkit/cifar10.py's."""

from __future__ import annotations

import argparse

from clipscale.shardkit.commands.options import path, positive
from clipscale.tell import say
from clipscale.words import counted

DESCRIPTION = """\
Build captioned WebDataset shards from the public CIFAR-10 data set.

Training pictures get the caption "a photo of a <class>."; test pictures get that and their label (.cls). Pictures are
stored as PNG, without loss, in the order of the batch files; classnames.txt holds one name a line (number = label).
The shards grow in a hidden folder and are moved in when all are done."""
EXAMPLES = """\
example:
  tar xzf cifar-10-binary.tar.gz            # the "binary version", from www.cs.toronto.edu/~kriz/cifar.html
  PROGRAM cifar-10-batches-bin --output runs/cifar10-shards
"""
LEFT = "no shard was added"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", type=path, help="the folder with data_batch_1.bin")
    add("--output", type=path, required=True, help="where the shards go")
    add("--samples-per-shard", type=positive, default=5_000, metavar="N", help="default: 5000")


def run(arguments: argparse.Namespace) -> int:
    from clipscale.shardkit.cifar10 import convert

    counts = convert(arguments.source, arguments.output, arguments.samples_per_shard)
    say(f"{arguments.output}: " + ", ".join(counted(count, f"{split} picture") for split, count in counts.items()))
    return 0
