"""What open_clip knows of models and of ImageNet, read from its files: importing it takes seconds, and torch.

check_model(config.model)  # raises UserError for a name, a field or a combination that cannot be built
model_settings("ViT-B-32")  # {"embed_dim": 512, "vision_cfg": {...}, "text_cfg": {...}}
model_fields(config.model)  # the same of a model by name or of one's own, its changes of size among them
pretrained_tags("ViT-B-32")  # ["openai", "laion400m_e31", ...]
imagenet_classes(), imagenet_templates()  # 1,000 names, 80 templates with '{}' for the name
module_of("tokenizer").SimpleTokenizer()  # without the rest of open_clip
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import json
import math
import sys
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from clipscale.config import Model
from clipscale.errors import UserError, require

CLIP_TOKENS = 49_408  # in CLIP's BPE
_MODEL_PARTS = {"embed_dim", "vision_cfg", "text_cfg"}
_TRAINABLE = _MODEL_PARTS | {"quick_gelu", "custom_text", "init_logit_scale", "init_logit_bias"}
_HUGGING_FACE = ("hf_model_name", "hf_tokenizer_name")
_TOKENIZER = ("hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs")


@dataclass(frozen=True)
class TokenizerChoice:
    """Which of open_clip's tokenizers: that of its model `model`, else one of Hugging Face, else CLIP's BPE."""

    context_length: int  # L, tokens of a caption
    model: str | None = None
    hugging_face: str | None = None  # name or folder of a tokenizer there
    mode: str | None = None  # how open_clip's HFTokenizer puts special tokens
    options: dict[str, Any] = field(default_factory=dict)  # its other settings

    @property
    def name(self) -> str:
        """Two of one name give the same ids."""
        details = [self.mode, *(f"{key}={value}" for key, value in sorted(self.options.items()))]
        return self.model or " ".join(filter(None, [self.hugging_face, *details])) or "CLIP"


def check_model(model: Model) -> None:
    """Raise UserError unless open_clip's fields know this model, by its name or as it is described."""
    if model.vision is None:
        text, what = _check_name(model.name)["text_cfg"], f"model.name={model.name!r}"
    else:
        _check_fields("CLIPVisionCfg", model.vision, "model.vision")
        _check_fields("CLIPTextCfg", model.text, "model.text")
        _check_tokenizer(model.text)
        text, what = model.text, "model.text"
    of_hugging_face = [text[key] for key in _HUGGING_FACE if text.get(key)]
    require(
        not of_hugging_face or importlib.util.find_spec("transformers") is not None,
        f"{what} has its text tower or tokenizer ({', '.join(dict.fromkeys(map(str, of_hugging_face)))}) from Hugging "
        "Face, whose package transformers is not installed; pip install 'clipscale[hf]'",
    )


def model_settings(name: str) -> dict[str, Any] | None:
    """The content of open_clip's JSON of this name, to be changed at will; None: there is none."""
    if _loaded() is not None:
        return _loaded().get_model_config(name)
    return _read(_shipped()[name]) if name in _shipped() else None


def model_fields(model: Model) -> dict[str, Any]:
    """`embed_dim`, `vision_cfg`, `text_cfg` and `quick_gelu` of a model that `check_model` lets pass, as open_clip's
    JSON has them; to be changed at will."""
    if model.vision is None:
        settings = model_settings(model.name)
        fields = {key: settings[key] for key in sorted(_MODEL_PARTS)}
        fields["quick_gelu"] = settings.get("quick_gelu", False)
    else:
        text = dict(model.text)
        if text.get("hf_model_name"):  # another tokenizer would give ids of another vocabulary
            text["hf_tokenizer_name"] = text.get("hf_tokenizer_name") or text["hf_model_name"]
        fields = {"embed_dim": model.embed_dim, "vision_cfg": dict(model.vision), "text_cfg": text}
        fields["quick_gelu"] = model.quick_gelu
    if model.image_size is not None:
        fields["vision_cfg"]["image_size"] = model.image_size
    if model.context_length is not None:
        fields["text_cfg"]["context_length"] = model.context_length
    return fields


def logit_scale_init(model: Model) -> float:
    """What similarities are multiplied by at the start, by `model.logit_scale_init` or open_clip's JSON."""
    if model.logit_scale_init is not None:
        return model.logit_scale_init
    settings = model_settings(model.name) if model.name is not None else None
    return math.exp((settings or {}).get("init_logit_scale", math.log(1 / 0.07)))


