"""The door of `clipscale bench` for the command line. Nothing here imports torch until a benchmark runs.

parser = argparse.ArgumentParser()
add_bench_arguments(parser)
run_bench(parser.parse_args(["loss", "--batches", "256"]), ["bench", "loss", "--batches", "256"])    # the exit status
"""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Sequence

from clipscale.bench.data.options import add_data_arguments, data_options
from clipscale.bench.loss.options import add_loss_arguments, loss_options

_LOSS_EXAMPLES = """\
  clipscale bench loss
  clipscale bench loss --peers --batches 16k,64k,256k --widths 768 --precisions fp16,bf16
  clipscale bench loss --ranks 4 --batches 64k
  torchrun --nproc-per-node 8 -m clipscale bench loss --batches 256k,1m
"""
_DATA_EXAMPLES = """\
  clipscale bench data --check
  clipscale bench data --urls 'shards/{0000..0009}.tar' --parts speed,stages --model-rate vit-b32=3000
"""
_PLOT_EXAMPLES = """\
  clipscale bench plot bench-results/loss-nvidia-h200.json
"""


def add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    """The sub-commands loss, data and plot, with examples in their epilogs and in the parser's own."""
    _show_examples(parser, _LOSS_EXAMPLES + _DATA_EXAMPLES + _PLOT_EXAMPLES)
    subjects = parser.add_subparsers(dest="subject", required=True, metavar="SUBJECT")

    def subject(name: str, what: str, examples: str) -> argparse.ArgumentParser:
        added = subjects.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.")
        _show_examples(added, examples)
        return added

    add_loss_arguments(subject("loss", "the contrastive loss alone, beside its peers", _LOSS_EXAMPLES))
    add_data_arguments(subject("data", "the way of pictures to the training process", _DATA_EXAMPLES))
    plot = subject("plot", "draw the pictures of a result again", _PLOT_EXAMPLES)
    plot.add_argument("result", metavar="RESULT.json", help="what clipscale bench loss or data wrote")


def run_bench(arguments: argparse.Namespace, words: Sequence[str]) -> int:
    """What `add_bench_arguments` has parsed; the exit status. `words`: all that was typed behind `clipscale`, which a
    result records. UserError for what does not fit together, before torch is imported where that can be told."""
    if arguments.subject == "plot":
        from clipscale.bench.redraw import redraw

        print(*redraw(arguments.result))
        return 0
    if arguments.subject == "data":
        chosen = data_options(arguments)
        from clipscale.bench.data.bench import bench_data

        return bench_data(chosen, shlex.join(["clipscale", *words]))
    options = loss_options(arguments)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    start = ["torchrun", "--nproc-per-node", str(ranks), "-m"] if ranks > 1 else []
    from clipscale.bench.loss.bench import bench_loss

    return bench_loss(options, shlex.join([*start, "clipscale", *words]))


def _show_examples(parser: argparse.ArgumentParser, examples: str) -> None:
    parser.epilog = f"examples:\n{examples}"
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
