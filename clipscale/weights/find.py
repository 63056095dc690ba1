"""What a person means by weights: a run, a checkpoint, an exported folder, a file, or a tag of open_clip's.

    found = find_weights("runs/a", "ViT-B-32")
    found.kind, found.path, found.model          # 'checkpoint', runs/a/checkpoints/step-000000500, its config's Model

No torch import: what is not there is told before anything is loaded.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from safetensors import SafetensorError, safe_open

from clipscale.checkpoint import find_checkpoint, load_config_of, require_average
from clipscale.config import Model, Preprocess
from clipscale.errors import UserError, reason, require
from clipscale.upstream.open_clip_files import pretrained_tags
from clipscale.words import did_you_mean

CONFIG = "open_clip_config.json"
WEIGHTS = "open_clip_model.safetensors"
_IN_FOLDERS = (  # where open_clip looks in a folder, in this order
    WEIGHTS,
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    "model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.pth",
    "model.pth",
)
_TOKENIZER = "tokenizer_config.json"  # a folder without it has none of Hugging Face's


@dataclass(frozen=True)
class Found:
    """Weights that are there.

    path: a checkpoint's folder, or the file of the weights; a tag's name.
    model: what the weights are of; None: a file or tag does not say.
    ema: of a checkpoint, the average of its weights.
    """

    kind: Literal["checkpoint", "folder", "file", "tag"]
    path: Path
    model: Model | None = None
    ema: bool = False

    @property
    def words(self) -> str:
        kinds = {"checkpoint": "checkpoint", "folder": "exported model", "file": "file", "tag": "weights of open_clip"}
        return f"{'averaged weights of ' * self.ema}{kinds[self.kind]} {self.path}"


def find_weights(text: str, name: str | None, *, ema: bool = False) -> Found:
    """
    Args:
        text: a path, or one of open_clip's tags.
        name: the open_clip model whose tag it may be.
        ema: the average of a checkpoint's weights is meant.

    Raises:
        UserError: nothing of the kind, a checkpoint that does not verify, or one without an average.
    """
    found = _find(text, name)
    if not ema:
        return found
    require(found.kind == "checkpoint", f"{found.words} has no averaged weights: only runs and checkpoints have")
    require_average(found.path)
    return replace(found, ema=True)


def _find(text: str, name: str | None) -> Found:
    path = Path(text)
    if path.is_dir():
        if (path / CONFIG).is_file():
            return Found("folder", _weights_in(path), _model_in(path))
        found = find_checkpoint(text)
        return Found("checkpoint", found, load_config_of(found).model)
    if path.is_file():
        _look_into(path)
        return Found("file", path)
    tags = pretrained_tags(name) if name is not None else []
    tag = text.lower().replace("-", "_")  # as open_clip reads them
    if tag in tags:
        return Found("tag", Path(tag))
    hint = did_you_mean(text, tags) or (f"the tags of {name} are {', '.join(tags)}" if tags else "")
    raise UserError(
        f"no weights: {text!r} is {f'no file, no folder and no tag of {name}' if name else 'no file and no folder'}"
        + (f"; {hint}" if hint else "")
    )


def _weights_in(folder: Path) -> Path:
    there = [path for name in _IN_FOLDERS if (path := folder / name).is_file()]
    require(bool(there), f"{str(folder)!r} has a {CONFIG} and no weights; {WEIGHTS} is missing")
    _look_into(there[0])
    return there[0]


def _look_into(path: Path) -> None:
    """A safetensors file has a head, which tells whether it is one and whole; others show when they are read."""
    try:
        with open(path, "rb") as file:
            require(bool(file.read(1)), f"{str(path)!r} is empty")
        if path.suffix == ".safetensors":
            with safe_open(path, framework="np"):
                pass
    except SafetensorError as error:
        raise UserError(f"{str(path)!r} is no safetensors file, or not whole: {error}") from error
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be read: {reason(error)}") from error


def _model_in(folder: Path) -> Model:
    """The model that a folder of open_clip's describes."""
    path = folder / CONFIG
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        fields: dict[str, Any] = content["model_cfg"]
        vision, text = dict(fields["vision_cfg"]), dict(fields["text_cfg"])
        width, preprocess = fields["embed_dim"], preprocess_from(content.get("preprocess_cfg") or {})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{str(path)!r} describes no model of open_clip's: {type(error).__name__}: {error}") from error
    if text.get("hf_model_name"):
        text["hf_model_pretrained"] = False  # all of it lies here
    if text.get("hf_tokenizer_name") and (folder / _TOKENIZER).is_file():
        text["hf_tokenizer_name"] = str(folder)  # as open_clip reads a folder
    return Model(
        embed_dim=width,
        vision=vision,
        text=text,
        quick_gelu=bool(fields.get("quick_gelu", False)),
        preprocess=preprocess,
    )


def preprocess_from(fields: dict[str, Any]) -> Preprocess:
    """open_clip's preprocess_cfg; what it does not say is as usual.

    Raises:
        UserError: a way to resize that there is none of here.
    """
    known = get_type_hints(Preprocess)
    found = {name: value for name, value in fields.items() if name in known and value is not None}
    for name, value in found.items():
        if get_origin(known[name]) is Literal:
            require(value in get_args(known[name]), f"{name}={value!r} is none of {', '.join(get_args(known[name]))}")
        elif isinstance(value, list):
            found[name] = tuple(value)
    return Preprocess(**found)
