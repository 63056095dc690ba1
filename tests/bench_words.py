"""What is typed behind `clipscale bench loss`, `data`, `step`, `eval`, as the benchmarks get it; what they print."""

import pytest

from clipscale.bench.data.options import DataBench, data_options
from clipscale.bench.eval.options import EvalBench, eval_options
from clipscale.bench.loss.options import LossBench, loss_options
from clipscale.bench.step.options import StepBench, step_options
from clipscale.cli import main, parse


def loss_bench(*words: str) -> LossBench:
    return loss_options(parse(["bench", "loss", *words])[1])


def data_bench(*words: str) -> DataBench:
    return data_options(parse(["bench", "data", *words])[1])


def step_bench(*words: str) -> StepBench:
    return step_options(parse(["bench", "step", *words])[1])


def eval_bench(*words: str) -> EvalBench:
    return eval_options(parse(["bench", "eval", *words])[1])


def printed_by(words: list[str], **changed: object) -> str:
    """What `clipscale` with these words prints, while attributes have other values ({"module.name": value})."""
    printed = []
    with pytest.MonkeyPatch.context() as patch:
        for target, value in changed.items():
            patch.setattr(target, value)
        patch.setattr("builtins.print", lambda *parts, **_: printed.append(" ".join(map(str, parts))))
        assert main(words) == 0
    return "\n".join(printed)
