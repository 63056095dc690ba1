"""`emoji`: captioned shards from npm's emoji-datasource-<vendor> packages; the work is shardkit/emoji.py's."""

from __future__ import annotations

import argparse

from clipscale.errors import require
from clipscale.shardkit.commands.options import natural, path, positive
from clipscale.tell import say

WHAT = "pack the emoji of several vendors: train on some, test on another"
DESCRIPTION = """\
Build captioned WebDataset shards from npm's emoji-datasource-<vendor> packages (64-pixel drawings of the same
emoji by google, twitter, apple and facebook). One vendor's drawings are the test, the others' train."""
EXAMPLES = """\
example:
  npm pack emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0
  PROGRAM emoji-datasource-google-16.0.0.tgz emoji-datasource-twitter-16.0.0.tgz --output runs/emoji-shards

The result, in the output folder; captions are lines, name and short names:
  train-*.tar       the other vendors' drawings in all skin tones, but for emoji that are kept from training; without
                    a tone the group is a caption too (animal mammal)
  validation-*.tar  their drawings of those
  test-*.tar        the test vendor's, without skin tones: labelled (.cls: a line of classnames.txt), and for retrieval
  groups-*.tar      the same pictures, labelled by group (a line of groups.txt)
  unseen-*.tar      of the test, the emoji that are kept from training (their names: unseen.txt)
  templates.txt     '{}': a caption is the name alone

Licences, as the packages' README has them: google's drawings Apache 2.0, twitter's CC BY 4.0; apple's are not licensed
for commercial use, facebook's have no clear licence. The data is MIT.
"""
LEFT = "no shard was added"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("packages", type=path, nargs="+", metavar="PACKAGE", help="a .tgz of `npm pack`, or the folder it unpacks to")
    add("--output", type=path, required=True, metavar="DIR", help="folder for the shards (made if absent)")
    add("--test", default="twitter", metavar="VENDOR", help="whose drawings are the test, default: twitter")
    add("--unseen", type=positive, default=100, metavar="N", help="emoji kept from training, default: 100")
    add("--samples-per-shard", type=positive, default=500, metavar="N", help="default: 500")
    add("--seed", type=natural, default=0, metavar="N", help="of what is unseen, and of the order; default: 0")
    add("--overwrite", action="store_true", help="replace the set's shards in the output folder")


def run(arguments: argparse.Namespace) -> int:
    for package in arguments.packages:
        require(package.exists(), f"{package} does not exist; `npm pack emoji-datasource-google` brings such a package")
    from clipscale.shardkit.emoji import convert, read_package  # with torch

    made = convert(
        [read_package(package) for package in arguments.packages],
        arguments.output,
        test=arguments.test,
        unseen=arguments.unseen,
        per_shard=arguments.samples_per_shard,
        seed=arguments.seed,
        overwrite=arguments.overwrite,
    )
    say(f"{arguments.output}: " + ", ".join(f"{count:,} {split}" for split, count in made.counts.items()) + " pictures")
    say(f"trained on: {', '.join(made.trained)}; tested on: {arguments.test}")
    passed = ", ".join(f"{count} of {cause}" for cause, count in made.passed_over.items() if count)
    say(f"passed over: {passed or 'none'}")
    return 0
