"""clipscale/optim/: every kind it offers, groups of parameters, and what a checkpoint gives back to each parameter."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from functools import cache

import pytest
import torch
from shards import write_pairs
from timm.optim import list_optimizers, param_groups_layer_decay
from tiny import MODEL, tiny_config
from torch import Tensor, nn

from clipscale.checkpoint import first_bad
from clipscale.checkpoint.staging import staged_bytes, state_bytes
from clipscale.checkpoint.tree import read_tree, write_tree
from clipscale.config import Optim
from clipscale.config.load import config_from_yaml, dump_config, load_config
from clipscale.errors import UserError
from clipscale.optim import build_optimizer, check_optimizer, optimizer_state, restore_optimizer, set_lr
from clipscale.optim.kinds import _class_of, offered_kinds
from clipscale.resilience.injection import VARIABLE
from clipscale.towers import build_towers
from clipscale.training.trainer import train

LAYERS = 3
SMALL = replace(MODEL, vision=MODEL.vision | {"layers": LAYERS}, text=MODEL.text | {"layers": LAYERS})
STEPS = 6
ONE_OF_EACH = sorted({_class_of(kind): kind for kind in sorted(offered_kinds(), key=len, reverse=True)}.values())


@cache
def fresh(timm: str | None = None) -> nn.Module:
    """To be copied; of few tokens, to be quick."""
    vision = {"timm_model_name": timm, "image_size": 64} if timm else SMALL.vision
    model = build_towers(replace(SMALL, vision=vision)).model
    model.text.token_embedding = nn.Embedding(64, SMALL.text["width"])
    return model


def model_of(timm: str | None = None) -> nn.Module:
    return copy.deepcopy(fresh(timm))


@cache
def gradients() -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    shapes = {name: parameter.shape for name, parameter in fresh().named_parameters()}
    return [{name: 0.1 * torch.randn(shape, generator=draw) for name, shape in shapes.items()} for _ in range(STEPS)]


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, which: range) -> None:
    for step in which:
        for name, parameter in model.named_parameters():
            parameter.grad = gradients()[step][name].clone() if parameter.requires_grad else None
        set_lr(optimizer, 1e-3 * (step + 1))
        optimizer.step()


def saved(optimizer: torch.optim.Optimizer, folder) -> dict:
    """As a checkpoint gives it back."""
    path = folder / "optimizer.safetensors"
    path.unlink(missing_ok=True)
    write_tree(path, optimizer_state(optimizer))
    return read_tree(path)


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))


def settings(kind: str, **more) -> Optim:
    return Optim(kind=kind, layer_decay=0.7, no_decay=("*positional_embedding",), lr_scales={"text": 0.5}, **more)


def names_of(model: nn.Module, group: dict) -> set[str]:
    named = {id(parameter): name for name, parameter in model.named_parameters()}
    return {named[id(parameter)] for parameter in group["params"]}


def scales_of(model: nn.Module, **config) -> dict[str, float]:
    groups = build_optimizer(model, Optim(lr=1.0, **config)).param_groups
    assert all(group["lr"] == group["lr_scale"] for group in groups)
    return {name: group["lr_scale"] for group in groups for name in names_of(model, group)}


# --- every kind -------------------------------------------------------------------------------------------------------


def goes_on_as_if_never_stopped(config: Optim, folder) -> None:
    """Six steps, and six that were saved and restored after three: the same bits. Bytes are foreseen, state is finite,
    every parameter moves."""
    model = model_of()
    optimizer = build_optimizer(model, config)
    foreseen = state_bytes(model, optimizer)
    steps(model, optimizer, range(3))
    state = saved(optimizer, folder)
    assert staged_bytes([model.state_dict(), optimizer_state(optimizer)]) == foreseen
    assert first_bad(model.state_dict(), state) == ""
    resumed = copy.deepcopy(model)
    again = build_optimizer(resumed, config)
    assert restore_optimizer(again, resumed, state) == []
    for each in ((model, optimizer), (resumed, again)):
        steps(*each, range(3, STEPS))
    assert same(model, resumed)
    start = fresh().state_dict()
    assert not [name for name, parameter in model.named_parameters() if torch.equal(parameter, start[name])]
    assert first_bad(model.state_dict(), {}) == ""


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_a_kind_goes_on_as_if_never_stopped(kind, tmp_path):
    goes_on_as_if_never_stopped(settings(kind), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in offered_kinds() if kind not in ONE_OF_EACH])
def test_any_kind_goes_on_as_if_never_stopped(kind, tmp_path):
    goes_on_as_if_never_stopped(settings(kind), tmp_path)


@pytest.mark.parametrize(
    "config",
    [settings("adamw", update_clipping=1.0), settings("sgd", momentum=0.9, options={"nesterov": True})],
    ids=["clipping", "nesterov"],
)
def test_options_go_on_as_if_never_stopped(config, tmp_path):
    check_optimizer(config)
    goes_on_as_if_never_stopped(config, tmp_path)


def test_every_name_of_timms_is_offered_or_refused_with_its_reason():
    refused = {}
    for name in {*list_optimizers()} - {*offered_kinds()}:
        with pytest.raises(UserError) as error:
            check_optimizer(Optim(kind=name))
        refused[name] = str(error.value)
    assert {"kron", "adahessian", "fusedlamb", "bnbadamw"} <= refused.keys()
    assert all(name.startswith(("kron", "ada", "fused", "bnb")) for name in refused)
    assert {"lamb", "lion", "muon", "adafactor", "adafactorbv", "adan", "adopt", "nadamw"} <= {*offered_kinds()}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["optim.kind=LAMBX"], r"optim\.kind='LAMBX' is neither .*; did you mean .*lamb"),
        (["optim.kind=bnblion"], r"is bitsandbytes\.optim\.Lion, which no requirement"),
        (["optim.kind=lion", "optim.options={trust: 1}"], r"optim\.options has 'trust', which optim\.kind=lion does"),
        (["optim.kind=lamb", "optim.options={trust_clp: true}"], r"did you mean trust_clip\?"),
        (["optim.kind=lamb", "optim.options={lr: 1.0}"], r"optim\.options has lr, which is a setting: optim\.lr"),
        (["optim.kind=adan", "optim.betas=[0.9,0.95]"], r"optim\.betas=\[0\.9, 0\.95\], but optim\.kind=adan takes 3"),
        (["optim.kind=lamb", "optim.update_clipping=1.0"], r"but optim\.kind=lamb clips no updates"),
        (["optim.kind=muon", "optim.options={algo: nope}"], r"optim\.kind=muon cannot be made .*Invalid algo"),
        (["optim.options={foreach: true, fused: true}"], "adamw cannot be made of these settings"),
    ],
)
def test_what_a_kind_does_not_take_is_one_line(words, said):
    with pytest.raises(UserError, match=said) as error:
        check_optimizer(load_config(words).optim)
    assert "\n" not in str(error.value)


def test_what_a_kind_does_not_use_is_told():
    (line,) = check_optimizer(Optim(kind="lion", eps=1e-8))
    assert line == "warning: optim.eps=1e-08 is not used: optim.kind=lion has none"
    assert check_optimizer(Optim(kind="lamb", eps=1e-8, betas=(0.9, 0.95))) == []


def test_settings_reach_the_kind():
    for kind, config, wanted in (
        ("lamb", {}, {"betas": (0.9, 0.999), "eps": 1e-6}),  # timm's own
        ("lamb", {"betas": (0.8, 0.9), "eps": 1e-3}, {"betas": (0.8, 0.9), "eps": 1e-3}),
        ("adan", {"betas": (0.8, 0.9, 0.95)}, {"betas": (0.8, 0.9, 0.95)}),
        ("muon", {"momentum": 0.8, "options": {"ns_steps": 3}}, {"momentum": 0.8, "ns_steps": 3}),
        ("sgd", {"momentum": 0.8}, {"momentum": 0.8}),
        ("nadamw", {"update_clipping": 2.0}, {"clipping_threshold": 2.0}),
        ("adamw", {"options": {"amsgrad": True}}, {"amsgrad": True, "fused": True, "betas": (0.9, 0.98), "eps": 1e-6}),
    ):
        for group in build_optimizer(model_of(), Optim(kind=kind, **config)).param_groups:
            assert {name: group[name] for name in wanted} == wanted


@pytest.mark.parametrize(
    ("kind", "betas"), [("adamw", (0.9, 0.98)), ("lion", (0.9, 0.99)), ("adan", (0.98, 0.92, 0.99))]
)
def test_a_kind_has_its_own_betas_where_a_config_has_none(kind, betas):
    config = load_config([f"optim.kind={kind}"])
    assert config_from_yaml(dump_config(config)) == config
    assert {group["betas"] for group in build_optimizer(model_of(), config.optim).param_groups} == {betas}


def test_settings_are_the_same_from_yaml():
    words = ['optim.no_decay=["*.bias", "visual.*"]', "optim.lr_scales.logit_scale=0.25", "optim.kind=adan"]
    config = load_config([*words, "optim.betas=[0.9,0.92,0.99]", "optim.options={no_prox: true}"])
    assert config.optim.no_decay == ("*.bias", "visual.*")
    assert config.optim.betas == (0.9, 0.92, 0.99)
    assert config_from_yaml(dump_config(config)) == config


# --- formulas ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_update_clipping_is_that_of_stable_adamw(decay):
    """Wortsman et al., arXiv 2304.13013, algorithm 2: the rate is divided by max(1, RMS of g / root of u), in float64;
    the decay is not, as in Adafactor (timm's way)."""
    torch.manual_seed(0)
    layer = nn.Linear(5, 4, dtype=torch.float64)
    betas, eps, lr = (0.9, 0.95), 1e-9, 0.01
    config = Optim(lr=lr, betas=betas, eps=eps, weight_decay=decay, update_clipping=1.0)
    optimizer = build_optimizer(layer, config)
    theta = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}
    v, u = ({name: torch.zeros_like(value) for name, value in theta.items()} for _ in range(2))
    clipped = 0
    for step in range(1, 8):
        for name, parameter in layer.named_parameters():
            g = parameter.grad = torch.randn_like(parameter) * (30 if step == 5 else 1)  # a sudden gradient
            first, second = (beta * (1 - beta ** (step - 1)) / (1 - beta**step) for beta in betas)
            v[name] = first * v[name] + (1 - first) * g
            u[name] = second * u[name] + (1 - second) * g**2
            rms = (g**2 / torch.clamp(u[name], min=eps**2)).mean().sqrt().item()
            clipped += rms > 1.01
            eta = lr / max(1.0, rms)
            shrink = lr * decay if name == "weight" else 0.0
            theta[name] = theta[name] * (1 - shrink) - eta * v[name] / (u[name].sqrt() + eps)
        optimizer.step()
    assert 2 <= clipped < 14
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.detach(), theta[name], rtol=1e-7, atol=1e-9)


