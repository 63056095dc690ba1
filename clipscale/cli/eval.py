"""`clipscale eval zeroshot`: a checkpoint, and changes to its own config."""

from __future__ import annotations

import argparse
import json
from typing import Any

from clipscale.cli import add_command, rank
from clipscale.config import Config
from clipscale.files import write_file
from clipscale.paths import path_option

EXAMPLES = """\
examples:
  clipscale eval zeroshot runs/quickstart
  clipscale eval zeroshot runs/b32/checkpoints/step-000010000 eval.zeroshot.folder=imagenet/val --json b32.json
  clipscale eval zeroshot runs/b32 eval.zeroshot.urls='cifar/test-*.tar' \\
      eval.zeroshot.classnames=cifar/classnames.txt eval.zeroshot.templates=configs/templates/photo.txt
"""
LEFT = "nothing was written"
TASK = "zeroshot_classification"  # as CLIP_benchmark calls it


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    zeroshot = add_command(kinds, "zeroshot", "zero-shot classification, top-1 and top-5", EXAMPLES)
    zeroshot.add_argument(
        "checkpoint", type=path_option, help="a run's folder (its newest checkpoint) or a checkpoint's"
    )
    zeroshot.add_argument(
        "--json", type=path_option, metavar="FILE", help="write the scores there too, in CLIP_benchmark's form"
    )
    zeroshot.add_argument("settings", nargs="*", metavar="key=value", help="changes to the checkpoint's own config")


def run(arguments: argparse.Namespace, words: list[str]) -> int:
    from clipscale.preflight.checks import check_evaluation

    found, config = check_evaluation(arguments.checkpoint, arguments.settings)
    from clipscale.evaluate import evaluate_found

    result = evaluate_found(found, config)
    if rank() == 0:
        scores = (
            f"{name} {value:.4f}" if isinstance(value, float) else f"{name} {value}" for name, value in result.items()
        )
        print("  ".join(scores))
        if arguments.json:
            write_file(arguments.json, json.dumps(benchmark_form(result, config, str(found)), indent=2) + "\n")
    return 0


def benchmark_form(result: dict[str, float], config: Config, checkpoint: str) -> dict[str, Any]:
    """The scores as CLIP_benchmark writes them, so that its tables (`clip_benchmark build`) take ours beside theirs.

    Below five classes it has no top-5: NaN there, null here, for JSON has no NaN.
    """
    zeroshot = config.eval.zeroshot
    return {
        "dataset": zeroshot.folder or zeroshot.urls,
        "model": config.model.name or "model.vision, model.text",
        "pretrained": checkpoint,
        "task": TASK,
        "metrics": {
            "acc1": result["zeroshot/top1"],
            "acc5": result["zeroshot/top5"] if result["zeroshot/classes"] >= 5 else None,
            "mean_per_class_recall": result["zeroshot/mean_per_class_recall"],
        },
        "language": "en",
    }
