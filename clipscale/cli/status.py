"""`clipscale status RUN`: where a run stands, from its folder."""

from __future__ import annotations

import argparse
import json

from clipscale.paths import path_option
from clipscale.status import read_status, status_lines
from clipscale.tell import say

EXAMPLES = """\
examples:
  clipscale status runs/mine
  clipscale status runs/mine --json

It reads the run's folder alone, while the run goes on and after it ended.
"""
LEFT = "nothing was written"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=path_option, metavar="RUN", help="a run's folder (run.dir)")
    parser.add_argument("--json", action="store_true", help="one JSON object, for scripts")


def run(arguments: argparse.Namespace, words: list[str]) -> int:
    status = read_status(arguments.run)
    if arguments.json:
        print(json.dumps(status, indent=1))
        return 0
    for line in status_lines(status):
        say(line)
    return 0
