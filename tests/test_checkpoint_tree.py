"""clipscale/checkpoint/tree.py: what a checkpoint's tensors and plain values come back as."""

import json
import math
import resource
import signal
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from clipscale.checkpoint import tree as tree_module
from clipscale.checkpoint.tree import flatten, read_tree, unflatten, write_tree
from clipscale.config import Optim
from clipscale.errors import UserError
from clipscale.optim import build_optimizer


def same(a, b) -> bool:
    """Kinds, values to the bit (nan is nan), shapes, types and strides."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        if (a.dtype, a.shape, a.stride()) != (b.dtype, b.shape, b.stride()):
            return False
        plain = [each.contiguous().view(-1).view(torch.uint8) for each in (a, b)] if a.numel() else [a, b]
        return torch.equal(*plain)
    if isinstance(a, dict):
        return [*map(repr, a)] == [*map(repr, b)] and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return repr(a) == repr(b)


@pytest.fixture
def around(tmp_path):
    """around(tree): written and read."""

    def write_and_read(tree):
        write_tree(tmp_path / "tree.safetensors", tree)
        return read_tree(tmp_path / "tree.safetensors")

    return write_and_read


TYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8, torch.bool]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (5,), (2, 3, 4, 5)], ids=str)
def test_tensors_of_every_type_and_shape(around, dtype, shape):
    tensor = (torch.rand(shape, dtype=torch.float64, generator=torch.manual_seed(1)) * 9).to(dtype)
    tree = {"a": tensor, 1: [tensor.clone(), (tensor.clone(),)]}
    assert same(around(tree), tree)


def test_numbers_that_are_none_keep_their_bits(around):
    bits = torch.tensor([0x7FC00001, 0x7F800000, -1, -(2**31), 1], dtype=torch.int32)  # nans, inf, -0.0, the smallest
    assert same(around(bits.view(torch.float32)), bits.view(torch.float32))


def test_plain_values_keep_kind_and_bits(around):
    numbers = [0.1, 1 / 3, -0.0, 5e-324, 1e308, math.inf, -math.inf, math.nan, 2.0]
    tree = {
        "floats": numbers,
        "rest": (True, False, None, 1, 0, 2**63, -(10**30), "", "naïve 𝄞 \ud800 \n", [], (), {}),
        "keys": {0: "int", "0": "str", 1: torch.ones(1), "1": torch.zeros(1), "a/b": {"c": torch.ones(2)}},
        "a": {"b/c": torch.zeros(2)},
    }
    assert same(around(tree), tree)


@pytest.mark.parametrize("root", [3, "x", None, [], {}, torch.arange(3)], ids=repr)
def test_any_root(around, root):
    assert same(around(root), root)


def test_a_dict_of_any_kind_is_a_dict(around):
    assert same(around(OrderedDict(a=1)), {"a": 1})


def test_memory_layout_is_kept(around):
    picture = torch.arange(2 * 3 * 4 * 5.0).view(2, 3, 4, 5)
    tree = {
        "channels last": picture.contiguous(memory_format=torch.channels_last),
        "one pixel": torch.empty_strided((4, 3, 1, 1), (3, 1, 3, 3)).fill_(2.5),
        "3d": picture[None].contiguous(memory_format=torch.channels_last_3d),
        "transposed": torch.rand(3, 4).T,
        "expanded": torch.rand(3, 1, 2).expand(3, 4, 2),
        "one for all": torch.tensor(2.5).expand(7, 7),
        "expanded and turned": torch.rand(3, 4).T[:, None].expand(4, 2, 3),
    }
    assert same(around(tree), tree)


def test_what_has_gaps_comes_back_without(around):
    values = torch.arange(12.0).view(3, 4)
    found = around({"columns": values[:, 1:3], "rows": torch.arange(9.0)[::2]})
    assert same(found, {"columns": values[:, 1:3].contiguous(), "rows": torch.arange(0.0, 9, 2)})


def shares(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def test_ties_are_saved_once_and_tied_again(around, tmp_path):
    weight, flat = torch.rand(100, 30), torch.rand(40)
    tree = {
        "bias": flat[5:10],  # before what it lies in
        "weight": weight,
        "head": weight.T,
        "again": [weight, nn.Parameter(weight)],
        "rows": weight[10:20, ::2],
        "flat": flat,
        "apart": weight.clone(),
    }
    found = around(tree)
    assert (tmp_path / "tree.safetensors").stat().st_size < 2 * weight.nbytes + 2000
    plain = tree | {"again": [weight, weight]}
    assert same(found, plain)
    tied = [found["head"], *found["again"], found["rows"]]
    assert all(shares(found["weight"], each) for each in tied)
    assert shares(found["bias"], found["flat"])
    assert not shares(found["weight"], found["apart"])
    found["weight"].fill_(7)
    assert all((each == 7).all() for each in tied)
    found["flat"][5] = 9
    assert found["bias"][0] == 9


def test_pieces_of_one_memory_that_do_not_meet_are_saved_apart(around):
    flat = torch.rand(12)
    tree = {"a": flat[:4], "b": flat[4:8].view(2, 2), "overlapping": flat[7:12]}
    assert same(around(tree), tree)
    tree["whole as integers"] = flat.view(torch.int32)
    assert same(around(tree), tree)


def test_equal_expanded_tensors_are_one(around):
    one = torch.rand(3, 1).expand(3, 5)
    found = around({"a": one, "b": one})
    assert shares(found["a"], found["b"])


def test_others_read_the_tensors(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Linear(4, 2)).to(memory_format=torch.channels_last)
    write_tree(tmp_path / "model.safetensors", model.state_dict())
    read = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(read[name], tensor) for name, tensor in model.state_dict().items())
    assert read.keys() == model.state_dict().keys()


# --- optimizers -------------------------------------------------------------------------------------------------------


def own(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW that is not fused, with all it can keep in its groups."""
    rates = [{"params": [each], "lr": torch.tensor(0.1 / n)} for n, each in enumerate(model.parameters(), 1)]
    return torch.optim.AdamW(rates, betas=(0.9, 0.95), amsgrad=True)