def test_a_group_learns_by_its_share_of_the_rate():
    model = model_of()
    config = Optim(kind="sgd", lr=1.0, weight_decay=0.0, lr_scales={"image": 0.5, "logit_scale": 0.25, "*.proj": 3.0})
    optimizer = build_optimizer(model, config)
    set_lr(optimizer, 0.125)
    before = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.grad = gradients()[0][name].clone()
    optimizer.step()
    for name, parameter in model.named_parameters():
        scale = {"v": 0.5, "l": 0.25, "t": 1.0}[name[0]] * (3.0 if name == "visual.proj" else 1.0)
        wanted = before[name] - 0.125 * scale * gradients()[0][name].double()
        torch.testing.assert_close(parameter.detach().double(), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["adamc", "lambcd"])
def test_a_decay_that_follows_the_rate_follows_the_groups(kind):
    """By lr**2 / its highest: what a group of half the rate decays by is what a run of half the rate does."""
    ends = []
    for config in (Optim(kind=kind, lr=1e-2, lr_scales={"*": 0.5}), Optim(kind=kind, lr=5e-3)):
        model = model_of()
        optimizer = build_optimizer(model, replace(config, weight_decay=5.0))
        for step in range(2):
            for name, parameter in model.named_parameters():
                parameter.grad = gradients()[step][name].clone()
            set_lr(optimizer, config.lr / (step + 1))
            optimizer.step()
        ends.append(model)
    assert same(*ends)


