"""The words of `clipscale bench loss`, checked before torch is imported.

options = loss_options(arguments)        # UserError: which word, the rule, and what to write instead
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from clipscale.bench.common.words import add_output_arguments, file_name, one_of, parse_size, positive, several, whole
from clipscale.errors import require

PRECISIONS = ("auto", "fp16", "bf16", "tf32", "fp32", "fp64")
ENGINES = ("auto", "triton", "torch")
DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class LossBench:
    """What to measure; None stands for the device's default (`bench.py`)."""

    batches: tuple[int, ...] | None
    widths: tuple[int, ...]
    precisions: tuple[str, ...]
    engines: tuple[str, ...]
    tile: int | None
    ranks: int  # simulated in this process; 1: none
    scale: float  # the factor itself, CLIP's logit_scale.exp()
    peers: bool
    seconds: float  # for the repeats of one contestant in one case
    limit_seconds: float  # a contestant predicted to take longer for one turn is skipped
    error_limit: int | None  # largest batch whose errors are computed
    seed: int
    device: str
    output: str
    name: str | None


def add_loss_arguments(parser: argparse.ArgumentParser) -> None:
    """Every word is taken as text and checked by `loss_options`, so that a mistake is answered in one line."""

    def add(option: str, default: str | None, what: str, metavar: str) -> None:
        parser.add_argument(option, default=default, help=what, metavar=metavar)

    add("--batches", None, "pairs of all ranks: 65536, 64k, 1m; several by commas; default: by device", "B,...")
    add("--widths", "768", "width of an embedding; several by commas; default: 768", "D,...")
    add("--precisions", "auto", f"{', '.join(PRECISIONS)}; default: auto, fp16 on CUDA and fp32 on a CPU", "P,...")
    add("--engine", "auto", f"{', '.join(ENGINES)}; several by commas; default: auto", "E,...")
    add("--tile", None, "rows and columns of the logits at a time; default: the engine's", "N")
    add("--ranks", "1", "simulate so many ranks on the one device; under torchrun, leave it out", "R")
    add("--scale", "14.3", "logit scale, the factor itself; default: 14.3", "S")
    parser.add_argument("--peers", action="store_true", help="also measure what is installed of Inf-CL, memeff, ...")
    add("--seconds", "3", "for the repeats of a contestant at one size; default: 3", "S")
    add("--limit-seconds", "120", "skip what is predicted to take longer once; default: 120", "S")
    add("--error-limit", None, "largest batch to compute errors for; default: 256k on CUDA, 16k on a CPU", "B")
    add("--seed", "0", "of the embeddings; default: 0", "N")
    add("--device", "auto", f"{', '.join(DEVICES)}; default: auto, a GPU where there is one", "DEVICE")
    add_output_arguments(parser, "loss")


def loss_options(arguments: argparse.Namespace) -> LossBench:
    """UserError for a word that is not what its option takes."""
    ranks = whole("--ranks", arguments.ranks, minimum=1)
    batches = None if arguments.batches is None else several("--batches", arguments.batches, parse_size)
    for batch in batches or ():
        require(
            batch >= max(2, ranks),
            f"--batches={arguments.batches}: a batch of {batch} is too small; give at least 2 pairs, and one a rank",
        )
    return LossBench(
        batches=batches and tuple(sorted(batches)),
        widths=several("--widths", arguments.widths, lambda option, word: whole(option, word, minimum=1)),
        precisions=several("--precisions", arguments.precisions, one_of(PRECISIONS)),
        engines=several("--engine", arguments.engine, one_of(ENGINES)),
        tile=None if arguments.tile is None else whole("--tile", arguments.tile, minimum=1),
        ranks=ranks,
        scale=positive("--scale", arguments.scale),
        peers=arguments.peers,
        seconds=positive("--seconds", arguments.seconds),
        limit_seconds=positive("--limit-seconds", arguments.limit_seconds),
        error_limit=None if arguments.error_limit is None else parse_size("--error-limit", arguments.error_limit),
        seed=whole("--seed", arguments.seed, minimum=0),
        device=one_of(DEVICES)("--device", arguments.device),
        output=arguments.output,
        name=file_name(arguments.name),
    )
