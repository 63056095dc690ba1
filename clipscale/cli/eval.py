"""`clipscale eval zeroshot`: a checkpoint, and changes to its own config."""

from __future__ import annotations

import argparse

from clipscale.cli import add_command, rank
from clipscale.paths import path_option

EXAMPLES = """\
examples:
  clipscale eval zeroshot runs/quickstart
  clipscale eval zeroshot runs/b32/checkpoints/step-000010000 eval.zeroshot.folder=imagenet/val
  clipscale eval zeroshot runs/b32 eval.zeroshot.urls='cifar/test-*.tar' \\
      eval.zeroshot.classnames=cifar/classnames.txt eval.zeroshot.templates=configs/templates/photo.txt
"""
LEFT = "nothing was written"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    zeroshot = add_command(kinds, "zeroshot", "zero-shot classification, top-1 and top-5", EXAMPLES)
    zeroshot.add_argument(
        "checkpoint", type=path_option, help="a run's folder (its newest checkpoint) or a checkpoint's"
    )
    zeroshot.add_argument("settings", nargs="*", metavar="key=value", help="changes to the checkpoint's own config")


def run(arguments: argparse.Namespace, words: list[str]) -> int:
    from clipscale.preflight.checks import check_evaluation

    found, config = check_evaluation(arguments.checkpoint, arguments.settings)
    from clipscale.evaluate import evaluate_found

    result = evaluate_found(found, config)
    if rank() == 0:
        print(
            "  ".join(f"{name} {value:.4f}" if "/top" in name else f"{name} {value}" for name, value in result.items())
        )
    return 0
