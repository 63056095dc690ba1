"""`clipscale bench loss|data|step|eval|gpu|plot`: what bench/ measures. Its options are read by this command alone."""

from __future__ import annotations

import argparse
import os
import shlex

from clipscale.bench.data.options import add_data_arguments, data_options
from clipscale.bench.eval.options import add_eval_arguments, eval_options
from clipscale.bench.gpu.options import add_gpu_arguments, gpu_options, listed
from clipscale.bench.loss.options import add_loss_arguments, loss_options
from clipscale.bench.step.options import add_step_arguments, step_options
from clipscale.cli import add_command
from clipscale.paths import path_option

_LOSS = """\
  clipscale bench loss
  clipscale bench loss --peers --batches 16k,64k,256k --widths 768 --precisions fp16,bf16
  clipscale bench loss --ranks 4 --batches 64k
  torchrun --nproc-per-node 8 -m clipscale bench loss --batches 256k,1m
"""
_DATA = """\
  clipscale bench data --check
  clipscale bench data --urls 'shards/{0000..0009}.tar' --parts speed,stages --model-rate vit-b32=3000
"""
_STEP = """\
  clipscale bench step --peers
  clipscale bench step --models ViT-B-32,ViT-L-14 --batches 4k,32k --peers --parity
  clipscale bench step --towers --models ViT-B-16 --image-chunk 8 --text-chunk 16
"""
_EVAL = """\
  clipscale bench eval
  clipscale bench eval --models ViT-L-14 --pictures 50k --threads 16
"""
_GPU = """\
  clipscale bench gpu --minutes 25
  clipscale bench gpu --only device,pieces,towers --minutes 5
"""
_PLOT = "  clipscale bench plot bench-results/loss-cpu.json\n"
EXAMPLES = f"examples:\n{_LOSS}{_DATA}{_STEP}{_EVAL}{_GPU}{_PLOT}"
LEFT = "the cases already measured are written"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    subjects = parser.add_subparsers(dest="subject", required=True, metavar="SUBJECT")

    def subject(name: str, what: str, examples: str) -> argparse.ArgumentParser:
        return add_command(subjects, name, what, f"examples:\n{examples}")

    add_loss_arguments(subject("loss", "the contrastive loss alone, beside its peers", _LOSS))
    add_data_arguments(subject("data", "the way of pictures to the training process", _DATA))
    add_step_arguments(subject("step", "a whole training step, beside open_clip's", _STEP))
    add_eval_arguments(subject("eval", "a zero-shot evaluation: what share of its time is the image tower's", _EVAL))
    add_gpu_arguments(subject("gpu", "a GPU's first hour: every benchmark and test that needs one, in minutes", _GPU))
    plot = subject("plot", "draw the pictures of a result again", _PLOT)
    plot.add_argument("result", type=path_option, metavar="RESULT.json", help="what another clipscale bench wrote")


def run(arguments: argparse.Namespace, words: list[str]) -> int:
    """A result records what was typed: `clipscale` and the words behind it."""
    if arguments.subject == "plot":
        from clipscale.bench.redraw import redraw

        print(*redraw(arguments.result))
        return 0
    if arguments.subject == "data":
        chosen = data_options(arguments)
        from clipscale.bench.data.bench import bench_data

        return bench_data(chosen, shlex.join(["clipscale", *words]))
    if arguments.subject == "step":
        chosen = step_options(arguments)
        from clipscale.bench.step.bench import bench_step

        return bench_step(chosen, shlex.join(["clipscale", *words]))
    if arguments.subject == "eval":
        chosen = eval_options(arguments)
        from clipscale.bench.eval.bench import bench_eval

        return bench_eval(chosen, shlex.join(["clipscale", *words]))
    if arguments.subject == "gpu":
        return _run_gpu(arguments, words)
    options = loss_options(arguments)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    start = ["torchrun", "--nproc-per-node", str(ranks), "-m"] if ranks > 1 else []
    from clipscale.bench.loss.bench import bench_loss

    return bench_loss(options, shlex.join([*start, "clipscale", *words]))


def _run_gpu(arguments: argparse.Namespace, words: list[str]) -> int:
    if arguments.list:
        print(listed())
        return 0
    from clipscale.bench.gpu.bench import bench_gpu

    return bench_gpu(gpu_options(arguments), shlex.join(["clipscale", *words]))
