"""`clipscale export`: a run, a checkpoint or any weights as a folder that others open."""

from __future__ import annotations

import argparse

from clipscale.export.check import FORMATS, check_export
from clipscale.paths import path_option, weights_option
from clipscale.tell import say
from clipscale.weights.target import TARGETS, find_target

EXAMPLES = """\
examples:
  clipscale export runs/b32 --format open_clip --output exported/b32
  clipscale export runs/b32/checkpoints/step-000010000 --format transformers --output exported/b32-hf
  clipscale export epoch_32.pt model.name=ViT-B-16 --format onnx --output exported/b16-onnx
"""
LEFT = "nothing was written"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "weights",
        type=weights_option,
        help=f"{TARGETS}, to be exported",
    )
    parser.add_argument("settings", nargs="*", metavar="key=value", help="changes to its config, such as the model's")
    parser.add_argument("--ema", action="store_true", help="of a run or checkpoint: the average of its weights")
    parser.add_argument("--format", choices=FORMATS, required=True, help="what is to open it")
    parser.add_argument("--output", type=path_option, required=True, metavar="FOLDER", help="a new folder")


def run(arguments: argparse.Namespace, words: list[str]) -> int:
    check_export(arguments.format, arguments.output)
    found, config = find_target(arguments.weights, arguments.settings, ema=arguments.ema)
    from clipscale.export.export import export_model

    for line in export_model(found, config, arguments.format, arguments.output):
        say(line)
    return 0
