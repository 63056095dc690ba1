"""A tree of tensors and plain values as one safetensors file; nothing in it is ever unpickled.

    write_tree("optimizer.safetensors", {"state": {0: {"step": step, "exp_avg": m}}, "lr": 1e-3})
    read_tree("optimizer.safetensors")           # the same: kinds of keys and values, memory layouts, ties

Trees are dict, list and tuple of tensors, float, int, bool, str and None. A dict's keys are str or int, and a dict of
any kind comes back as a dict. The file holds contiguous tensors of their own shapes under flat names: a flat dict's
keys, else "state/0/exp_avg". So any reader of safetensors reads them. The rest is JSON in its metadata, under "tree":

    {"tree": {"dict": [["state", {"dict": [[0, ...]]}], ["lr", {"float": "0.001"}]]},
     "strides": {name: [...]}}                   # of the tensors whose strides are not a contiguous tensor's

with {"list": [...]}, {"tuple": [...]}, {"tensor": name}, {"tensor": name, "expand": shape} for what is expanded to a
shape, and {"view": name, "shape": ..., "strides": ..., "offset": ...} for what shares the memory of a tensor.
A tensor with gaps, such as every second row of another, comes back without them; one that shares memory in another way
than as a view of a whole one of its type comes back with memory of its own.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from clipscale.errors import UserError

_KEY = "tree"  # of the metadata
_OS_ERROR = re.compile(r"os error (\d+)")
_DAMAGED = (SafetensorError, LookupError, ValueError, TypeError, RuntimeError, AttributeError)


def write_tree(path: Path, tree: Any) -> None:
    """Write a new file; it is not synced.

    Raises:
        OSError: it cannot be written.
        TypeError: the tree holds something else.
    """
    structure, tensors = flatten(tree)
    contiguous = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(contiguous, path, {_KEY: json.dumps(structure)})  # which lets other threads run
    except SafetensorError as error:
        number = int(match[1]) if (match := _OS_ERROR.search(str(error))) else errno.EIO
        raise OSError(number, os.strerror(number) if match else str(error), str(path)) from error


def read_tree(path: Path, *, mapped: bool = False) -> Any:
    """The tree, its tensors on the CPU.

    Args:
        mapped: tensors may lie in the file, which has to stay as long as they do: for those that are copied at once.

    Raises:
        UserError: no file of `write_tree`.
    """
    try:
        with safe_open(path, framework="pt") as file:
            structure = json.loads(file.metadata()[_KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
        return unflatten(structure, tensors if mapped else {name: each.clone() for name, each in tensors.items()})
    except _DAMAGED as error:
        raise UserError(
            f"{path} holds more than tensors and plain values, or is damaged; use another checkpoint"
        ) from error


def flatten(tree: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What JSON can hold of a tree, and the tensors by name that have memory of their own, each once.

    Raises:
        TypeError: something that is neither a dense tensor nor one of the plain values, by its place.
    """
    leaves: dict[str, _Leaf] = {}
    encoded = _encode(tree, (), leaves)
    tensors = _share(leaves)
    strides = {name: [*each.stride()] for name, each in tensors.items() if each.stride() != _default_strides(each)}
    return {
        "tree": encoded,
        "strides": {name: its for name, its in strides.items() if _is_dense(tensors[name])},
    }, tensors