KINDS = {
    "adamw": lambda model: build_optimizer(model, Optim(kind="adamw")),
    "sgd": lambda model: build_optimizer(model, Optim(kind="sgd", betas=[0.9, 0.98])),
    "adamw not fused": own,
    "sgd momentum": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True),
    "adafactor": lambda model: torch.optim.Adafactor(model.parameters()),
}


def trained(kind: str, loaded: dict | None = None) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model of channels-last and bf16 parameters and its optimizer, three steps on from `loaded`."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Flatten(), nn.Linear(4, 2)).to(memory_format=torch.channels_last)
    optimizer = KINDS[kind](model)
    if loaded is not None:
        model.load_state_dict(loaded["model"])
        optimizer.load_state_dict(loaded["optimizer"])
    for step in range(3):
        model(torch.rand(5, 3, 2, 2, generator=torch.manual_seed(step))).square().sum().backward()
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("kind", KINDS)
def test_an_optimizer_goes_on_as_if_it_had_not_been_saved(around, kind):
    model, optimizer = trained(kind)
    state = {"model": dict(model.state_dict()), "optimizer": optimizer.state_dict()}
    found = around(state)
    assert same(found, state)
    found["model"] = {name: tensor.clone() for name, tensor in found["model"].items()}
    resumed = [each.state_dict() for each in trained(kind, found)]
    straight = [each.state_dict() for each in trained(kind, state)]
    assert same([dict(resumed[0]), resumed[1]], [dict(straight[0]), straight[1]])


# --- refused and damaged ----------------------------------------------------------------------------------------------


class Sharded(torch.Tensor):
    """Such as one of FSDP: more than its numbers."""


