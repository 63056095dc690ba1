"""What is typed behind `clipscale bench loss` and `clipscale bench data`, as the benchmarks get it."""

from clipscale.bench.data.options import DataBench, data_options
from clipscale.bench.loss.options import LossBench, loss_options
from clipscale.cli import parse


def loss_bench(*words: str) -> LossBench:
    return loss_options(parse(["bench", "loss", *words])[1])


def data_bench(*words: str) -> DataBench:
    return data_options(parse(["bench", "data", *words])[1])
