"""The words of `clipscale bench step`, checked before torch is imported.

options = step_options(arguments)        # UserError: which word, the rule, and what to write instead
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

from clipscale.bench.common.words import (
    add_output_arguments,
    file_name,
    names,
    one_of,
    parse_size,
    positive,
    several,
    whole,
)
from clipscale.errors import require
from clipscale.paths import path_option

PRECISIONS = ("auto", "fp32", "bf16", "fp16")
DEVICES = ("auto", "cpu", "cuda")
SMALL = "small"


@dataclass(frozen=True)
class StepBench:
    """What to measure; None stands for the device's default (`bench.py`)."""

    models: tuple[str, ...] | None  # open_clip names, recipes, or SMALL
    batches: tuple[int, ...] | None
    image_chunk: int | None
    text_chunk: int | None
    keep_bytes: int | str  # of kept graphs; auto: as much as is free
    precision: str
    captions: str | None  # file of a histogram; None: clipscale's own
    peers: bool
    parity: bool
    towers: bool  # the towers alone, in place of steps
    compiled: bool  # the towers' blocks by torch.compile too
    seconds: float  # for the repeats of one contestant in one case
    limit_seconds: float  # a contestant predicted to take longer for one step is skipped
    seed: int
    device: str
    output: str
    name: str | None


def add_step_arguments(parser: argparse.ArgumentParser) -> None:
    """Every word but a path is taken as text and checked by `step_options`, so that a mistake is one line."""

    def add(option: str, default: str | None, what: str, metavar: str, read: Callable[[str], str] = str) -> None:
        parser.add_argument(option, default=default, help=what, metavar=metavar, type=read)

    add("--models", None, f"open_clip names, recipes, or {SMALL}; default: {SMALL} on a CPU, ViT-B-32 on CUDA", "M,...")
    add("--batches", None, "pairs of a step: 2048, 2k, 32k; several by commas; default: by device", "B,...")
    add("--image-chunk", None, "pictures at a time, and open_clip's batch; default: 64 on a CPU, 256 on CUDA", "N")
    add("--text-chunk", None, "captions of full length at a time; default: 64 on a CPU, 1024 on CUDA", "N")
    add("--keep-bytes", "auto", "what kept graphs may take: auto (what is free), 0, or bytes such as 512m", "N")
    add("--precision", "auto", f"{', '.join(PRECISIONS)}; default: auto, bf16 on CUDA and fp32 on a CPU", "P")
    add("--captions", None, "JSON with a histogram of tokens a caption; default: clipscale's own", "FILE", path_option)
    parser.add_argument("--peers", action="store_true", help="also measure open_clip's own training loop")
    parser.add_argument("--parity", action="store_true", help="also compare the losses of 20 steps with open_clip's")
    parser.add_argument(
        "--towers", action="store_true", help="the towers alone, each switch beside open_clip's forward"
    )
    parser.add_argument(
        "--compiled", action="store_true", help="with --towers: also by torch.compile, minutes at first"
    )
    add("--seconds", "20", "for the repeats of a contestant at one size; default: 20", "S")
    add("--limit-seconds", "120", "skip what is predicted to take longer for a step; default: 120", "S")
    add("--seed", "0", "of weights, pictures and captions; default: 0", "N")
    add("--device", "auto", f"{', '.join(DEVICES)}; default: auto, a GPU where there is one", "DEVICE")
    add_output_arguments(parser, "step")


def step_options(arguments: argparse.Namespace) -> StepBench:
    """UserError for a word that is not what its option takes."""
    batches = None if arguments.batches is None else several("--batches", arguments.batches, parse_size)
    for batch in batches or ():
        require(batch >= 2, f"--batches={arguments.batches}: a batch of {batch} is too small; give at least 2 pairs")
    for option, given in (("--peers", arguments.peers), ("--parity", arguments.parity), ("--batches", batches)):
        require(not (arguments.towers and given), f"--towers measures no steps; leave {option} out, or --towers")
    require(
        arguments.towers or not arguments.compiled, "--compiled is for the towers alone; add --towers, or leave it out"
    )
    return StepBench(
        models=None if arguments.models is None else names("--models", arguments.models),
        batches=batches and tuple(sorted(batches)),
        image_chunk=_chunk("--image-chunk", arguments.image_chunk),
        text_chunk=_chunk("--text-chunk", arguments.text_chunk),
        keep_bytes="auto" if arguments.keep_bytes == "auto" else parse_size("--keep-bytes", arguments.keep_bytes),
        precision=one_of(PRECISIONS)("--precision", arguments.precision),
        captions=arguments.captions,
        peers=arguments.peers,
        parity=arguments.parity,
        towers=arguments.towers,
        compiled=arguments.compiled,
        seconds=positive("--seconds", arguments.seconds),
        limit_seconds=positive("--limit-seconds", arguments.limit_seconds),
        seed=whole("--seed", arguments.seed, minimum=0),
        device=one_of(DEVICES)("--device", arguments.device),
        output=arguments.output,
        name=file_name(arguments.name),
    )


def _chunk(option: str, word: str | None) -> int | None:
    return None if word is None else whole(option, word, minimum=1)
