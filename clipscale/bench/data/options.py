"""The words of `clipscale bench data`, checked before torch is imported.

options = data_options(arguments)        # UserError: which word, the rule, and what to write instead
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

from clipscale.bench.common.words import add_output_arguments, file_name, one_of, parse_size, positive, several, whole
from clipscale.errors import UserError, require
from clipscale.paths import path_option, shards_option

PARTS = ("speed", "stages", "transport", "index", "order")
_MODEL_RATES = "500,1000,2000,4000"


@dataclass(frozen=True)
class DataBench:
    urls: str | None  # None: shards of synthetic photos
    samples: int  # of those
    parts: tuple[str, ...]
    image_size: int
    batch: int  # of the open_clip recipe
    workers: int | None  # decoding processes of the recipe, threads of ours; None: one a core
    rounds: int
    seconds: float  # of one turn
    model_rates: dict[str, float]  # name -> images a second that one GPU takes
    soak: int  # samples; 0: no soak
    check: bool
    cache_dir: str | None
    output: str
    name: str | None


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Every word but a path is taken as text and checked by `data_options`, so that a mistake is one line."""

    def add(option: str, default: str | None, what: str, metavar: str, read: Callable[[str], str] = str) -> None:
        parser.add_argument(option, default=default, help=what, metavar=metavar, type=read)

    add(
        "--urls",
        None,
        "shards to read; default: synthetic photos, made once in the cache folder",
        "SHARDS",
        shards_option,
    )
    add("--samples", "8k", "how many synthetic photos; default: 8k, 350 MB", "N")
    add("--parts", ",".join(PARTS), f"of {', '.join(PARTS)}, or none; default: all", "P,...")
    add("--image-size", "224", "side of a training picture; default: 224", "S")
    add("--batch", "64", "of the open_clip recipe; default: 64, as open_clip's", "B")
    add("--workers", None, "processes of the recipe, threads of ours; default: one a core", "N")
    add("--rounds", "5", "turns of each contestant; default: 5", "N")
    add("--seconds", "6", "of a turn; default: 6", "S")
    add("--model-rate", _MODEL_RATES, f"images/s that a GPU takes, or name=images/s; default: {_MODEL_RATES}", "R,...")
    add("--soak", "0", "also pass so many tiny samples through the loader and watch its memory, e.g. 2m", "N")
    parser.add_argument("--check", action="store_true", help="exit with status 1 if a bar is not reached")
    where = "where synthetic shards go; default: the user's cache folder for clipscale"
    add("--cache-dir", None, where, "FOLDER", path_option)
    add_output_arguments(parser, "data")


def data_options(arguments: argparse.Namespace) -> DataBench:
    """UserError for a word that is not what its option takes."""
    parts = () if arguments.parts == "none" else several("--parts", arguments.parts, one_of(PARTS))
    soak = parse_size("--soak", arguments.soak)
    require(bool(parts) or soak > 0, "--parts=none without --soak: there is nothing to measure; name a part")
    if arguments.check:
        missing = [part for part in ("speed", "transport") if part not in parts]
        require(not missing, f"--check needs the parts speed and transport; add {', '.join(missing)} to --parts")
    samples = parse_size("--samples", arguments.samples)
    require(samples >= 16, f"--samples={arguments.samples}: at least 16 are needed")
    return DataBench(
        urls=arguments.urls,
        samples=samples,
        parts=parts,
        image_size=whole("--image-size", arguments.image_size, minimum=8),
        batch=whole("--batch", arguments.batch, minimum=1),
        workers=None if arguments.workers is None else whole("--workers", arguments.workers, minimum=1),
        rounds=whole("--rounds", arguments.rounds, minimum=1),
        seconds=positive("--seconds", arguments.seconds),
        model_rates=dict(several("--model-rate", arguments.model_rate, _model_rate)),
        soak=soak,
        check=arguments.check,
        cache_dir=arguments.cache_dir,
        output=arguments.output,
        name=file_name(arguments.name),
    )


def _model_rate(option: str, word: str) -> tuple[str, float]:
    """'vit-b32=3000' or '3000' -> name, images a second."""
    name, _, rate = word.rpartition("=")
    try:
        return name.strip() or f"{rate.strip()} images/s", positive(option, rate)
    except UserError as error:
        raise UserError(f"{option}={word}: must be images/s above 0, or name=images/s") from error
