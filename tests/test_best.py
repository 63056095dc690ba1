"""checkpoint.best: the checkpoint with the best score of a run stays, as <run.dir>/best."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from shards import write_pairs
from tiny import tiny_config

from clipscale.checkpoint import find_checkpoint
from clipscale.checkpoint.best import is_better, keep_best
from clipscale.checkpoint.find import verify
from clipscale.cli import main
from clipscale.errors import SharedError, UserError
from clipscale.eval.suite import EvalSuite
from clipscale.preflight.checks import check_training
from clipscale.training.trainer import train


@pytest.fixture
def config(tmp_path):
    """Six steps, each with a validation; checkpoints at the end alone, but for the best."""
    urls = write_pairs(tmp_path / "data", 4, 8, size=16)
    words = ["train.samples=48", "checkpoint.every_steps=100", "checkpoint.every_minutes=0", "checkpoint.keep=1"]
    words += [f"eval.validation.urls={urls}", "eval.validation.batch=8", "eval.validation.every_steps=1"]
    return lambda *more: tiny_config(tmp_path, urls, *words, "checkpoint.best=validation/loss", *more)


def scored(monkeypatch, losses: list[float | None]) -> None:
    """Validations that give these losses, step by step; None: it fails."""
    left = iter(losses)

    def run(suite, name):
        if (loss := next(left)) is None:
            raise SharedError("gone")
        return {f"{name}/{key}": value for key, value in zip(COLUMNS, [loss, 0.5, 8, 8, 0, 0], strict=True)}

    monkeypatch.setattr(EvalSuite, "run", run)


COLUMNS = ("loss", "image_accuracy", "pairs", "batch", "repeated_captions", "bad_pictures")


def kept(run: Path) -> tuple[int, float]:
    """(step, score) of the best checkpoint, which is whole."""
    assert verify(run / "best") == ""
    state, score = json.loads((run / "best/state.json").read_text()), json.loads((run / "best/score.json").read_text())
    assert state["step"] == score["step"]
    return score["step"], score["value"]


def test_the_best_one_stays_whatever_comes_after_it(config, tmp_path, monkeypatch):
    scored(monkeypatch, [3.0, float("nan"), 1.0, None, 1.0, 1.5])
    train(config())
    assert kept(tmp_path / "run") == (3, 1.0)  # the first of two that are as good
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-000000006"]
    assert find_checkpoint(str(tmp_path / "run/best")).name == "best"
    log = (tmp_path / "run/run.log").read_text()
    assert log.count("the best validation/loss so far") == 2
    assert f"step 3: the best validation/loss so far, 1.0000: kept as {tmp_path}/run/best" in log


def test_it_is_evaluated_like_any_other(config, tmp_path, capsys):
    train(config("train.samples=16"))
    step, value = kept(tmp_path / "run")
    assert main(["eval", "validation", str(tmp_path / "run/best")]) == 0
    assert capsys.readouterr().out.startswith(f"step {step}  validation/loss {value:.4f}")


def test_a_run_that_goes_on_compares_with_the_one_that_is_kept(config, tmp_path, monkeypatch):
    """But not with one of a way that it has left since."""
    scored(monkeypatch, [3.0, 1.0, 2.0, 0.9, 1.5, 1.7])
    train(config("train.samples=16"))
    assert kept(tmp_path / "run") == (2, 1.0)
    train(config("train.samples=32", "checkpoint.keep=9"))
    assert kept(tmp_path / "run") == (4, 0.9)
    train(config("train.samples=32", f"resume={tmp_path}/run/checkpoints/step-000000002", "eval.validation.batch=4"))
    assert kept(tmp_path / "run") == (3, 1.5)


def test_what_cannot_be_kept_costs_nothing_else(config, tmp_path, monkeypatch):
    scored(monkeypatch, [1.0] * 2)
    monkeypatch.setattr(
        "clipscale.training.saver.keep_best", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "full"))
    )
    assert train(config("train.samples=16"))[0].startswith("trained 2 steps")
    assert "step 1 cannot be kept as the best one: full" in (tmp_path / "run/run.log").read_text()


def test_higher_is_better_but_for_a_loss(tmp_path):
    source = tmp_path / "checkpoints/step-000000003"
    source.mkdir(parents=True)
    (source / "model.safetensors").write_bytes(b"x")
    run = str(tmp_path)
    keep_best(run, "zeroshot/top1", 0.5, step=3)
    assert is_better(run, "zeroshot/top1", 0.6, step=4)
    assert not is_better(run, "zeroshot/top1", 0.5, step=4)
    assert not is_better(run, "zeroshot/top1", 0.4, step=4)
    assert is_better(run, "zeroshot/top5", 0.4, step=4)  # another metric is asked for
    assert is_better(run, "zeroshot/top1", 0.4, step=3)  # the same step again
    keep_best(run, "a/loss", 0.5, step=3)
    assert is_better(run, "a/loss", 0.4, step=4)
    assert not is_better(run, "a/loss", 0.6, step=4)
    assert sorted(path.name for path in (tmp_path / "best").iterdir()) == ["model.safetensors", "score.json"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["checkpoint.best=zeroshot/top1"], "is no score of this run's evaluations; they have validation/loss, "),
        (["checkpoint.best=loss"], "checkpoint.best='loss' is no score of this run's evaluations"),
        (["eval.validation.urls=null"], "there are none: set eval.zeroshot or eval.validation"),
    ],
)
def test_a_score_that_the_run_does_not_have_is_told_first(config, words, said):
    with pytest.raises(UserError) as error:
        check_training(config(*words))
    assert said in str(error.value)
