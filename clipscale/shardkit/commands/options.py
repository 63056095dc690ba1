"""Options that several commands have, and the paths and numbers they take.

parser.add_argument("--output", type=path)            # '~/shards' -> Path("/u/me/shards")
parser.add_argument("--samples", type=positive)       # '0' is a mistake that argparse tells
add_jobs(parser)                                      # --jobs
add_reading(parser)                                   # --caption, --max-pixels, --cache-dir
captions_of(parser.parse_args())                      # ('txt',), or those that --caption named
"""

from __future__ import annotations

import argparse
from pathlib import Path

from clipscale.config.data import EXTRA, Data, require_member
from clipscale.errors import require
from clipscale.paths import path_option
from clipscale.pool import cores


def path(text: str) -> Path:
    return Path(path_option(text))


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return int(text)


def natural(text: str) -> int:
    if not 0 <= int(text) < 2**64:
        raise argparse.ArgumentTypeError(f"{text} is not 0 to 2^64 - 1")
    return int(text)


def quality(text: str) -> int:
    if not 1 <= int(text) <= 100:
        raise argparse.ArgumentTypeError(f"{text} is not 1 to 100")
    return int(text)


def add_jobs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--jobs", type=positive, default=cores(), metavar="N", help="processes, default: the cores (here %(default)s)"
    )


def add_max_pixels(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-pixels", type=positive, default=Data.max_pixels, metavar="N", help="refuse larger; default: %(default)s"
    )


def add_caption(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--caption",
        action="append",
        metavar="WHERE",
        help="a member's suffix, or json:<field>; default: txt; each of several, in the order of caption_weights",
    )


def captions_of(arguments: argparse.Namespace) -> tuple[str, ...]:
    """Raises UserError for one that can be nowhere."""
    captions = tuple(arguments.caption or ("txt",))
    for caption in captions:
        require_member("--caption", caption)
        require(not caption.startswith(EXTRA), f"--caption={caption} lies in extra shards, which are no samples alone")
    return captions


def add_reading(parser: argparse.ArgumentParser) -> None:
    """How a command that looks into shards reads them."""
    add = parser.add_argument
    add_caption(parser)
    add_max_pixels(parser)
    add(
        "--cache-dir", type=path_option, metavar="DIR", help="copies of remote shards; default: the user's cache folder"
    )
