"""`clipscale config [KEY]`: every setting, or those of a section, or one."""

from __future__ import annotations

import argparse
import textwrap

from clipscale.config.help import WIDTH, Section, find_settings

EXAMPLES = """\
examples:
  clipscale config
  clipscale config data.fetch
  clipscale config train.global_batch

A recipe's own values: clipscale train RECIPE --print-config
"""
LEFT = "nothing was written"
_NARROWEST = 32  # columns for a comment; one that would have fewer goes below its setting


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("key", nargs="?", default="", metavar="KEY", help="a section or a setting; default: all")


def run(arguments: argparse.Namespace, words: list[str]) -> int:
    print("\n\n".join(map(_page, find_settings(arguments.key))))
    return 0


def _page(section: Section) -> str:
    """A heading and a line a setting: its key, default, type and comment."""
    heading = ": ".join(filter(None, (section.key, section.about)))
    rows = [
        (f"  {setting.key}", f"= {setting.default}" if setting.default else "must be set", f"{setting.type}")
        for setting in section.settings
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = textwrap.wrap(heading, WIDTH)
    for row, setting in zip(rows, section.settings, strict=True):
        start = "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)) + "  "
        if WIDTH - len(start) < _NARROWEST:
            lines.append(start)
            start = " " * 6
        lines += textwrap.wrap(setting.comment, WIDTH, initial_indent=start, subsequent_indent=" " * len(start)) or [
            start
        ]
    return "\n".join(line.rstrip() for line in lines)
