"""train.deterministic: the setting reaches torch and is undone; what is not repeatable is one line before step 1."""

from __future__ import annotations

import os
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from shards import write_pairs
from tiny import tiny_config

from clipscale.deterministic import deterministic, prepare_cublas
from clipscale.errors import SharedError, UserError
from clipscale.loss import contrastive_grads_in_place
from clipscale.preflight.checks import check_training
from clipscale.towers import build_towers
from clipscale.training import learner as learner_module
from clipscale.training import trainer as train_module
from clipscale.training.trainer import train


@pytest.fixture(scope="module")
def urls(tmp_path_factory) -> str:
    return write_pairs(tmp_path_factory.mktemp("data"), 4, 8, size=16)


def state() -> tuple:
    """Everything that the setting touches."""
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
        torch.backends.cudnn.benchmark,
        torch.backends.cuda.cudnn_sdp_enabled(),
    )


ON = (True, False, False, False, False)


@pytest.fixture
def unusual():
    """What a program may have set itself, so that it is seen to come back; and what it was before comes back too."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = True
    yield state()
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = False


def weights(folder):
    return load_file(folder / "run/checkpoints/step-000000004/model.safetensors")


def test_the_setting_reaches_torch_and_is_undone(tmp_path, urls, monkeypatch, unusual):
    seen = []

    def recorded(*inputs, **options):
        seen.append(state())
        return contrastive_grads_in_place(*inputs, **options)

    monkeypatch.setattr(learner_module, "contrastive_grads_in_place", recorded)
    for name, wanted in (("true", ON), ("false", unusual)):
        (tmp_path / name).mkdir()
        train(tiny_config(tmp_path / name, urls, f"train.deterministic={name}"))
        assert seen == [wanted] * 4
        assert state() == unusual
        log = (tmp_path / name / "run" / "run.log").read_text()
        assert log.count("train.deterministic=true: the same steps give the same bits") == (name == "true")
        seen.clear()
    kept, plain = weights(tmp_path / "true"), weights(tmp_path / "false")
    assert all(torch.equal(kept[key], plain[key]) for key in plain)  # on a CPU it changes nothing


def test_a_resume_under_another_value_is_told(tmp_path, urls):
    train(tiny_config(tmp_path, urls, "train.samples=16"))
    train(tiny_config(tmp_path, urls, "train.deterministic=true"))
    log = (tmp_path / "run" / "run.log").read_text()
    assert "changed since the checkpoint: train.deterministic" in log
    assert "deterministic: true" in (tmp_path / "run/checkpoints/step-000000004/config.yaml").read_text()


class NotBackwards(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return put(grad)


def put(x: torch.Tensor) -> torch.Tensor:
    """What torch has no deterministic form of, on CPUs too: two writers may meet."""
    return x.put(torch.zeros(1, dtype=torch.long), x.new_zeros(1))


@pytest.mark.parametrize(("side", "change"), [("image", put), ("text", NotBackwards.apply)])
def test_a_tower_that_is_not_repeatable_is_refused_before_the_first_step(tmp_path, urls, monkeypatch, side, change):
    """In its backward pass too; without the setting it trains."""

    def built(*arguments, **options):
        towers = build_towers(*arguments, **options)
        getattr(towers, side).encoder.register_forward_hook(lambda module, inputs, out: change(out))
        return towers

    monkeypatch.setattr(train_module, "build_towers", built)
    before = state()
    with pytest.raises(
        SharedError, match=rf"an operation of the {side} tower is not repeatable: put_ does not"
    ) as told:
        train(tiny_config(tmp_path, urls, "train.deterministic=true"))
    assert "\n" not in str(told.value)
    assert str(told.value).endswith("set train.deterministic=false, or choose a tower without it")
    assert not (tmp_path / "run").exists()
    assert state() == before
    train(tiny_config(tmp_path, urls, "train.samples=8"))


def test_the_try_out_leaves_no_trace(urls, tmp_path):
    towers = build_towers(tiny_config(tmp_path, urls).model)
    towers.model.eval()
    generator, kept = torch.get_rng_state(), {key: value.clone() for key, value in towers.model.state_dict().items()}
    train_module.try_backward(towers)
    assert torch.equal(torch.get_rng_state(), generator)
    assert not towers.model.training
    assert all(parameter.grad is None for parameter in towers.model.parameters())
    assert all(torch.equal(value, kept[key]) for key, value in towers.model.state_dict().items())


def test_what_fails_later_is_one_line_and_other_errors_are_what_they_are():
    with (
        pytest.raises(SharedError, match=r"an operation of the run is not repeatable: put_ does not"),
        deterministic(True),
    ):
        put(torch.zeros(3))
    with pytest.raises(RuntimeError, match="out of memory"), deterministic(True):
        raise RuntimeError("CUDA out of memory")
    with deterministic(False):
        put(torch.zeros(3))


def test_cublas_is_told_before_cuda_starts(tmp_path, urls, monkeypatch):
    name = "CUBLAS_WORKSPACE_CONFIG"
    monkeypatch.delenv(name)
    check_training(tiny_config(tmp_path, urls))
    check_training(tiny_config(tmp_path, urls, "train.deterministic=true", "device=cpu"))
    assert name not in os.environ
    check_training(tiny_config(tmp_path, urls, "train.deterministic=true"))
    assert os.environ[name] == ":4096:8"
    monkeypatch.setenv(name, ":16:8")
    prepare_cublas()
    assert os.environ[name] == ":16:8"
    monkeypatch.setenv(name, ":4096:2")
    with pytest.raises(UserError, match=r"CUBLAS_WORKSPACE_CONFIG=:4096:2 is set; unset it, or set it to :4096:8"):
        check_training(tiny_config(tmp_path, urls, "train.deterministic=true"))
    monkeypatch.delenv(name)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=SimpleNamespace(is_initialized=lambda: True)))
    with pytest.raises(UserError, match=r"CUDA has started without CUBLAS_WORKSPACE_CONFIG; set it to :4096:8"):
        prepare_cublas()


@pytest.mark.gpu
def test_on_a_gpu_two_runs_and_a_resume_give_the_same_bits(tmp_path, urls):
    found = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        config = tiny_config(
            tmp_path / name, urls, "train.deterministic=true", "device=cuda", "checkpoint.every_steps=2"
        )
        train(config)
        found.append(weights(tmp_path / name))
    shutil.rmtree(tmp_path / "two/run/checkpoints/step-000000004")
    train(config)
    found.append(weights(tmp_path / "two"))
    for other in found[1:]:
        assert all(torch.equal(found[0][key], other[key]) for key in other)