# --- groups -----------------------------------------------------------------------------------------------------------


def test_layer_decay_of_open_clips_towers():
    scales = scales_of(model_of(), layer_decay=0.5)
    for tower, stem, norm, head in (
        ("visual", ("conv1.weight", "class_embedding", "positional_embedding", "ln_pre.weight"), "ln_post", "proj"),
        ("text", ("token_embedding.weight", "positional_embedding"), "ln_final", "text_projection"),
    ):
        assert {scales[f"{tower}.{name}"] for name in stem} == {0.5 ** (LAYERS + 1)}
        for layer in range(LAYERS):
            block = [
                scale for name, scale in scales.items() if name.startswith(f"{tower}.transformer.resblocks.{layer}")
            ]
            assert len(block) == 12
            assert {*block} == {0.5 ** (LAYERS - layer)}
        assert (scales[f"{tower}.{norm}.weight"], scales[f"{tower}.{head}"]) == (0.5, 1.0)
    assert scales["logit_scale"] == 1.0


@pytest.mark.parametrize("name", ["test_vit", "test_convnext"])
def test_layer_decay_of_timms_towers_is_timms(name):
    """One layer lower each, for the projection that stands behind them."""
    model = model_of(name)
    scales, trunk = scales_of(model, layer_decay=0.6), model.visual.trunk
    for group in param_groups_layer_decay(trunk, layer_decay=0.6):
        for own in names_of(trunk, group):
            assert scales[f"visual.trunk.{own}"] == pytest.approx(0.6 * group["lr_scale"])
    assert scales["visual.head.proj.weight"] == scales["text.text_projection"] == 1.0


