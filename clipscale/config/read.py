"""What YAML files and command-line words say, as trees whose values fit the settings they are for. No torch import.

    read_word("run.dir=~/2024_01_05")           # {'run': {'dir': '/u/me/2024_01_05'}}: text is taken as it stands
    read_word("train.samples=400e6")            # {'train': {'samples': 400000000}}: the rest is YAML
    read_file("quickstart.yaml")                # the same of a file: a number where text is meant is an error

Text never means another setting, as OmegaConf's `${...}` would: a `$` in a path is an environment variable
(`paths.py`), elsewhere it is a dollar. Trees come out `escaped`, for OmegaConf alone. No other file reads YAML.
"""

from __future__ import annotations

import dataclasses
import io
import os
import re
import types
import typing
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import yaml
from omegaconf import MISSING, OmegaConf

from clipscale.config import Config
from clipscale.errors import UserError, require
from clipscale.paths import PathKind

_HIDDEN = "$\ue000{"  # stands for `${` where OmegaConf reads or writes YAML: it would take it for a reference
_MOST_EXACT = 2**53  # a float above it need not be the number that was written
_BENT = re.compile(r"[-+]?0[0-7_]+|[-+]?\d[\d_]*(:[0-5]?\d)+(\.[\d_]*)?")  # 0400 is 256 in YAML, and 1:30 is 90
_OWN_LISTS = ("imagenet",)  # open_clip's, where a file may stand


def read_file(path: str) -> dict[str, Any]:
    """Raises UserError for text that is none, and for files that are no mapping; YAMLError for what is no YAML."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror or error})") from error
    tree = _fit(read_yaml(text), Config, "", folder=os.path.dirname(os.path.abspath(path)))
    _refuse_bent(text)
    return escaped(tree)


def read_yaml(text: str) -> dict[str, Any]:
    """Raises UserError unless it is a mapping."""
    try:
        tree = OmegaConf.load(io.StringIO(_hidden(text)))
    except OSError as error:  # OmegaConf's word for a bare number
        raise UserError(f"no mapping of keys to values ({error})") from error
    require(OmegaConf.is_dict(tree), "a list; a config is a mapping of keys to values")
    return _changed(_shown, OmegaConf.to_container(tree))


def write_yaml(tree: dict[str, Any]) -> str:
    return _shown(OmegaConf.to_yaml(OmegaConf.create(_changed(_hidden, tree))))


def read_word(word: str) -> dict[str, Any]:
    """`key.path=value`, the key as OmegaConf takes it (`a.b`, `a[b]`, a dot that is none as `\\.`)."""
    key, value = re.split(r"(?<!\\)=", word, maxsplit=1)
    holder = tree = OmegaConf.to_container(OmegaConf.from_dotlist([f"{key}=null"]))
    (name, inner), *_ = holder.items()
    hint = _inner(Config, name)
    while inner is not None:
        holder = inner
        (name, inner), *_ = holder.items()
        hint = _inner(hint, name)
    is_text = _kind(hint)[0] is str
    holder[name] = _text(value) if is_text else _value(value)
    tree = _fit(tree, Config, "", folder=None)
    if not is_text:
        _refuse_bent(value)
    return escaped(tree)


def escaped(value: Any) -> Any:
    """The tree with every text such that OmegaConf reads it as it is; names it leaves alone."""
    if isinstance(value, dict):
        return {name: escaped(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [escaped(inner) for inner in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def _text(word: str) -> Any:
    """A word for a text setting: itself, but null, and what is quoted or a list in YAML."""
    if word == "null":
        return None
    if word[:1] + word[-1:] in ("''", '""', "[]"):
        try:
            read = _value(word)
        except yaml.YAMLError:
            return word
        return read if isinstance(read, str | list) else word
    return word


def _value(word: str) -> Any:
    return _changed(_shown, OmegaConf.to_container(OmegaConf.from_dotlist([f"value={_hidden(word)}"]))["value"])


def _refuse_bent(text: str) -> None:
    """Raise UserError for numbers that YAML takes for ones of base 8 or 60."""
    for token in yaml.scan(_hidden(text)):
        bent = isinstance(token, yaml.ScalarToken) and token.plain and _BENT.fullmatch(token.value)
        require(
            not bent,
            f"{bent and bent[0]} (line {token.start_mark.line + 1}) is a number of base 8 or 60 to YAML; write it "
            "without leading zeros and colons, or in quotes if it is text",
        )


def _fit(value: Any, hint: Any, key: str, *, folder: str | None) -> Any:
    """`value` as the setting `key` takes it. What does not fit is left to OmegaConf, but for what it would bend.

    folder: of the YAML, where the files that it names may lie.
    """
    kind, path = _kind(hint)
    if isinstance(value, dict):
        keys = [] if typing.get_origin(kind) is not dict else [name for name in value if not isinstance(name, str)]
        require(not keys, f"{key}: a name in it is {keys and keys[0]!r} as YAML reads it; put the name in quotes")
        return {
            name: _fit(inner, _inner(hint, name), f"{key}.{name}" if key else name, folder=folder)
            for name, inner in value.items()
        }
    if dataclasses.is_dataclass(kind) and value is not None:
        known = ", ".join(f"{key}.{name}" for name in _hints(kind))
        raise UserError(f"{key}: {key}={value} gives a section one value; its settings are {known}")
    require(value != MISSING, f"{key}: {MISSING!r} says that nothing is set; write the value")
    if kind is str and value is not None and not isinstance(value, list):
        require(isinstance(value, str), f"{key}: {value!r} as YAML reads it, and text is wanted; put it in quotes")
        return _fit_path(value, path, key, folder) if path is not None else value
    if kind is int and isinstance(value, float) and value.is_integer():
        require(abs(value) <= _MOST_EXACT, f"{key}: {value!r} is too large to be exact; write its digits out")
        return int(value)
    reference = kind is not Any and isinstance(value, str) and "${" in value
    require(not reference, f"{key}: {value!r}: no variable and no other setting can stand here; write the value")
    return value


def _fit_path(text: str, path: PathKind, key: str, folder: str | None) -> str:
    try:
        found = path.read(text)
    except UserError as error:
        raise UserError(f"{key}: {error}") from error
    if path.beside_yaml and folder is not None and found not in _OWN_LISTS and not os.path.isfile(found):
        beside = os.path.join(folder, found)
        return beside if os.path.isfile(beside) else found
    return found


def _kind(hint: Any) -> tuple[Any, PathKind | None]:
    """The type that a setting takes, null aside, and which path it is, if any."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is Annotated:
        return hint.__origin__, hint.__metadata__[0]
    return hint, None


def _inner(hint: Any, name: Any) -> Any:
    """The type of what stands under `name`; Any where none is known."""
    kind, _ = _kind(hint)
    if dataclasses.is_dataclass(kind):
        return _hints(kind).get(name, Any)
    return typing.get_args(kind)[1] if typing.get_origin(kind) is dict else Any


@cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind, include_extras=True)


def _hidden(text: str) -> str:
    return text.replace("${", _HIDDEN)


def _shown(text: str) -> str:
    return text.replace(_HIDDEN, "${")


def _changed(change: Callable[[str], str], value: Any) -> Any:
    """The tree with every text and name changed."""
    if isinstance(value, dict):
        return {_changed(change, name): _changed(change, inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_changed(change, inner) for inner in value]
    return change(value) if isinstance(value, str) else value
