"""`clipscale eval zeroshot`, `retrieval` and `validation`: a checkpoint or any weights, and changes to its config."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

from clipscale.cli import add_command, rank
from clipscale.config import Config, ZeroShot
from clipscale.errors import require
from clipscale.files import write_file
from clipscale.paths import path_option, weights_option
from clipscale.weights.target import TARGETS

EXAMPLES = """\
examples:
  clipscale eval zeroshot runs/quickstart
  clipscale eval zeroshot runs/b32/checkpoints/step-000010000 eval.zeroshot.folder=imagenet/val --json b32.json
  clipscale eval zeroshot runs/b32 eval.zeroshot.urls='cifar/test-*.tar' \\
      eval.zeroshot.classnames=cifar/classnames.txt eval.zeroshot.templates=configs/templates/photo.txt
  clipscale eval zeroshot runs/b32 eval.zeroshot.wds=sets/wds_cars --classes cars.json
  clipscale eval zeroshot runs/b32 eval.zeroshot_sets.v2.folder=imagenetv2 eval.zeroshot_sets.sketch.folder=sketch
  clipscale eval zeroshot runs/b32 eval.zeroshot.folder=imagenet-r eval.zeroshot.subset=imagenet_r
  clipscale eval retrieval runs/b32 eval.retrieval.urls='flickr30k/test/*.tar' --json flickr.json
  clipscale eval zeroshot ViT-B-32:laion2b_s34b_b79k eval.zeroshot.folder=imagenet/val
  clipscale eval zeroshot epoch_32.pt model.name=ViT-B-16 eval.zeroshot.folder=imagenet/val
  clipscale eval validation runs/b32 eval.validation.urls='held-out/*.tar' eval.validation.caption=json:caption
"""
LEFT = "nothing was written"
KINDS = {
    "zeroshot": "zero-shot classification, top-1 and top-5, of every set that the config names",
    "retrieval": "pictures found by their captions and captions by their pictures: recall at 1, 5 and 10",
    "validation": "contrastive loss and in-batch accuracy on held-out pairs",
}
TASKS = {"zeroshot": "zeroshot_classification", "retrieval": "zeroshot_retrieval"}  # as CLIP_benchmark calls them
DATASET = "{dataset}"  # in the name of a file, as in CLIP_benchmark's --output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    for kind, what in KINDS.items():
        its_parser = add_command(kinds, kind, what, EXAMPLES)
        its_parser.add_argument("checkpoint", type=weights_option, help=f"{TARGETS}, to be evaluated")
        its_parser.add_argument(
            "settings", nargs="*", metavar="key=value", help="changes to its config, such as the model's"
        )
        its_parser.add_argument("--ema", action="store_true", help="of a run or checkpoint: the average of its weights")
        if kind in TASKS:
            its_parser.add_argument(
                "--json",
                type=path_option,
                metavar="FILE",
                help=f"write the scores there too, in CLIP_benchmark's form; {DATASET} in FILE is the set's name",
            )
        if kind == "zeroshot":
            its_parser.add_argument(
                "--classes",
                type=path_option,
                metavar="FILE",
                help="write there, as JSON, how each class fares and which are taken for which, and tell the worst; "
                f"{DATASET} as above",
            )


def run(arguments: argparse.Namespace, words: list[str]) -> int:
    from clipscale.preflight.checks import check_evaluation

    found, config, names = check_evaluation(arguments.checkpoint, arguments.kind, arguments.settings, ema=arguments.ema)
    files = {option: vars(arguments).get(option) for option in ("json", "classes")}
    for option, file in files.items():
        if file is not None:
            _check_file(f"--{option}", file, names)
    from clipscale.eval.per_class import worst_confusions
    from clipscale.evaluate import evaluate_found

    result, failed, details = evaluate_found(found, config, names)
    if rank() == 0:
        for name in names:
            if name in failed:
                print(f"clipscale: error: {name}: {failed[name]}", file=sys.stderr)
                continue
            scores = {key: value for key, value in result.items() if key.startswith(f"{name}/")}
            step = [f"step {result['step']}"] if "step" in result else []
            print("  ".join([*step, *map(_shown, scores, scores.values())]))
            if files["json"] is not None:
                form = benchmark_form(arguments.kind, name, scores, config, str(found.path))
                _write(files["json"], name, form)
            if files["classes"] is not None:
                print(*worst_confusions(details[name]), sep="\n")
                _write(files["classes"], name, details[name])
    return 2 if failed else 0


def _check_file(option: str, file: str, names: list[str]) -> None:
    """Raise UserError unless each set has a file of its own, in a folder that is there."""
    require(
        len(names) == 1 or DATASET in file,
        f"{option} {file}: {len(names)} sets ({', '.join(names)}) want a file each; put {DATASET} into its name",
    )
    for name in names:
        folder = os.path.dirname(os.path.abspath(file.replace(DATASET, name)))
        require(os.path.isdir(folder), f"{option} {file}: {folder!r} is no folder; make it first")


def _write(file: str, name: str, content: dict[str, Any]) -> None:
    write_file(file.replace(DATASET, name), json.dumps(content, indent=2) + "\n")


def benchmark_form(kind: str, name: str, scores: dict[str, float], config: Config, checkpoint: str) -> dict[str, Any]:
    """The scores of a set as CLIP_benchmark writes them, so that `clip_benchmark build` takes ours beside theirs.

    Below five classes it has no top-5: NaN there, null here, for JSON has no NaN.
    """
    its = config.eval.evaluations()[name]
    files = its.urls
    if isinstance(its, ZeroShot):
        files = its.folder or its.urls or its.wds
        metrics = {
            "acc1": scores[f"{name}/top1"],
            "acc5": scores[f"{name}/top5"] if scores[f"{name}/classes"] >= 5 else None,
            "mean_per_class_recall": scores[f"{name}/mean_per_class_recall"],
        }
    else:
        ways = {"image_retrieval_recall": "text_to_image", "text_retrieval_recall": "image_to_text"}
        metrics = {f"{theirs}@{k}": scores[f"{name}/{ours}_r{k}"] for theirs, ours in ways.items() for k in (1, 5, 10)}
    return {
        "dataset": name if name != kind else files,
        "model": config.model.name or "model.vision, model.text",
        "pretrained": checkpoint,
        "task": TASKS[kind],
        "metrics": metrics,
        "language": "en",
    }


def _shown(name: str, value: float) -> str:
    return f"{name} {value:.4f}" if isinstance(value, float) else f"{name} {value}"
