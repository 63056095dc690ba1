"""Files of weights as one kind of state dict: that of separate towers, `visual.*`, `text.*` and `logit_scale`.

    state = read_weights(find_weights("ViT-B-32.pt", None))       # {'visual.conv1.weight': ..., 'text....': ...}

open_clip's files hold a model's state dict, by itself or within a training's (`state_dict`, beside its optimizer), of
towers in one (`transformer.*`, the plain CLIP layout) or apart (`text.transformer.*`). Nothing is ever unpickled but
tensors and plain values.
"""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from open_clip.model import convert_to_custom_text_state_dict
from open_clip.pretrained import download_pretrained, get_pretrained_cfg
from safetensors.torch import load_file
from torch import Tensor

from clipscale.checkpoint import load_model
from clipscale.checkpoint.judge import first_not_finite
from clipscale.errors import UserError, require
from clipscale.weights.find import Found

_WRAPPED = ("state_dict", "model")  # under which trainings keep the weights
_PREFIXES = ("module.", "_orig_mod.")  # what DDP and torch.compile put before names
_NO_WEIGHTS = ("text.transformer.embeddings.position_ids", "input_resolution", "context_length", "vocab_size")


def read_weights(found: Found, name: str | None = None) -> dict[str, Tensor]:
    """Tensors by name, on the CPU; they may lie in their file, so copy them at once.

    Args:
        name: the open_clip model, of a tag.

    Raises:
        UserError: no such weights, or some that are not finite.
    """
    if found.kind == "checkpoint":
        state = load_model(found.path, ema=found.ema)
    else:
        state = _as_towers(_tensors(_download(name, str(found.path)) if found.kind == "tag" else found.path))
    bad = first_not_finite(state.items())
    require(not bad, f"{found.words}: {bad} is not finite")
    return state


def _download(name: str | None, tag: str) -> Path:
    """Into Hugging Face's cache, or from it."""
    try:
        return Path(download_pretrained(get_pretrained_cfg(name, tag)))
    except Exception as error:  # whatever a network does
        why = " ".join(str(error).split())
        raise UserError(
            f"the weights {tag} of {name} cannot be fetched: {type(error).__name__}: {why}; fetch them where there is "
            "a network, and give the file"
        ) from error


def _tensors(path: Path) -> dict[str, Any]:
    if path.suffix == ".safetensors":
        return load_file(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an archive of TorchScript's, which is refused below
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise UserError(
            f"{str(path)!r} is no file of tensors, or holds more than tensors and plain values (an archive of "
            "TorchScript's, objects of Python's); save its state dict as safetensors"
        ) from error


def _as_towers(found: Any) -> dict[str, Tensor]:
    for key in _WRAPPED:
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    is_state = isinstance(found, dict) and all(isinstance(value, Tensor) for value in found.values())
    require(bool(found) and is_state, "the file holds no state dict: names of tensors alone, or these as `state_dict`")
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in found):
            found = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
    found = convert_to_custom_text_state_dict(found)
    return {name: tensor for name, tensor in found.items() if name not in _NO_WEIGHTS}