def logit_bias_init(model: Model) -> float | None:
    """What open_clip's JSON adds to similarities, for a sigmoid loss; None: nothing."""
    settings = model_settings(model.name) if model.name is not None else None
    return (settings or {}).get("init_logit_bias")


def pretrained_tags(name: str) -> list[str]:
    """Tags of the weights that open_clip can fetch for its model of this name, read from its source."""
    tree = ast.parse((_folder() / "pretrained.py").read_text(encoding="utf-8"))
    assigned = {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    models = assigned["_PRETRAINED"]
    found = dict(zip((key.value for key in models.keys), models.values, strict=True))
    tags = found.get(name.removesuffix("-quickgelu"))  # one of those has the tags of the other
    tags = assigned[tags.id] if isinstance(tags, ast.Name) else tags
    return [tag.arg for tag in tags.keywords] if tags is not None else []


def known_models() -> list[str]:
    """Those that come with open_clip, and those that were added to it in this process."""
    return _loaded().list_models() if _loaded() is not None else [*_shipped()]


@cache
def fields_of(kind: str) -> tuple[str, ...]:
    """Names of the fields of open_clip's dataclass CLIPVisionCfg or CLIPTextCfg, in their order."""
    tree = ast.parse((_folder() / "model.py").read_text(encoding="utf-8"))
    (found,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == kind)
    return tuple(node.target.id for node in found.body if isinstance(node, ast.AnnAssign))


def module_of(name: str) -> ModuleType:
    """A module of open_clip that imports none of the others: by itself, as long as open_clip is not imported."""
    return _alone(name) if _loaded() is None else importlib.import_module(f"open_clip.{name}")


def imagenet_classes() -> list[str]:
    return list(module_of("zero_shot_metadata").IMAGENET_CLASSNAMES)


def imagenet_templates() -> list[str]:
    """'{}' stands for the class name."""
    return [template("{}") for template in module_of("zero_shot_metadata").OPENAI_IMAGENET_TEMPLATES]


def _check_name(name: str | None) -> dict[str, Any]:
    require(name is not None, "no model: set model.name to one of open_clip's, or describe model.vision and model.text")
    settings = model_settings(name)
    if settings is None:
        near = difflib.get_close_matches(name, known_models(), n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "see open_clip.list_models()"
        raise UserError(f"model.name={name!r} is no open_clip model; {hint} (or describe model.vision and model.text)")
    odd = sorted(settings.keys() - _TRAINABLE)
    require(not odd, f"model.name={name!r} needs {', '.join(odd)}: only image-text towers can be trained contrastively")
    return settings


def _check_fields(kind: str, values: dict[str, Any], prefix: str) -> None:
    known = fields_of(kind)
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {prefix}.{near[0]}?" if near else f"the fields are {', '.join(known)}"
            raise UserError(f"unknown key {prefix}.{key}; {hint}")


def _check_tokenizer(text: dict[str, Any]) -> None:
    """CLIP's own tokenizer, which has no settings, unless the tower or the tokenizer is Hugging Face's."""
    for key in _HUGGING_FACE:
        name = text.get(key)
        require(name is None or isinstance(name, str), f"model.text.{key}={name!r} must be text; put it in quotes")
        require(
            not name or name[0] not in "~$",
            f"model.text.{key}={name!r}: a name of Hugging Face's or a folder, in which ~ and $ are not filled in; "
            "write its path out",
        )
    options = text.get("tokenizer_kwargs")
    require(options is None or isinstance(options, dict), f"model.text.tokenizer_kwargs={options!r} must be a mapping")
    if text.get("hf_model_name") or text.get("hf_tokenizer_name"):
        return
    for key in _TOKENIZER:
        require(
            key not in text,
            f"model.text.{key}: captions go through CLIP's own tokenizer unless model.text.hf_tokenizer_name is set",
        )
    size = text.get("vocab_size", CLIP_TOKENS)
    require(
        not isinstance(size, int) or size >= CLIP_TOKENS,
        f"model.text.vocab_size={size} is below the {CLIP_TOKENS} tokens of CLIP's tokenizer; leave it out",
    )


def _loaded() -> ModuleType | None:
    return sys.modules.get("open_clip")


@cache
def _folder() -> Path:
    return Path(importlib.util.find_spec("open_clip").submodule_search_locations[0])


@cache
def _shipped() -> dict[str, Path]:
    paths = sorted((_folder() / "model_configs").glob("*.json"))
    return {path.stem: path for path in paths if _read(path).keys() >= _MODEL_PARTS}


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


@cache
def _alone(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"open_clip_{name}", _folder() / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
