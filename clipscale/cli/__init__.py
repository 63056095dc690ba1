"""The command line: `clipscale train`, `eval`, `index`, ...; one file a command, and this one that finds it.

    main(["train", "quickstart"])        # -> cli/train.py: add_arguments(parser), then run(arguments)

A command's module is imported only when it is called, and torch only once its arguments are known to be right, so that
help and mistakes answer at once. A module holds `EXAMPLES` (for its help), `LEFT` (what Ctrl-C leaves behind),
`add_arguments(parser)` and `run(arguments, words)`, which gives the exit status; `words` are the command line's.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress
from types import ModuleType

from clipscale import __version__
from clipscale.config.recipes import list_recipes
from clipscale.errors import INTERRUPTED, RESTART, Interrupted, RestartError, SharedError, UserError, reason
from clipscale.escape import one_line
from clipscale.files import write_file
from clipscale.launch import under_launcher
from clipscale.telemetry.growing import FULL
from clipscale.tell import listening
from clipscale.upstream.open_clip_flags import explain
from clipscale.words import did_you_mean

COMMANDS = {
    "train": "train a model, or resume its training",
    "plan": "tell what a run will need: memory, time, cores, and what limits it",
    "eval": "evaluate a checkpoint",
    "export": "write a model as open_clip, transformers or ONNX has it",
    "status": "tell where a run stands: its step, checkpoint, faults and goodput",
    "index": "index shards ahead of training, and count what is usable",
    "shards": "make, check and look at shards",
    "recipes": "list the configs that come with clipscale",
    "config": "show every setting: its default, its type and what it is for",
    "bench": "measure speed, memory and exactness on this machine",
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    words = sys.argv[1:] if argv is None else argv
    command, arguments = parse(words)
    # Decode threads share the cores with OpenMP's workers, which must not spin for long while they wait: on busy cores
    # the default makes steps several times slower. Read when torch is first imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    try:
        with listening(_hear):
            return command.run(arguments, words)
    except UserError as error:
        return _fail(error)
    except KeyboardInterrupt as stop:
        print(f"clipscale: interrupted; {stop.args[0] if stop.args else command.LEFT}", file=sys.stderr)
        return 130
    except Interrupted as stop:
        if rank() == 0:
            at_once = f"{stop.why}: ended at once, for no step was under way"
            print(f"clipscale: {stop.left or at_once}", file=sys.stderr)
        return 130 if stop.why == "SIGINT" else 0 if stop.left and under_launcher() else INTERRUPTED
    except RestartError as error:
        return _fail(error, RESTART)
    except Exception as error:
        if isinstance(error, OSError) and (error.filename is not None or error.errno in FULL):  # what a person can mend
            return _fail(UserError(reason(error)))
        _record(traceback.format_exc())
        raise


def parse(words: list[str]) -> tuple[ModuleType, argparse.Namespace]:
    """The command's module and its arguments. The parser knows every command by name, and the arguments of this one."""
    name = next((word for word in words if not word.startswith("-")), None)
    command = importlib.import_module(f"clipscale.cli.{name}") if name in COMMANDS else None
    parser = Parser(
        prog="clipscale",
        description="CLIP image-text pretraining at very large batches: exact, in constant memory.",
        epilog="start here:\n  clipscale train quickstart",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"clipscale {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for other, what in COMMANDS.items():
        its_parser = add_command(commands, other, what, command.EXAMPLES if other == name else None)
        if other == name:
            command.add_arguments(its_parser)
    if name is not None and command is None and name in list_recipes():
        parser.error(f"{name!r} is a recipe: `clipscale train {name}` trains it")
    arguments, unknown = parser.parse_known_args(words)
    settings = vars(arguments).get("settings", vars(arguments).get("config"))
    if settings is not None:  # argparse takes them in one place, and not behind options
        settings += [word for word in unknown if _is_setting(word)]
        unknown = [word for word in unknown if not _is_setting(word)]
    if unknown:
        known = dict.fromkeys(_options(parser))
        hints = dict.fromkeys(
            (explain(word) if name == "train" else "") or did_you_mean(word.partition("=")[0], known)
            for word in unknown
            if word.startswith("-")
        )
        hints.pop("", None)
        parser.error("; ".join([f"unrecognized arguments: {' '.join(unknown)}", *hints]))
    return command, arguments


def _is_setting(word: str) -> bool:
    return "=" in word and not word.startswith("-")


def _options(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Of this parser and those of its commands."""
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for its_parser in action.choices.values():
                yield from _options(its_parser)


class Parser(argparse.ArgumentParser):
    """Names the nearest command where a word is none."""

    def _check_value(self, action: argparse.Action, value: str) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            if hint := did_you_mean(str(value), map(str, action.choices)):
                error.message += f"; {hint}"
            raise


def add_command(
    commands: argparse._SubParsersAction, name: str, what: str, examples: str | None
) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=what,
        description=what[0].upper() + what[1:] + ".",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def rank() -> int:
    """Of this process, before any group of ranks is formed."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))


def _hear(line: str, every_rank: bool) -> None:
    if rank() == 0 or every_rank:
        print(f"clipscale: {line}", file=sys.stderr)


def _fail(error: Exception, status: int = 2) -> int:
    """One line; an error that every rank raises alike is told once."""
    line = one_line(error)
    _record(f"clipscale: error: {line}")
    if status == 2 and (place := os.environ.get("CLIPSCALE_MARKER")):  # of a batch script, which goes by this
        with suppress(OSError):
            write_file(f"{place}.refused", line + "\n")
    if rank() == 0:
        print(f"clipscale: error: {line}", file=sys.stderr)
    elif not isinstance(error, SharedError):
        print(f"clipscale: error on rank {rank()}: {line}", file=sys.stderr)
    return status


def _record(message: str) -> None:
    """Under torchrun: for its summary of failed ranks, which has a line of its own for each instead of ours else."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        details = {"py_callstack": message, "timestamp": str(int(time.time()))}
        with suppress(OSError):
            write_file(file, json.dumps({"message": {"message": message, "extraInfo": details}}), sync=False)
