"""What the words on the command line are made of, checked one by one; and the options that every benchmark has.

parse_size("--batches", "64k")           # 65536; UserError for 64x: which word, the rule, and what to write instead
size_name(65536)                         # 64k
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from typing import TypeVar

from clipscale.errors import UserError, require
from clipscale.paths import path_option

RESULTS = "bench-results"  # where results go if nothing else is said: a folder where one stands, made when needed
_UNITS = {"": 1, "k": 2**10, "m": 2**20}

T = TypeVar("T")


def add_output_arguments(parser: argparse.ArgumentParser, subject: str) -> None:
    """--output and --name. `subject`: what the usual name of a result begins with."""
    parser.add_argument(
        "--output",
        default=RESULTS,
        type=path_option,
        help=f"folder of the results; default: {RESULTS}",
        metavar="FOLDER",
    )
    parser.add_argument(
        "--name", help=f"file name of the results, without ending; default: {subject}-<device>", metavar="NAME"
    )


def parse_size(option: str, word: str) -> int:
    """65536, 64k or 1m -> a number (k is 1024, m is 1024 x 1024)."""
    match = re.fullmatch(r"(\d+)([km]?)", word.strip().lower())
    require(
        match is not None,
        f"{option}={word}: not a size; write a whole number such as 65536, or 64k, or 1m (k = 1024, m = 1024 k)",
    )
    return int(match[1]) * _UNITS[match[2]]


def size_name(number: int) -> str:
    """The shortest of 65536, 64k, 1m that says the same: what `parse_size` reads back."""
    for unit in ("m", "k"):
        if number and number % _UNITS[unit] == 0:
            return f"{number // _UNITS[unit]}{unit}"
    return str(number)


def file_name(name: str | None) -> str | None:
    """What --name takes: where it goes is said by --output."""
    require(
        name is None or re.fullmatch(r"[\w.+-]+", name) is not None,
        f"--name={name}: a file name of letters, digits, '.', '_', '+', '-' is wanted; say where by --output",
    )
    return name


def several(option: str, text: str, parse: Callable[[str, str], T]) -> tuple[T, ...]:
    """Each once, in the order given."""
    return tuple(dict.fromkeys(parse(option, word) for word in text.split(",")))


def names(option: str, text: str) -> tuple[str, ...]:
    """Several words by commas, none of them empty."""
    found = several(option, text, lambda _, word: word.strip())
    require(all(found), f"{option}={text}: an empty name; give names by commas")
    return found


def one_of(choices: tuple[str, ...]) -> Callable[[str, str], str]:
    def parse(option: str, word: str) -> str:
        require(word in choices, f"{option}={word}: unknown; choose from {', '.join(choices)}")
        return word

    return parse


def whole(option: str, word: str, *, minimum: int) -> int:
    require(
        re.fullmatch(r"\d+", word.strip()) is not None and int(word) >= minimum,
        f"{option}={word}: must be a whole number of at least {minimum}",
    )
    return int(word)


def positive(option: str, word: str) -> float:
    try:
        number = float(word)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        raise UserError(f"{option}={word}: must be a number above 0")
    return number