@pytest.mark.parametrize(
    ("tree", "what"),
    [
        ({"a": [1, {2}]}, "a/1 is a set"),
        ({"lr": np.float64(0.1)}, "lr is a float64"),
        ({"a": {(1, 2): 3}}, "a has the key"),
        ({True: 3}, "has the key True"),
        ({"path": Path("x")}, "path is a PosixPath"),
        ({"a": torch.eye(3).to_sparse()}, "a is a Tensor of torch.sparse_coo"),
        ({"a": torch.ones(2, dtype=torch.complex64).conj()}, "a is a Tensor of torch.strided"),
        ({"a": torch.ones(2).as_subclass(Sharded)}, "a is a Sharded of"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_held_is_named(around, tree, what):
    with pytest.raises(TypeError, match=what.replace("(", r"\(")):
        around(tree)


def test_a_file_that_cannot_grow_says_why(tmp_path):
    tree = {"a": torch.ones(100_000)}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as error:
            write_tree(tmp_path / "a.safetensors", tree)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert error.value.filename == str(tmp_path / "a.safetensors")


def node(tree: object, **strides: list[int]) -> dict[str, str]:
    return {"tree": json.dumps({"tree": tree, "strides": strides})}


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {"tree": "no json"},
        node({"pickle": "x"}),
        node({"tensor": "b"}),
        node({"view": "a", "shape": [9], "strides": [1], "offset": 0}),
        node({"view": "a", "shape": [2], "strides": [1], "offset": -2}),
        node({"tensor": "a", "expand": [7]}),
        node({"tensor": "a"}, a=[10**12]),
        node({"float": [1]}),
        node({"dict": [[[1], 2]]}),
    ],
    ids=repr,
)
def test_a_damaged_or_hostile_file_is_refused(tmp_path, metadata):
    save_file({"a": torch.ones(3)}, tmp_path / "x.safetensors", metadata)
    with pytest.raises(UserError, match="holds more than tensors and plain values, or is damaged"):
        read_tree(tmp_path / "x.safetensors")


def test_a_tensor_that_is_read_has_memory_of_its_own_unless_told(tmp_path):
    path = tmp_path / "x.safetensors"
    write_tree(path, {"a": torch.zeros(5000)})
    found = read_tree(path)
    with open(path, "r+b") as file:
        file.seek(-20_000, 2)
        file.write(b"\1" * 20_000)
    assert not found["a"].any()


def test_staged_tensors_keep_their_memory():
    tree = {"a": torch.rand(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)}
    structure, tensors = flatten(tree)
    assert shares(unflatten(structure, tensors)["a"], tree["a"])


def views_of_one_memory(seed: int) -> dict[str, torch.Tensor]:
    """Pieces at drawn places of drawn lengths, none among them, some turned, some of another type."""
    draw = np.random.default_rng(seed)
    flat = torch.arange(24, dtype=torch.float32)
    kinds = (torch.float32, torch.float32, torch.int32, torch.uint8)
    found = {}
    for number in range(draw.integers(1, 9)):
        start = draw.integers(0, 24)
        piece = flat[start : start + draw.integers(0, 9)].view(kinds[draw.integers(4)])
        found[str(number)] = piece.view(2, -1).T if len(piece) % 4 == 0 and len(piece) and draw.integers(2) else piece
    return found


def test_only_what_shares_bytes_is_compared(monkeypatch):
    """The same of each storage as a whole; and thousands side by side, as they are staged, cost no comparison."""
    trees = [views_of_one_memory(seed) for seed in range(400)]
    found = [flatten(tree)[0] for tree in trees]
    ties = [structure for structure in found if "view" in str(structure)]
    assert 100 < len(ties) < 400
    compared = []
    monkeypatch.setattr(tree_module, "_seen_in", lambda *pair: compared.append(pair))
    flat = torch.zeros(3000)
    assert len(flatten({"state": [flat[place : place + 1] for place in range(3000)]})[1]) == 3000
    assert not compared
    monkeypatch.undo()
    monkeypatch.setattr(tree_module, "_memories", lambda leaves: [[*leaves]])
    assert [flatten(tree)[0] for tree in trees] == found
