"""From YAML files and command-line words (read by read.py) to a `Config` and back. No torch import.

    config = load_config(["quickstart", "train.global_batch=4096"])      # a recipe's name, or a YAML file's path
    config.train.global_batch                      # 4096
    print(dump_config(config))                     # the resolved YAML: goes into the run folder and every checkpoint

Files are merged from left to right, then `key.path=value`. Whatever does not fit is one line that names the word or
file, the key and the fix. A file that a YAML names (class names, templates, counts, uids) is looked for in the current
folder, then beside that YAML, so that a recipe and its files work from anywhere.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from clipscale.config import Config, flat
from clipscale.config.read import escaped, read_file, read_word, read_yaml, write_yaml
from clipscale.config.recipes import find_config
from clipscale.errors import UserError, require
from clipscale.upstream.open_clip_flags import explain


class Layer(NamedTuple):
    origin: str  # what an error calls it
    read: Callable[[], dict[str, Any]]


def load_config(arguments: list[str]) -> Config:
    """YAML paths, recipes' names and `key.path=value` words: files first, left to right, then the words.

    Raises:
        UserError: a file that is missing or no YAML mapping, an unknown or duplicate key, a wrong type, a bad value.
    """
    words = [word for word in arguments if "=" in word and not os.path.isfile(word)]
    files = [find_config(word) for word in arguments if word not in words]
    return _merge([Layer(f"config {path!r}", partial(read_file, path)) for path in files] + _layers(words))


def apply_overrides(config: Config, words: list[str]) -> Config:
    """A copy of `config` with `key.path=value` words on top."""
    bad = [word for word in words if "=" not in word]
    require(not bad, f"{bad[0] if bad else ''!r} is no key.path=value")
    return _merge([Layer("config", lambda: escaped(dataclasses.asdict(config))), *_layers(words)])


def config_from_yaml(text: str) -> Config:
    """The inverse of `dump_config`, for the config stored in a checkpoint: its paths are taken as they stand."""
    return _merge([Layer("the stored config", lambda: escaped(read_yaml(text)))])


def _layers(words: list[str]) -> list[Layer]:
    return [Layer(word, partial(read_word, word)) for word in words]


def _merge(layers: list[Layer]) -> Config:
    merged = _defaults()
    for origin, read in layers:
        key = origin.partition("=")[0]
        try:
            merged = OmegaConf.merge(merged, read())
        except UserError as error:  # of a word it names the key already
            raise UserError(str(error) if str(error).startswith(f"{key}: ") else f"{origin}: {error}") from error
        except (OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError, TypeError) as error:
            raise UserError(f"{origin}: {_one_line(error).removeprefix(f'{key}: ')}") from error
    try:
        return OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise UserError(_one_line(error)) from error


@cache
def _defaults() -> DictConfig:
    """Never changed in place: a merge makes a copy."""
    return OmegaConf.structured(Config)


def dump_config(config: Config) -> str:
    """The whole resolved configuration as YAML."""
    return write_yaml(dataclasses.asdict(config))


def changed_keys(old: Config, new: Config) -> list[str]:
    """One 'key: old -> new' for each setting that differs, for the log of a resume."""
    before, after = flat(dataclasses.asdict(old)), flat(dataclasses.asdict(new))
    keys = sorted(before.keys() | after.keys())
    return [f"{key}: {before.get(key)} -> {after.get(key)}" for key in keys if before.get(key) != after.get(key)]


def _one_line(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark
        return f"{error.problem}{f' at line {mark.line + 1}' if mark else ''}"
    if isinstance(error, ConfigKeyError):
        return _unknown_key(error)
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} must be set"
    message = str(error).splitlines()[0]
    key = error.full_key if isinstance(error, OmegaConfBaseException) else None
    return f"{key}: {message}" if key else message


def _unknown_key(error: ConfigKeyError) -> str:
    """The nearest key beside it, else the same name elsewhere; and what a flag of open_clip's is here."""
    path, key = error.full_key, str(error.key)
    beside = [item.name for item in dataclasses.fields(error.object_type)]
    elsewhere = [known for known in flat(dataclasses.asdict(Config())) if known.endswith(f".{key}")]
    near = [path.removesuffix(key) + name for name in difflib.get_close_matches(key, beside, n=1)] or elsewhere
    hint = f"did you mean {' or '.join(near)}?" if near else f"known here: {', '.join(beside)}"
    if path.count(".") < 2 and (theirs := explain(key)):
        hint = f"{hint} {theirs}" if near else theirs
    return f"{path}: unknown key; {hint}"
