"""clipscale/bench/loss/peers.py on stand-ins with the signatures and conventions of the packages, which need a GPU."""

import importlib
import inspect
import sys
import types
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from bench_words import loss_bench

from clipscale.bench.loss.case import Budget, Case, CaseRun
from clipscale.bench.loss.peers import peer_contestants
from clipscale.bench.loss.team import Team
from clipscale.dist import World
from clipscale.loss import dense_contrastive_loss

CPU = torch.device("cpu")
ALONE = Team(World(0, 1, 0, CPU))
PEERS = ("inf-cl", "memeff", "siglip-kernel", "open_clip")


def cal_inf_loss(q, k, labels=None, scale=None, head_dim=256):
    """inf-cl 1.2.1: one direction; heads of a power of two; a scale of its own would need a process group."""
    assert labels is None
    assert scale is None
    assert head_dim in (16, 32, 64, 128, 256)
    q, k = (side.view(len(side), -1, head_dim).float().flatten(1) for side in (q, k))
    return F.cross_entropy(q @ k.T, torch.arange(len(q)))


class MemoryEfficientCLIPLoss(torch.nn.Module):
    """memeff 0.3.1: gradients times sqrt(B temperature) by default, and the temperature a number."""

    def __init__(self, temperature=0.07, normalized_inputs=False, stable=True, tau_plus=0.0, label_smoothing=0.0):
        super().__init__()
        assert isinstance(temperature, float)
        assert normalized_inputs
        self.temperature, self.stable = temperature, stable

    def forward(self, image_features, text_features, tau_plus=None):
        loss = dense_contrastive_loss(image_features.float(), text_features.float(), 1 / self.temperature)
        factor = (len(image_features) * self.temperature) ** 0.5 if self.stable else 1.0
        return loss.detach() + (loss - loss.detach()) * factor


def fused_siglip_loss(img_features, txt_features, log_temperature, bias, use_fp8=False, backend="auto"):
    """siglip-kernel 0.1.2: tensors for temperature and bias; the loss in the inputs' type."""
    assert log_temperature.shape == bias.shape == ()
    logits_BB = log_temperature.exp() * (img_features.float() @ txt_features.float().T) + bias
    target_BB = torch.eye(len(logits_BB))
    loss = F.binary_cross_entropy_with_logits(logits_BB, target_BB, reduction="sum") / len(logits_BB)
    return loss.to(img_features.dtype)


@pytest.fixture
def stand_ins(monkeypatch):
    monkeypatch.setattr("clipscale.bench.common.matmul._SIZE", {"cpu": 32, "cuda": 256})
    for module, thing in (
        ("inf_cl", cal_inf_loss),
        ("memeff", MemoryEfficientCLIPLoss),
        ("siglip_kernel", fused_siglip_loss),
    ):
        stand_in = types.ModuleType(module)
        setattr(stand_in, thing.__name__, thing)
        monkeypatch.setitem(sys.modules, module, stand_in)


def run(contestants, case, team=ALONE):
    options = loss_bench("--seconds", "0.01")
    rows = CaseRun(team, replace(options, error_limit=10**6), Budget(0.01, 120.0), case).run(contestants)["rows"]
    return {row["contestant"]: row for row in rows}


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_every_peer_is_called_so_that_it_computes_the_loss(stand_ins, precision):
    """On the rounded tensors; what a peer returns in half precision is rounded to it."""
    rows = run(peer_contestants(ALONE), Case(300, 48, precision))
    assert tuple(rows) == PEERS
    for name, row in rows.items():
        assert row["status"] == "measured", (name, row["status"])
        bar = {"fp32": 1e-5, "fp16": 2e-3, "bf16": 1e-2}[precision]
        if name in ("open_clip", "inf-cl"):
            bar *= 20  # these round scaled logits or embeddings to the inputs' type themselves
        assert row["error"]["d_image"] < bar, (name, row["error"])
        assert row["error"]["d_text"] < bar, (name, row["error"])
        assert row["error"]["loss"] < bar, (name, row["error"])
        assert (row["error"]["d_scale"] is None) == (name == "memeff")
        assert min(row["backward_ms"]["all"]) > 0
        assert row["flop"] == (6 if name == "siglip-kernel" else 8) * 300**2 * 48


def test_inf_cl_is_given_heads_that_divide_the_width(stand_ins):
    contestants = [one for one in peer_contestants(ALONE) if one.name == "inf-cl"]
    for width in (768, 512, 80):
        assert run(contestants, Case(8, width, "fp32"))["inf-cl"]["error"]["d_image"] < 1e-3  # at a loss near zero
    status = run(contestants, Case(8, 24, "fp32"))["inf-cl"]["status"]
    assert status == "failed: width 24: inf-cl needs a multiple of 16"


def test_peers_that_are_not_there(monkeypatch):
    class Finder:
        def find_spec(self, name, path=None, target=None):
            if name == "siglip_kernel":
                raise RuntimeError("Found no NVIDIA driver on your system.\nPlease check.")
            if name in ("inf_cl", "needed_by_memeff"):
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
            if name == "memeff":
                raise ModuleNotFoundError("No module named 'needed_by_memeff'", name="needed_by_memeff")

    for module in ("inf_cl", "memeff", "siglip_kernel"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    problems = {one.name: one.problem for one in peer_contestants(ALONE)}
    assert problems == {
        "inf-cl": "not installed",
        "memeff": "failed: No module named 'needed_by_memeff'",
        "siglip-kernel": "failed: Found no NVIDIA driver on your system.",
        "open_clip": "",
    }


def test_peers_run_on_one_rank(stand_ins):
    real = peer_contestants(Team(World(0, 2, 0, CPU)))
    assert {one.problem for one in real} == {"one rank only"}
    simulated = Team(World(0, 1, 0, CPU), simulated=2)
    rows = run(peer_contestants(simulated), Case(300, 48, "fp32"), simulated)
    assert all(row["error"]["d_image"] < 1e-4 for row in rows.values())


def test_on_a_gpu_open_clip_runs_under_autocast_too(stand_ins):
    names = [one.name for one in peer_contestants(Team(World(0, 1, 0, torch.device("cuda"))))]
    assert names == ["inf-cl", "memeff", "siglip-kernel", "open_clip, autocast", "open_clip"]


@pytest.mark.needs("peers")
def test_the_installed_peers_have_the_signatures_of_the_stand_ins():
    for module, stand_in in (
        ("inf_cl", cal_inf_loss),
        ("memeff", MemoryEfficientCLIPLoss),
        ("siglip_kernel", fused_siglip_loss),
    ):
        package = importlib.import_module(module)
        assert inspect.signature(getattr(package, stand_in.__name__)) == inspect.signature(stand_in)


@pytest.mark.gpu
def test_the_installed_peers_compute_the_loss():
    """Within bf16's error at a small batch; d_scale aside, for which half precision makes no promise."""
    team = Team(World(0, 1, 0, torch.device("cuda")))
    rows = run([one for one in peer_contestants(team) if one.problem != "not installed"], Case(2048, 512, "bf16"), team)
    for name, row in rows.items():
        assert row["status"] == "measured", (name, row["status"])
        assert row["extra_bytes"] > 0
        assert max(row["error"]["d_image"], row["error"]["d_text"]) < 0.05, (name, row["error"])
