"""clipscale/optim/ by default, and clipscale/schedule.py. Its other kinds and groups: test_optimizers.py."""

import math

import pytest
import torch
from tiny import MODEL

from clipscale.config import Optim
from clipscale.config.load import load_config
from clipscale.optim import build_optimizer, set_lr
from clipscale.schedule import learning_rate, total_steps
from clipscale.towers import build_towers


def config(*words: str):
    return load_config(["train.global_batch=10", "train.samples=1000", "optim.lr=0.5", *words])


# --- the optimizer ----------------------------------------------------------------------------------------------------


def test_matrices_decay_and_the_rest_does_not():
    model = build_towers(MODEL).model
    decayed, kept = build_optimizer(model, Optim(weight_decay=0.3)).param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.3, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, kept = ({names[id(parameter)] for parameter in group["params"]} for group in (decayed, kept))
    assert decayed | kept == set(names.values())
    assert not decayed & kept
    assert {"logit_scale", "visual.class_embedding", "visual.ln_pre.weight", "text.ln_final.bias"} <= kept
    assert {"visual.conv1.weight", "visual.proj", "text.token_embedding.weight", "text.text_projection"} <= decayed
    assert {name for name in names.values() if name.endswith("bias")} <= kept
    assert all(model.get_parameter(name).ndim < 2 for name in kept)


def test_locked_parameters_are_left_out():
    model = build_towers(MODEL).model
    model.text.requires_grad_(False)
    params = [parameter for group in build_optimizer(model, Optim()).param_groups for parameter in group["params"]]
    assert len(params) == len([*model.visual.parameters()]) + 1


def test_settings_reach_adamw():
    group = build_optimizer(build_towers(MODEL).model, Optim(lr=0.1, betas=(0.8, 0.9), eps=1e-3)).param_groups[0]
    assert (group["lr"], group["betas"], group["eps"]) == (0.1, (0.8, 0.9), 1e-3)
    assert Optim().moments == {"betas": (0.9, 0.98), "eps": 1e-6}


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_two_steps_follow_the_formula(kind):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2) and plain SGD, in float64."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2, dtype=torch.float64)
    settings = Optim(kind=kind, lr=0.1, weight_decay=0.3, eps=1e-6, betas=(0.9, 0.98))
    optimizer = build_optimizer(layer, settings)
    expected = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}
    first, second = ({name: torch.zeros_like(value) for name, value in expected.items()} for _ in range(2))
    for step, lr in enumerate((0.1, 0.05), 1):
        set_lr(optimizer, lr)
        for name, parameter in layer.named_parameters():
            grad = parameter.grad = torch.randn_like(parameter)
            decay = 0.3 if name == "weight" else 0.0
            if kind == "sgd":
                expected[name] -= lr * (grad + decay * expected[name])
                continue
            first[name] = 0.9 * first[name] + 0.1 * grad
            second[name] = 0.98 * second[name] + 0.02 * grad**2
            mean, square = first[name] / (1 - 0.9**step), second[name] / (1 - 0.98**step)
            expected[name] = expected[name] * (1 - lr * decay) - lr * mean / (square.sqrt() + 1e-6)
        optimizer.step()
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-12, atol=1e-12)


# --- the schedule -----------------------------------------------------------------------------------------------------


def test_warm_up_is_linear_and_reaches_the_top_at_its_last_step():
    steps = config("optim.warmup_steps=4")
    samples = config("optim.warmup_samples=40")
    expected = [0.125, 0.25, 0.375, 0.5]  # of the steps that begin after 0, 10, 20, 30 samples
    for settings in (steps, samples):
        assert [learning_rate(settings, seen) for seen in (0, 10, 20, 30)] == expected
        assert learning_rate(settings, 40) == 0.5  # the cosine's beginning
        assert learning_rate(settings, 50) < 0.5


def test_a_warm_up_that_no_batch_divides_never_overshoots():
    rates = [learning_rate(config("optim.warmup_samples=25"), seen) for seen in (0, 10, 20)]
    assert rates == [0.5 * 10 / 25, 0.5 * 20 / 25, 0.5]


def test_without_warm_up_the_first_step_is_at_the_top():
    assert learning_rate(config(), 0) == 0.5


@pytest.mark.parametrize("final", [0.0, 0.1])
def test_the_cosine_ends_at_final_lr(final):
    settings = config("optim.warmup_steps=4", f"optim.final_lr={final}")
    assert math.isclose(learning_rate(settings, 520), (0.5 + final) / 2)  # halfway between 40 and 1000
    assert learning_rate(settings, 1000) == final
    assert learning_rate(settings, 1005) == final  # a last batch that goes beyond the end
    assert final < learning_rate(settings, 990) < final + 0.001


def test_every_step_equals_the_formula_in_float64():
    settings = config("optim.warmup_samples=55", "optim.final_lr=0.02", "train.samples=987")
    for seen in range(0, 987, 10):
        if seen < 55:
            expected = 0.5 * min(seen + 10, 55) / 55
        else:
            angle = torch.tensor((seen - 55) / (987 - 55), dtype=torch.float64) * math.pi
            expected = 0.02 + 0.48 * 0.5 * (1 + torch.cos(angle)).item()
        assert math.isclose(learning_rate(settings, seen), expected, rel_tol=1e-12)


def test_the_cosine_does_not_depend_on_the_batch():
    small, large = (config("optim.warmup_samples=100", f"train.global_batch={batch}") for batch in (10, 50))
    for seen in range(100, 1000, 50):
        assert learning_rate(small, seen) == learning_rate(large, seen)


def test_the_number_of_steps_is_rounded_up():
    assert total_steps(config()) == 100
    assert total_steps(config("train.samples=1001")) == 101
    assert total_steps(config("train.samples=1")) == 1
    assert total_steps(config(), samples_seen=400) == 60
    assert total_steps(config("train.global_batch=40"), samples_seen=410) == 15  # another batch after a resume
    assert total_steps(config(), samples_seen=1000) == total_steps(config(), samples_seen=1010) == 0