def test_no_decay_by_pattern():
    model = model_of()
    groups = build_optimizer(model, Optim(no_decay=("*positional_embedding", "text.token_embedding.*"))).param_groups
    (decayed, kept) = (names_of(model, group) for group in groups)
    listed = {"visual.positional_embedding", "text.positional_embedding", "text.token_embedding.weight"}
    usual = names_of(model, build_optimizer(model, Optim()).param_groups[0])
    assert decayed == usual - listed
    assert listed <= kept


@pytest.mark.parametrize(
    "config", [{"no_decay": ("*bias", "vision.*")}, {"lr_scales": {"vision.*": 0.5}}], ids=["no_decay", "lr_scales"]
)
def test_a_pattern_that_matches_nothing_is_one_line(config):
    with pytest.raises(UserError, match=r"has 'vision\.\*', which matches no parameter of the model; .*visual\.\*"):
        build_optimizer(model_of(), Optim(**config))


@pytest.mark.parametrize("timm", [None, "test_vit"])
@pytest.mark.parametrize("projected", [True, False])
def test_muon_takes_hidden_matrices_alone(timm, projected):
    """Keller Jordan's rule: embeddings, heads, gains and biases are AdamW's; convolutions are matrices."""
    model = model_of(timm)
    if not projected:
        model.visual.head, model.visual.proj, model.text.text_projection = nn.Identity(), None, None
    optimizer = build_optimizer(model, Optim(kind="muon"))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    taken = {name for name, parameter in model.named_parameters() if optimizer.state[parameter]["use_muon"]}
    blocks = {name for name, parameter in model.named_parameters() if ".blocks." in name or ".resblocks." in name}
    hidden = {name for name in blocks if model.get_parameter(name).ndim == 2}
    assert taken == hidden | {"visual.trunk.patch_embed.proj.weight" if timm else "visual.conv1.weight"}


# --- restored ---------------------------------------------------------------------------------------------------------


def moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {name: optimizer.state[p]["exp_avg"].clone() for name, p in model.named_parameters() if optimizer.state[p]}


@pytest.mark.parametrize("named", [True, False], ids=["named", "of an older version"])
@pytest.mark.parametrize("kind", ["adamw", "lamb"])
def test_each_parameter_gets_its_own_moments_in_other_groups(kind, named, tmp_path):
    model = model_of()
    optimizer = build_optimizer(model, Optim(kind=kind))
    steps(model, optimizer, range(3))
    state = saved(optimizer, tmp_path)
    for group in state["param_groups"] if not named else ():
        del group["param_names"], group["lr_scale"]
    other = build_optimizer(model, settings(kind))
    assert len(other.param_groups) > 10
    assert restore_optimizer(other, model, state) == []
    wanted, found = moments(model, optimizer), moments(model, other)
    assert wanted.keys() == found.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert {group["lr_scale"] for group in other.param_groups} > {1.0, 0.7}
    if kind == "lamb":
        assert {float(group["step"]) for group in other.param_groups} == {3.0}