def unflatten(structure: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    """The tree again, on the memory of `tensors` where their strides are those of the structure."""
    strides = structure["strides"]
    return _decode(structure["tree"], {name: _laid_out(each, strides.get(name)) for name, each in tensors.items()})


# --- to JSON ----------------------------------------------------------------------------------------------------------


class _Leaf(NamedTuple):
    tensor: Tensor
    node: dict[str, Any]  # what JSON says of it


def _encode(value: Any, path: tuple[str, ...], leaves: dict[str, _Leaf]) -> Any:
    """The tree as JSON; each tensor goes into `leaves` with its node, to which `_share` adds."""
    if isinstance(value, Tensor):
        plain = value.detach()
        if type(plain) is not Tensor or plain.layout != torch.strided or plain.is_conj() or plain.is_neg():
            what = f"{type(plain).__name__} of {plain.layout}"
            raise TypeError(f"{'/'.join(path)} is a {what}: a checkpoint cannot hold it as it is")
        name = "/".join(path) or "tensor"
        while name in leaves:  # the keys 0 and "0" of one dict
            name += "~"
        node: dict[str, Any] = {}
        leaves[name] = _Leaf(plain, node)
        return node
    if isinstance(value, dict):
        if wrong := [key for key in value if type(key) not in (str, int)]:
            raise TypeError(f"{'/'.join(path)} has the key {wrong[0]!r}: a checkpoint's are str or int")
        return {"dict": [[key, _encode(item, (*path, str(key)), leaves)] for key, item in value.items()]}
    if type(value) in (list, tuple):
        items = [_encode(item, (*path, str(place)), leaves) for place, item in enumerate(value)]
        return {type(value).__name__: items}
    if type(value) is float:
        return {"float": repr(value)}  # inf and nan too, and to the bit
    if value is None or type(value) in (bool, int, str):
        return value
    raise TypeError(f"{'/'.join(path)} is a {type(value).__name__}: a checkpoint holds tensors and plain values only")


def _share(leaves: dict[str, _Leaf]) -> dict[str, Tensor]:
    """The tensors to save, and what the nodes say: in the same memory the widest is saved, the others are views."""
    saved: dict[str, Tensor] = {}
    for names in _memories(leaves):
        bases: list[str] = []
        for name in sorted(names, key=lambda name: -_nbytes(leaves[name].tensor)):
            tensor, node = leaves[name]
            found = next(
                (known for base in bases if (known := _seen_in(tensor, base, leaves[base], saved[base]))), None
            )
            if found is None:
                met = any(_meet(tensor, saved[base]) for base in bases)
                if not met:
                    bases.append(name)
                saved[name], found = _alone(name, tensor.clone() if met else tensor)
            node.update(found)
    return {name: saved[name] for name in leaves if name in saved}


def _memories(leaves: dict[str, _Leaf]) -> list[list[str]]:
    """The names, apart where no byte is shared: thousands of staged tensors lie side by side in one storage."""
    storages: dict[int, list[str]] = defaultdict(list)
    for name, (tensor, _) in leaves.items():
        storages[tensor.untyped_storage()._cdata].append(name)
    found: list[list[str]] = []
    for names in storages.values():
        end, last = 0, -1
        for name in sorted(names, key=lambda name: _start(leaves[name].tensor)):
            start = _start(leaves[name].tensor)
            if start >= end and start != last:  # two that are empty share a place, and no byte
                found.append([])
            found[-1].append(name)
            end, last = max(end, start + _nbytes(leaves[name].tensor)), start
    places = {name: place for place, name in enumerate(leaves)}
    return [sorted(names, key=places.__getitem__) for names in found]


def _seen_in(tensor: Tensor, base: str, leaf: _Leaf, saved: Tensor) -> dict[str, Any] | None:
    """The node of a tensor that lies in the memory of a saved one; None: it does not, or not all of it is saved."""
    if tensor.dtype != saved.dtype:
        return None
    if _place(tensor) == _place(leaf.tensor):
        return leaf.node
    offset = tensor.storage_offset() - saved.storage_offset()
    inside = tensor.numel() and 0 <= offset <= saved.numel() - _span(tensor)
    if not inside or not _is_dense(saved):
        return None
    return {"view": base, "shape": [*tensor.shape], "strides": [*tensor.stride()], "offset": offset}


def _alone(name: str, tensor: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """What is saved of a tensor (of what is expanded, one), and its node."""
    sizes = [1 if stride == 0 else size for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    if sizes == [*tensor.shape] or not tensor.numel():
        return tensor, {"tensor": name}
    return tensor[tuple(slice(size) for size in sizes)], {"tensor": name, "expand": [*tensor.shape]}


def _place(tensor: Tensor) -> tuple:
    return tensor.storage_offset(), tensor.shape, tensor.stride()


def _span(tensor: Tensor) -> int:
    """Elements of memory from the first to the last."""
    sides = zip(tensor.shape, tensor.stride(), strict=True)
    return 1 + sum((size - 1) * stride for size, stride in sides) if tensor.numel() else 0


def _nbytes(tensor: Tensor) -> int:
    return _span(tensor) * tensor.element_size()


def _start(tensor: Tensor) -> int:
    """In bytes, in its storage."""
    return tensor.storage_offset() * tensor.element_size()


def _meet(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one memory overlap."""
    return _start(one) < _start(other) + _nbytes(other) and _start(other) < _start(one) + _nbytes(one)


def _is_dense(tensor: Tensor) -> bool:
    return _fills(tensor.shape, tensor.stride())


def _fills(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether a tensor of these strides has no gaps, and each element a place of its own."""
    expected = 1
    for stride, size in sorted((stride, size) for size, stride in zip(shape, strides, strict=True) if size > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _default_strides(tensor: Tensor) -> tuple[int, ...]:
    return torch.empty(tensor.shape, device="meta").stride()


# --- from JSON --------------------------------------------------------------------------------------------------------


def _laid_out(tensor: Tensor, strides: list[int] | None) -> Tensor:
    if strides is None or [*tensor.stride()] == strides:
        return tensor
    if not _fills(tensor.shape, strides):
        raise ValueError(f"strides {strides} of a tensor of shape {[*tensor.shape]}")
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype).copy_(tensor)


def _decode(node: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(node, dict):
        return node
    if "tensor" in node:
        tensor = tensors[node["tensor"]]
        return tensor.expand(node["expand"]) if "expand" in node else tensor
    if "view" in node:
        base = tensors[node["view"]]
        return base.as_strided(node["shape"], node["strides"], base.storage_offset() + node["offset"])
    ((kind, inner),) = node.items()
    if kind == "float":
        return float(inner)
    if kind == "dict":
        return {key: _decode(item, tensors) for key, item in inner}
    return {"list": list, "tuple": tuple}[kind](_decode(item, tensors) for item in inner)
