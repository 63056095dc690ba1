"""What every setting is, read from the dataclasses and the comments in their source: nothing is written down twice.

    find_settings("optim.lr")               # [Section("optim", "AdamW with ...", [Setting("optim.lr", ...)])]
    find_settings("data.sources.mine")      # a section: its settings and those inside it; "" gives all of them
    with_comments(dump_config(config))      # the same YAML, each setting's comment beside it

A comment stands behind its setting or in the lines right above it; a section's docstring says what it is about.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import io
import textwrap
import tokenize
import types
import typing
from collections.abc import Iterator
from functools import cache
from typing import Any, Literal, NamedTuple

import yaml
from omegaconf import MISSING

from clipscale.config import Config
from clipscale.errors import require

ANY_NAME = "<name>"  # in a key: the name of a source, which is the user's own
WIDTH = 120


class Setting(NamedTuple):
    key: str  # data.sources.<name>.urls
    default: str  # as in YAML; empty: it must be set
    type: str  # int | null
    comment: str


class Section(NamedTuple):
    key: str  # empty: the settings outside of sections
    about: str
    settings: list[Setting]


def find_settings(key: str = "") -> list[Section]:
    """The sections with those settings whose key is `key` or begins with it.

    Raises:
        UserError: there is none; with the nearest key.
    """
    every = _sections(Config, "")
    found = [
        section._replace(settings=[setting for setting in section.settings if _begins_with(setting.key, key)])
        for section in every
    ]
    found = [section for section in found if section.settings]
    known = [name for section in every for name in (section.key, *(setting.key for setting in section.settings))]
    namesakes = [name for name in known if name.endswith(f".{key}")]
    near = namesakes or difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    require(bool(found), f"{key!r} is no setting and no section; {hint}`clipscale config` lists them all")
    return found


def with_comments(text: str) -> str:
    """A resolved config's YAML with comments: behind a setting, or above one whose line is long. Loads to the same."""
    every = _sections(Config, "")
    comments = {section.key: section.about for section in every}
    comments |= {setting.key: setting.comment for section in every for setting in section.settings if setting.comment}
    lines = text.split("\n")
    above = {}
    for key, place, in_one_line in _places(yaml.compose(text), "", comments):
        if not (comment := comments.get(key)):
            continue
        line = lines[place.line]
        if in_one_line and len(line) + len(comment) + 4 <= WIDTH:
            lines[place.line] = f"{line}  # {comment}"
        else:
            above[place.line] = f"{' ' * place.column}# {comment}"
    return "\n".join(line for i, own in enumerate(lines) for line in ([above[i], own] if i in above else [own]))


def _places(node: yaml.Node, path: str, known: dict[str, str]) -> Iterator[tuple[str, yaml.Mark, bool]]:
    """Each key of a YAML mapping with where it stands, and whether its line is complete: ends with it or its value."""
    if not isinstance(node, yaml.MappingNode):
        return
    for name, value in node.value:
        key, any_name = _join(path, name.value), _join(path, ANY_NAME)
        key = any_name if any_name in known and key not in known else key
        place = name.start_mark
        yield key, place, value.end_mark.line == place.line or value.start_mark.line > place.line
        yield from _places(value, key, known)


def _sections(kind: type, key: str) -> list[Section]:
    """A dataclass's own settings, then the sections inside it."""
    about, comments = _notes(kind)
    kinds, settings, inner = typing.get_type_hints(kind), [], []
    for field in dataclasses.fields(kind):
        its_kind, its_key = kinds[field.name], _join(key, field.name)
        section = next((one for one in (its_kind, *typing.get_args(its_kind)) if dataclasses.is_dataclass(one)), None)
        if section is not None:
            many = typing.get_origin(its_kind) is dict
            inner += _sections(section, _join(its_key, ANY_NAME) if many else its_key)
        if section is not its_kind:
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            settings.append(Setting(its_key, _value(default), _type(its_kind), comments.get(field.name, "")))
    return [Section(key, about, settings), *inner]


@cache
def _notes(kind: type) -> tuple[str, dict[str, str]]:
    """The first line of a dataclass's docstring, and the comment of each field that has one."""
    source = textwrap.dedent(inspect.getsource(kind))
    tree = ast.parse(source).body[0]
    behind, above = {}, {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            alone = not token.line[: token.start[1]].strip()
            (above if alone else behind)[token.start[0]] = token.string.lstrip("# ")
    comments = {}
    for field in (node for node in tree.body if isinstance(node, ast.AnnAssign)):
        first = field.lineno
        while first - 1 in above:
            first -= 1
        words = [above[i] for i in range(first, field.lineno)]
        words += [behind[i] for i in range(field.lineno, field.end_lineno + 1) if i in behind]
        comments[field.target.id] = " ".join(words)
    return (ast.get_docstring(tree) or "").partition("\n")[0], comments


def _type(kind: Any) -> str:
    parts = typing.get_args(kind)
    origin = typing.get_origin(kind)
    if origin is Literal:
        return " | ".join(map(str, parts))
    if origin in (typing.Union, types.UnionType):
        return " | ".join(map(_type, parts))
    if parts[1:] == (...,):
        return f"[{_type(parts[0])}, ...]"
    if origin is tuple:
        return f"[{', '.join(map(_type, parts))}]"
    if origin is dict or dataclasses.is_dataclass(kind):
        return "mapping"
    return "null" if kind is type(None) else kind.__name__


def _value(value: Any) -> str:
    if value == MISSING:
        return ""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, tuple):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, float):
        return min(repr(value), f"{value:.6g}", key=len) if len(repr(value)) > 8 else repr(value)
    return str(value)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _begins_with(place: str, key: str) -> bool:
    """Part by part; a source's name is any."""
    parts, wanted = place.split("."), key.split(".") if key else []
    return len(parts) >= len(wanted) and all(own in (ANY_NAME, one) for own, one in zip(parts, wanted, strict=False))
