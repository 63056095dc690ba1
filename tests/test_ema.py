"""clipscale/training/ema.py: averaged weights, against torch's own average and a sum in float64; in checkpoints,
evaluations and exports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from shards import write_pairs
from tiny import MODEL, save_run, tiny_config
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from clipscale.checkpoint import find_checkpoint, load_checkpoint, verify
from clipscale.cli import main
from clipscale.config import Config, Train
from clipscale.config import Ema as Settings
from clipscale.errors import UserError
from clipscale.preflight.checks import check_training
from clipscale.towers import Towers
from clipscale.training import ema as ema_module
from clipscale.training.ema import Ema, decay
from clipscale.training.learner import Learner
from clipscale.training.trainer import train
from clipscale.weights.target import find_target, open_towers

STEADY = Settings(half_life_samples=24, ramp_up=0)


@pytest.fixture(scope="module")
def urls(tmp_path_factory) -> str:
    return write_pairs(tmp_path_factory.mktemp("data"), 4, 8, size=16)


def walk(model: nn.Module, steps: int):
    """The weights move about."""
    torch.manual_seed(0)
    for _ in range(steps):
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn_like(weight))
        yield


def test_it_is_torchs_own_average_where_the_half_life_is_steady():
    model = nn.Linear(5, 3)
    ema = Ema(Config(train=Train(global_batch=8), ema=STEADY), model)
    ema.begin(None)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5 ** (8 / 24)))
    theirs.update_parameters(model)  # its first update is a copy
    for step, _ in enumerate(walk(model, 6), start=1):
        ema.update(samples=8 * step)
        theirs.update_parameters(model)
    for name, weight in theirs.module.named_parameters():
        assert torch.equal(ema.averages[name], weight)


def test_weights_count_by_the_samples_since_them_and_the_first_are_forgotten():
    """Against a sum in float64, with weights worked out from the definition."""
    model, settings, batch = nn.Linear(1, 4, bias=False), Settings(half_life_samples=400, ramp_up=0.25), 16
    ema = Ema(Config(train=Train(global_batch=batch), ema=settings), model)
    ema.begin(None)
    seen, shares = [model.weight.detach().double()], [1.0]
    for step, _ in enumerate(walk(model, 150), start=1):
        ema.update(samples=batch * step)
        kept = 2.0 ** (-batch / min(400.0, 0.25 * batch * step))
        shares = [share * kept for share in shares] + [1 - kept]
        seen.append(model.weight.detach().double())
    wanted = sum(share * weight for share, weight in zip(shares, seen, strict=True))
    assert (ema.averages["weight"].double() - wanted).abs().max() < 2e-5
    assert sum(shares) == pytest.approx(1)
    assert shares[0] < 1e-6
    half_lives_ago = [sum(shares[-25 * ago :]) for ago in (1, 2)]  # of 400 samples, at the end
    assert half_lives_ago == pytest.approx([0.5, 0.75])


@pytest.mark.parametrize("samples", [64, 4096])
def test_a_step_of_twice_the_batch_keeps_what_two_steps_keep(samples):
    settings = Settings(half_life_samples=1000)
    assert decay(settings, samples=samples, batch=64) == pytest.approx(decay(settings, samples=samples, batch=32) ** 2)


def test_locked_weights_have_no_average():
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    ema = Ema(Config(ema=STEADY), model)
    ema.begin(None)
    assert [*ema.averages] == ["weight"]


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]


def snapshot_of(folder: Path):
    return load_checkpoint(find_checkpoint(str(folder / "run")))


@pytest.fixture(scope="module")
def words(urls) -> list[str]:
    validation = [f"eval.validation.urls={urls}", "eval.validation.batch=8", "eval.validation.every_steps=2"]
    return ["ema.half_life_samples=16", "checkpoint.every_steps=2", "optim.lr=0.01", *validation]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, urls, words) -> Path:
    """A run with an average, whose steps were noted."""
    folder = tmp_path_factory.mktemp("averaged")
    train(tiny_config(folder, urls, *words))
    return folder


def test_a_run_averages_what_it_trained_and_trains_as_one_that_does_not(trained, tmp_path, urls, words, monkeypatch):
    seen, update = [], Learner.update

    def noting(self, *, step):
        found = update(self, step=step)
        self.towers.clamp_logit_scale()
        seen.append({name: weight.detach().double() for name, weight in self.towers.model.named_parameters()})
        return found

    monkeypatch.setattr(Learner, "update", noting)
    train(tiny_config(tmp_path, urls, *words, "ema.half_life_samples=0"))
    plain, averaged = snapshot_of(tmp_path), snapshot_of(trained)
    assert all(torch.equal(plain.model[name], averaged.model[name]) for name in plain.model)
    assert plain.ema == {}
    assert averaged.ema.keys() == seen[0].keys()
    wanted = None  # the first step keeps 2^(-8 / 0.4) of the fresh weights, which is less than float32 shows
    for step, weights in enumerate(seen, start=1):
        kept = 2.0 ** (-8 / min(16, 0.05 * 8 * step))
        wanted = weights if wanted is None else {n: kept * wanted[n] + (1 - kept) * weights[n] for n in weights}
    worst = max((averaged.ema[name].double() - tensor).abs().max() for name, tensor in wanted.items())
    assert worst < 2e-6


def test_the_average_is_evaluated_beside_the_weights(trained, capsys):
    assert verify(find_checkpoint(str(trained / "run"))) == ""
    for row in rows(trained):
        assert ("ema/validation/loss" in row) == ("validation/loss" in row) == (row["step"] % 2 == 0)
    last = rows(trained)[-1]
    assert last["ema/validation/loss"] != last["validation/loss"]
    assert "ema/validation: loss" in (trained / "run/run.log").read_text()
    for more, column in ([], "validation/loss"), (["--ema"], "ema/validation/loss"):
        assert main(["eval", "validation", str(trained / "run"), *more]) == 0
        assert f"validation/loss {last[column]:.4f}" in capsys.readouterr().out


def test_the_average_alone_is_evaluated_and_tells_the_best_one(tmp_path, urls, words):
    train(tiny_config(tmp_path, urls, *words, "ema.evaluate=only", "checkpoint.best=ema/validation/loss"))
    scored = [row for row in rows(tmp_path) if "ema/validation/loss" in row]
    assert [row["step"] for row in scored] == [2, 4]
    assert not any("validation/loss" in row for row in scored)
    score = json.loads((tmp_path / "run/best/score.json").read_text())
    assert score["value"] == min(row["ema/validation/loss"] for row in scored)


def test_what_is_averaged_is_the_weights_own_again_after_an_evaluation_that_fails(tmp_path, urls, words, monkeypatch):
    monkeypatch.setattr("clipscale.eval.evaluations.evaluate_validation", lambda *_, **__: 1 / 0)
    train(tiny_config(tmp_path, urls, *words))
    assert rows(tmp_path)[-1]["ema/validation/failed"] == 1
    assert "the evaluation 'ema/validation' failed" in (tmp_path / "run/run.log").read_text()
    monkeypatch.undo()
    train(tiny_config(tmp_path, urls, *words, f"run.dir={tmp_path}/whole"))
    whole = load_checkpoint(find_checkpoint(str(tmp_path / "whole")))
    assert all(torch.equal(whole.ema[name], tensor) for name, tensor in snapshot_of(tmp_path).ema.items())


def test_an_average_that_is_switched_on_or_off_on_the_way_is_told(tmp_path, urls, words):
    train(tiny_config(tmp_path, urls, *words, "ema.half_life_samples=0", "train.samples=16"))
    train(tiny_config(tmp_path, urls, *words, "train.samples=24"))
    log = (tmp_path / "run/run.log").read_text()
    assert f"ema: the checkpoint has no average of {len(snapshot_of(tmp_path).ema)} tensors, which begin as" in log
    train(tiny_config(tmp_path, urls, *words, "ema.half_life_samples=0", "train.samples=32"))
    assert (
        "the checkpoint's averaged weights are dropped: ema.half_life_samples=0"
        in (tmp_path / "run/run.log").read_text()
    )
    assert snapshot_of(tmp_path).ema == {}


def test_a_state_whose_average_is_not_finite_is_no_checkpoint(tmp_path, urls, words, monkeypatch):
    monkeypatch.setattr(ema_module, "decay", lambda *_, samples, **__: 1.0 if samples < 24 else float("nan"))
    monkeypatch.setattr(ema_module, "get_ema_multi_avg_fn", lambda keep: lambda mine, *_: [m.mul_(keep) for m in mine])
    with pytest.raises(UserError, match="averaged weight logit_scale is not finite"):
        train(tiny_config(tmp_path, urls, *words, "ema.evaluate=only"))
    assert find_checkpoint(str(tmp_path / "run")).name == "step-000000002"


def opened(target: str, *, ema: bool = False) -> Towers:
    found, config = find_target(target, [], ema=ema)
    return open_towers(found, config.model)


def test_averaged_weights_are_opened_exported_and_begun_from(trained, tmp_path, urls, capsys):
    towers = opened(str(trained / "run"), ema=True)
    average = snapshot_of(trained).ema
    assert all(torch.equal(weight, average[name]) for name, weight in towers.model.named_parameters())
    out = ["--format", "open_clip", "--output", str(tmp_path / "out")]
    assert main(["export", str(trained / "run"), "--ema", *out]) == 0
    assert "averaged weights of checkpoint" in capsys.readouterr().out
    towers = opened(str(tmp_path / "out"))
    assert all(torch.equal(weight, average[name]) for name, weight in towers.model.named_parameters())
    begun = ["model.init_ema=true", f"model.init={trained}/run", "train.samples=8", "optim.lr=1e-30"]
    train(tiny_config(tmp_path, urls, *begun))
    begun = snapshot_of(tmp_path).model  # after a step that moves nothing by more than 1e-30
    assert all((begun[name] - tensor).abs().max() <= 1e-29 for name, tensor in average.items())


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["ema.half_life_samples=-1"], "ema.half_life_samples=-1 must not be negative"),
        (["ema.ramp_up=-0.5"], "ema.ramp_up=-0.5 must not be negative"),
        (["model.init_ema=true"], "model.init_ema=true asks for averaged weights, and model.init names none"),
        (["model.init=RUN", "model.init_ema=true"], "has no averaged weights: its run had ema.half_life_samples=0"),
        (["checkpoint.best=ema/validation/loss"], "checkpoint.best='ema/validation/loss' is no score of this run's"),
    ],
)
def test_what_cannot_be_is_one_line_before_anything_is_read(tmp_path, urls, words, line):
    save_run(tmp_path / "other", MODEL)
    with pytest.raises(UserError, match=line) as error:
        check_training(tiny_config(tmp_path, urls, *(word.replace("RUN", f"{tmp_path}/other") for word in words)))
    assert "\n" not in str(error.value)


def test_no_average_is_one_line(tmp_path, capsys):
    save_run(tmp_path / "run", MODEL)
    assert main(["eval", "validation", str(tmp_path / "run"), "--ema", "eval.validation.urls=x.tar"]) == 2
    assert "has no averaged weights" in capsys.readouterr().err