def test_what_was_locked_begins_anew_and_the_rest_goes_on(tmp_path):
    model = model_of()
    model.visual.requires_grad_(False)
    optimizer = build_optimizer(model, Optim())
    steps(model, optimizer, range(3))
    state = saved(optimizer, tmp_path)
    wanted = moments(model, optimizer)
    model.visual.requires_grad_(True)
    opened = build_optimizer(model, Optim())
    (line,) = restore_optimizer(opened, model, state)
    count = len([*model.visual.parameters()])
    assert line == f"optimizer: {count} parameters that did not learn before (visual.positional_embedding) begin anew"
    found = moments(model, opened)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    steps(model, opened, range(3, 4))
    assert opened.state[model.visual.proj]["step"] == 1
    assert opened.state[model.text.text_projection]["step"] == 4


def test_steps_that_are_counted_together_take_no_newcomer(tmp_path):
    model = model_of()
    model.visual.requires_grad_(False)
    optimizer = build_optimizer(model, Optim(kind="lamb"))
    steps(model, optimizer, range(1))
    state = saved(optimizer, tmp_path)
    model.visual.requires_grad_(True)
    with pytest.raises(UserError, match=r"counts the step of a group's .*visual\..* would join .*model\.init"):
        restore_optimizer(build_optimizer(model, Optim(kind="lamb")), model, state)


# --- in a run ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def urls(tmp_path_factory) -> str:
    return write_pairs(tmp_path_factory.mktemp("data"), 4, 8, size=16)


RUNS = {
    "lamb": ("optim.kind=lamb", "optim.layer_decay=0.7", "optim.lr_scales.logit_scale=0.25"),
    "muon": ("optim.kind=muon", "optim.no_decay=[text.token_embedding.*]"),
    "clipping": ("optim.update_clipping=1.0", "optim.lr_scales.image=0.1"),
}


@pytest.mark.parametrize(
    "kind", [kind if kind == "lamb" else pytest.param(kind, marks=pytest.mark.slow) for kind in RUNS]
)
def test_a_run_in_fp16_that_skips_a_step_resumes_to_the_bit(kind, tmp_path, urls, monkeypatch):
    """The second of four steps has a gradient that is not finite; the run goes on from there."""
    monkeypatch.setenv(VARIABLE, "nan_gradient@2:0")
    words = (*RUNS[kind], "train.precision=fp16", "checkpoint.every_steps=2", "checkpoint.keep=9")
    train(tiny_config(tmp_path, urls, *words))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["grad_norm"] is None for row in rows] == [False, True, False, False]
    last = tmp_path / "run" / "checkpoints" / "step-000000004"
    wanted = what_is_in(last)
    assert len(wanted[1]["param_groups"]) > 2
    shutil.rmtree(last)
    train(tiny_config(tmp_path, urls, *words))
    assert bitwise_equal(what_is_in(last), wanted)


def what_is_in(checkpoint) -> tuple[dict, dict, dict]:
    """Weights, optimizer and loss scale."""
    tensors = (read_tree(checkpoint / f"{name}.safetensors") for name in ("model", "optimizer"))
    return *tensors, json.loads((checkpoint / "state.json").read_text())["scaler"]


def bitwise_equal(one: object, other: object) -> bool:
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(bitwise_equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(bitwise_equal, one, other))
    return one == other


def test_a_wrong_setting_ends_a_run_before_data_are_read(tmp_path):
    for words, said in (
        (("optim.kind=lam",), "did you mean lamb"),
        (("optim.options={amsgard: true}",), "did you mean amsgrad"),
    ):
        with pytest.raises(UserError, match=said):
            train(tiny_config(tmp_path, "no-such.tar", *words))
    assert not (tmp_path / "run").exists()


def test_changed_options_are_refused_at_a_resume(tmp_path, urls):
    train(tiny_config(tmp_path, urls))
    with pytest.raises(UserError, match=r"optim\.options={'amsgrad': True}, but the checkpoint was written under {}"):
        train(tiny_config(tmp_path, urls, "optim.options={amsgrad: true}", "train.samples=48"))
