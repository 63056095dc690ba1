"""The words of `clipscale bench gpu`, checked before torch is imported.

options = gpu_options(arguments)         # UserError: which word, the rule, and what to write instead
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from clipscale.bench.common.words import add_output_arguments, file_name, one_of, positive, several
from clipscale.bench.gpu.parts import MINUTES, PARTS

DEVICES = ("auto", "cuda", "cpu")


@dataclass(frozen=True)
class GpuBench:
    minutes: float
    only: tuple[str, ...]  # names of parts, in the order of `parts.PARTS`
    device: str
    output: str
    name: str | None


def add_gpu_arguments(parser: argparse.ArgumentParser) -> None:
    """Every word but a path is taken as text and checked by `gpu_options`, so that a mistake is one line."""
    usual = f"{MINUTES:g}"
    parser.add_argument("--minutes", default=usual, help=f"for all parts together; default: {usual}", metavar="M")
    parser.add_argument("--only", help="these parts alone; default: all of --list", metavar="NAME,...")
    parser.add_argument("--list", action="store_true", help="name the parts, and do nothing else")
    what = f"{', '.join(DEVICES)}; on a CPU every part is tiny, and shows only that it runs; default: auto"
    parser.add_argument("--device", default="auto", help=what, metavar="DEVICE")
    add_output_arguments(parser, "gpu")


def gpu_options(arguments: argparse.Namespace) -> GpuBench:
    """UserError for a word that is not what its option takes."""
    names = tuple(part.name for part in PARTS)
    asked = names if arguments.only is None else several("--only", arguments.only, one_of(names))
    return GpuBench(
        minutes=positive("--minutes", arguments.minutes),
        only=tuple(name for name in names if name in asked),
        device=one_of(DEVICES)("--device", arguments.device),
        output=arguments.output,
        name=file_name(arguments.name),
    )


def listed() -> str:
    """The parts, a line each, in the order in which they run."""
    width = max(len(part.name) for part in PARTS)
    return "\n".join(f"{part.name:{width}}  {part.share_seconds:4} s  {part.what}" for part in PARTS)
