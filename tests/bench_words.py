"""What is typed behind `clipscale bench loss` and `clipscale bench data`, as the benchmarks get it."""

import argparse

from clipscale.bench.command import add_bench_arguments
from clipscale.bench.data.options import DataBench, data_options
from clipscale.bench.loss.options import LossBench, loss_options


def loss_bench(*words: str) -> LossBench:
    return loss_options(_parsed("loss", *words))


def data_bench(*words: str) -> DataBench:
    return data_options(_parsed("data", *words))


def _parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_bench_arguments(parser)
    return parser.parse_args(words)
