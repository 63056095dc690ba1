"""The command line: `clipscale train`, `clipscale eval zeroshot`, `clipscale index`, `clipscale bench`.

Torch is imported only once the arguments are known to be right, so that help and mistakes answer at once.
"""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from collections.abc import Sequence

from clipscale import __version__
from clipscale.cli.index import add_index_arguments, index_settings, print_report
from clipscale.config_load import dump_config, load_config
from clipscale.errors import SharedError, UserError
from clipscale.tell import listening

_TRAIN_EXAMPLES = """\
examples:
  clipscale train configs/quickstart.yaml
  clipscale train configs/quickstart.yaml train.global_batch=4096 run.dir=runs/large-batch
  clipscale train configs/quickstart.yaml --print-config
  torchrun --nproc-per-node 8 -m clipscale train configs/vit_b32.yaml data.sources.mine.urls='shards/{0000..0999}.tar'

Running the same command again resumes from the newest checkpoint in run.dir (resume=auto).
"""
_ZEROSHOT_EXAMPLES = """\
examples:
  clipscale eval zeroshot runs/quickstart
  clipscale eval zeroshot runs/b32/checkpoints/step-000010000 eval.zeroshot.folder=imagenet/val
  clipscale eval zeroshot runs/b32 eval.zeroshot.urls='cifar/test-*.tar' \\
      eval.zeroshot.classnames=cifar/classnames.txt eval.zeroshot.templates=configs/templates/photo.txt
"""
_INDEX_EXAMPLES = """\
examples:
  clipscale index 'shards/{0000..0999}.tar'
  clipscale index 'cc3m/*.tar' 'cc12m/*.tar' --index-dir index --check decode --jobs 16
  clipscale index 'laion/{00000..41454}.tar' --caption json:caption --min-side 128 --max-aspect 3
  clipscale index 'datacomp/*.tar' --score-field clip_l14_similarity_score --min-score 0.3
"""
_RESUMES = "the same command resumes from the newest checkpoint"


def build_parser(words: Sequence[str] = ()) -> argparse.ArgumentParser:
    """For what is typed: a command's own options may be there only where `words` begin with it."""
    parser = argparse.ArgumentParser(
        prog="clipscale",
        description="CLIP image-text pretraining at very large batches: exact, in constant memory.",
        epilog="start here:\n  clipscale train configs/quickstart.yaml",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"clipscale {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = _command(commands, "train", "train a model, or resume its training", _TRAIN_EXAMPLES)
    train.add_argument("config", nargs="+", metavar="CONFIG.yaml|key=value", help="merged from left to right")
    train.add_argument("--print-config", action="store_true", help="show the resolved configuration and stop")

    evaluate = _command(commands, "eval", "evaluate a checkpoint", _ZEROSHOT_EXAMPLES)
    kinds = evaluate.add_subparsers(dest="kind", required=True, metavar="KIND")
    zeroshot = _command(kinds, "zeroshot", "zero-shot classification, top-1 and top-5", _ZEROSHOT_EXAMPLES)
    zeroshot.add_argument("checkpoint", help="a run's folder (its newest checkpoint) or a checkpoint's")
    zeroshot.add_argument("settings", nargs="*", metavar="key=value", help="changes to the checkpoint's own config")

    index = _command(commands, "index", "index shards ahead of training, and count what is usable", _INDEX_EXAMPLES)
    add_index_arguments(index)

    bench = _command(commands, "bench", "measure speed, memory and exactness on this machine", "")
    if "bench" in words[:1]:
        from clipscale.bench.command import add_bench_arguments

        add_bench_arguments(bench)
    return parser


def _command(commands: argparse._SubParsersAction, name: str, what: str, examples: str) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=what,
        description=what[0].upper() + what[1:] + ".",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    words = sys.argv[1:] if argv is None else argv
    arguments = build_parser(words).parse_args(words)
    # Decode threads share the cores with OpenMP's workers, which must not spin for long while they wait: on busy cores
    # the default makes steps several times slower. Read when torch is first imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    try:
        with listening(_hear):
            if arguments.command == "train":
                return _train(arguments)
            if arguments.command == "eval":
                return _zeroshot(arguments)
            if arguments.command == "bench":
                from clipscale.bench.command import run_bench

                return run_bench(arguments, words)
            return _index(arguments)
    except UserError as error:
        return _fail(error)
    except KeyboardInterrupt:
        left = "the cases already measured are written" if arguments.command == "bench" else _RESUMES
        print(f"clipscale: interrupted; {left}", file=sys.stderr)
        return 130


def _train(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.config)
    if arguments.print_config:
        print(dump_config(config), end="")
        return 0
    from clipscale.train import train

    summary = train(config)
    if _rank() == 0:
        print("\n".join(summary))
    return 0


def _zeroshot(arguments: argparse.Namespace) -> int:
    from clipscale.evaluate import evaluate_checkpoint

    result = evaluate_checkpoint(arguments.checkpoint, arguments.settings)
    if _rank() == 0:
        print(
            "  ".join(f"{name} {value:.4f}" if "/top" in name else f"{name} {value}" for name, value in result.items())
        )
    return 0


def _index(arguments: argparse.Namespace) -> int:
    source, data, need = index_settings(arguments)
    from clipscale.data.source import open_source
    from clipscale.progress import track

    print_report(open_source("index", source, data, need=need, track=track, ahead=True))
    return 0


def _hear(line: str, every_rank: bool) -> None:
    if _rank() == 0 or every_rank:
        print(f"clipscale: {line}", file=sys.stderr)


def _fail(error: UserError) -> int:
    """One line; an error that every rank raises alike is told once."""
    line = textwrap.shorten(str(error), 2000, placeholder=" ...")
    if _rank() == 0:
        print(f"clipscale: error: {line}", file=sys.stderr)
    elif not isinstance(error, SharedError):
        print(f"clipscale: error on rank {_rank()}: {line}", file=sys.stderr)
    return 2


def _rank() -> int:
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
