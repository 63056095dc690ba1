"""The words of `clipscale bench eval`, checked before torch is imported.

options = eval_options(arguments)        # UserError: which word, the rule, and what to write instead
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from clipscale.bench.common.words import add_output_arguments, file_name, names, one_of, parse_size, whole
from clipscale.errors import require

DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class EvalBench:
    models: tuple[str, ...]  # open_clip names or recipes
    pictures: int
    batch: int
    threads: int  # that decode
    rounds: int
    device: str
    output: str
    name: str | None


def add_eval_arguments(parser: argparse.ArgumentParser) -> None:
    """Every word but a path is taken as text and checked by `eval_options`, so that a mistake is one line."""

    def add(option: str, default: str, what: str, metavar: str) -> None:
        parser.add_argument(option, default=default, help=f"{what}; default: {default}", metavar=metavar)

    add("--models", "ViT-B-32,quickstart", "open_clip names or recipes", "M,...")
    add("--pictures", "1k", "how many are evaluated in a round: 512, 1k, 50k", "N")
    add("--batch", "256", "pictures at once, as eval.zeroshot.batch", "N")
    add("--threads", "2", "that decode, as data.threads", "N")
    add("--rounds", "3", "evaluations of each model", "N")
    add("--device", "auto", f"{', '.join(DEVICES)}: auto is a GPU where there is one", "DEVICE")
    add_output_arguments(parser, "eval")


def eval_options(arguments: argparse.Namespace) -> EvalBench:
    """UserError for a word that is not what its option takes."""
    pictures = parse_size("--pictures", arguments.pictures)
    require(pictures >= 1, f"--pictures={arguments.pictures}: must be at least 1")
    return EvalBench(
        models=names("--models", arguments.models),
        pictures=pictures,
        batch=whole("--batch", arguments.batch, minimum=1),
        threads=whole("--threads", arguments.threads, minimum=1),
        rounds=whole("--rounds", arguments.rounds, minimum=1),
        device=one_of(DEVICES)("--device", arguments.device),
        output=arguments.output,
        name=file_name(arguments.name),
    )
