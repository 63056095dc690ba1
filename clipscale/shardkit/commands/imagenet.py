"""`imagenet`: labelled shards from ImageNet as it is handed out, without unpacking anything to disk.

Flow: folders or archives are listed in place (shardkit/imagenet.py) -> pictures are put in random order, so that every
shard mixes the classes -> each is read where it lies, decoded once, and packed (pictures.py, packing.py), as it is or
smaller.
"""

from __future__ import annotations

import argparse
import time

from clipscale.errors import require
from clipscale.files import write_file
from clipscale.progress import track
from clipscale.shardkit.commands.options import natural, path
from clipscale.shardkit.commands.packing import add_packing, destination_of, encoding_of, print_written
from clipscale.shardkit.imagenet import Labels, find_pictures
from clipscale.shardkit.inputs import in_random_order
from clipscale.tell import say
from clipscale.words import counted

WHAT = "pack ImageNet, or any folder or tar of classes"
DESCRIPTION = "Pack ImageNet (ILSVRC2012), or any folder or tar of classes, into labelled WebDataset shards."
EXAMPLES = """\
examples:
  PROGRAM ILSVRC2012_img_train.tar --output imagenet --prefix train --resize 256
      the official archive, a tar of 1000 tars
  PROGRAM imagenet/train --output imagenet-shards
      an ImageFolder tree, train/n01440764/*.JPEG; classes are its folders in the order of their names; folders that
      are all numbers (0, 1, ..., 11) are the labels themselves (1, ..., 12: with --first-label 1)
  PROGRAM ILSVRC2012_img_val.tar --output imagenet --prefix val --val-labels LABELS
      the official archive of 50,000 pictures, or a folder of them; LABELS holds a line for each:
        n01751748                               synset ids, the pictures in the order of their names
        ILSVRC2012_val_00000001.JPEG n01751748  names and synset ids (Kaggle's LOC_val_solution.csv too)
        490                                     numbers: with --synsets, the synset ids in the order they count
      The official ILSVRC2012_validation_ground_truth.txt counts from 1 in the order of ILSVRC2012_ID (in meta.mat of
      the development kit), which is not the order of the names.

The result: <output>/<prefix>-0000.tar, ..., each sample as .jpg (one picture is a PNG), .cls (the class, from 0,
synsets sorted by id: the order of torchvision and of open_clip's class names) and .json (synset, filepath, uid, sizes,
sha256); <output>/<prefix>-synsets.txt; <output>/refused.jsonl. CMYK pictures pass as they are.

Shuffling reads the pictures in random order: fine for SSDs; on a hard disk give --no-shuffle (classes then follow each
other) and --samples-per-shard 1000.
exit status: 0 shards written; 2 wrong arguments or input, or no usable sample.
"""
LEFT = "no shard was added"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", type=path, help="folder of class folders, tar of class tars; with --val-labels a flat folder or tar")
    add("--val-labels", type=path, metavar="FILE", help="the classes of a flat set, a line a picture")
    add("--synsets", type=path, metavar="FILE", help="synset ids, a line each, in the order that numbers in FILE count")
    add(
        "--first-label",
        type=natural,
        metavar="N",
        help="what numbers count from: those of FILE where they do not show it, or classes that are numbers (then: 0)",
    )
    add_packing(parser, prefix="train")


def run(arguments: argparse.Namespace) -> int:
    start = time.perf_counter()
    require(arguments.val_labels is not None or arguments.synsets is None, "--synsets belongs to --val-labels")
    labels = None
    if arguments.val_labels is not None:
        labels = Labels(arguments.val_labels, arguments.synsets, arguments.first_label)
    to = destination_of(arguments)
    first_label = arguments.first_label
    found = find_pictures(arguments.source, labels, lambda members: track(members, "listing archives"), first_label)
    rows = found.rows
    if arguments.shuffle:  # from the order of names, so that a folder and its archive give the same shards
        rows = in_random_order(sorted(rows, key=lambda row: row.name), arguments.seed)
    from clipscale.shardkit.packing import pack  # with torch

    written = pack(rows, found.refusals, to, encoding_of(arguments), arguments.jobs)
    print_written(written, found.passed_over, arguments.output, arguments.source, time.perf_counter() - start)
    name = f"{arguments.prefix}-synsets.txt" if arguments.prefix else "synsets.txt"
    write_file(arguments.output / name, "".join(f"{synset}\n" for synset in found.classes))
    say(f"{counted(len(found.classes), 'class', 'classes')}, listed in {arguments.output / name}")
    return 0
