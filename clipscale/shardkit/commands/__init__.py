"""What `clipscale shards` and the scripts of data_tools/ offer: one module a command, its options and what it prints.

    run_script(make, "make_shards.py")                # a script: arguments, work, exit status
    describe(parser, make, "clipscale shards make")   # the same options and texts for another parser
    make.run(parser.parse_args())                     # the work; raises UserError or OSError

A module holds `WHAT` (in a list of commands), `DESCRIPTION` and `EXAMPLES` (for its help; PROGRAM stands for what a
person types), `LEFT` (what Ctrl-C leaves behind), `add_arguments(parser)` and `run(arguments)`, which gives the exit
status. What needs torch is imported in `run` alone, once the arguments are known to be right, so that help and
mistakes answer at once.
"""

from __future__ import annotations

import argparse
import sys
from types import ModuleType

from clipscale.errors import UserError
from clipscale.escape import one_line
from clipscale.shardkit.commands import check, emoji, imagenet, inspect, make
from clipscale.tell import listening

# of `clipscale shards`
COMMANDS = {"make": make, "check": check, "inspect": inspect, "imagenet": imagenet, "emoji": emoji}


def describe(parser: argparse.ArgumentParser, command: ModuleType, program: str) -> None:
    """Give `parser` the command's texts and options. `program`: what a person types before them."""
    parser.description = command.DESCRIPTION
    parser.epilog = command.EXAMPLES.replace("PROGRAM", program)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    command.add_arguments(parser)


def run_script(command: ModuleType, script: str, words: list[str] | None = None) -> int:
    """The command's exit status; 2 after an error, told in one line; 130 after Ctrl-C.

    Args:
        script: the file in data_tools/.
        words: of the command line; None: this process's.
    """
    parser = argparse.ArgumentParser(prog=script)
    describe(parser, command, f"python data_tools/{script}")
    arguments = parser.parse_args(words)
    try:
        with listening(lambda line, _: print(f"{script}: {line}", file=sys.stderr)):
            return command.run(arguments)
    except (UserError, OSError) as error:
        print(f"{script}: error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{script}: interrupted, {command.LEFT}", file=sys.stderr)
        return 130
