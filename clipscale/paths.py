"""What a person means by a path: one on this machine's disks, or shards, which may lie elsewhere too.

    local_path("~/runs/q")                                  # /u/me/runs/q
    local_path("${SCRATCH}/q")                              # /scratch/me/q; UserError where SCRATCH is not set
    local_path("s3://bucket/q")                             # UserError: it would become a folder here of that name
    shard_urls("$DATA/{00..09}.tar::https://host/x?k=$1")   # /data/{00..09}.tar::https://host/x?k=$1

A setting says by its type that it is a path (`LocalPath`, `LocalFile`, `ShardUrls`), an option by argparse's
`type=path_option` or `type=shards_option`.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable
from typing import Annotated, NamedTuple

from clipscale.errors import UserError, require

_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([^{}]*)\})", re.ASCII)
_URL = re.compile(r"(s3|gs|gcs|hf|https?|pipe|[A-Z][\w+.-]*(?=:/)):", re.IGNORECASE)


def local_path(text: str) -> str:
    """`text` with variables and `~` filled in, without `file:`.

    Raises:
        UserError: empty, a variable that is not set, no such user, a URL.
    """
    require(text.strip() != "", f"{text!r} is an empty path; name a folder or file")
    path = _with_home(without_file_scheme(_with_variables(text)))
    url = _URL.match(path.lstrip())
    require(  # what follows the scheme may hold a password
        url is None,
        f"a URL ({url and url[1]}:...), and this must be a path on a disk of this machine (mount what lies elsewhere; "
        f"a name that holds a colon: ./{url and url[1]}:...)",
    )
    return path


def weights_path(text: str) -> str:
    """`local_path` of what may be a tag of open_clip's; without `local-dir:`, which open_clip writes before folders.

    Raises:
        UserError: as `local_path`.
    """
    return local_path(text.removeprefix("local-dir:"))


def shard_urls(text: str) -> str:
    """The patterns of `text`, joined by '::', with variables and `~` filled in where they are local; URLs stay.

    Raises:
        UserError: a variable that is not set, no such user.
    """
    return "::".join(map(_shard_pattern, text.split("::")))


def _shard_pattern(text: str) -> str:
    if not is_local(pattern := text.strip()):
        return pattern
    pattern = _with_variables(pattern)
    start = pattern[: len("file:")] if scheme_of(pattern) == "file" else ""
    return start + _with_home(pattern[len(start) :])


class PathKind(NamedTuple):
    """Beside the type of a setting: how its text is read."""

    read: Callable[[str], str]
    beside_yaml: bool = False  # also looked for beside the YAML that names it


LocalPath = Annotated[str, PathKind(local_path)]
LocalFile = Annotated[str, PathKind(local_path, beside_yaml=True)]
WeightsPath = Annotated[str, PathKind(weights_path)]
ShardUrls = Annotated[str, PathKind(shard_urls)]


def path_option(text: str) -> str:
    """`local_path` for argparse."""
    return _option(local_path, text)


def weights_option(text: str) -> str:
    """`weights_path` for argparse."""
    return _option(weights_path, text)


def shards_option(text: str) -> str:
    """`shard_urls` for argparse."""
    return _option(shard_urls, text)


def _option(read: Callable[[str], str], text: str) -> str:
    try:
        return read(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def is_local(url: str) -> bool:
    return scheme_of(url) in ("", "file")


def scheme_of(url: str) -> str:
    """What stands before the first colon, unless a slash comes first: '' for a plain path."""
    before, colon, _ = url.partition(":")
    return before.lower() if colon and "/" not in before else ""


def without_file_scheme(url: str) -> str:
    """file:a.tar -> a.tar, file:///a.tar -> /a.tar, a.tar -> a.tar

    Raises:
        UserError: a host other than this one.
    """
    path = url[len("file:") :] if scheme_of(url) == "file" else url
    if path == url or not path.startswith("//"):
        return path
    host, _, rest = path[2:].partition("/")
    require(host in ("", "localhost"), f"{url!r} names the host {host!r}; a file of this machine: file:///<path>")
    return f"/{rest}"


def _with_variables(text: str) -> str:
    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        require(
            re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII) is not None,
            f"{text!r}: {match[0]!r} is no variable; write $NAME or ${{NAME}}",
        )
        found = os.environ.get(name)
        require(bool(found), f"{text!r}: the variable {name} is {'not set' if found is None else 'empty'}")
        return found

    return _VARIABLE.sub(value, text)


def _with_home(path: str) -> str:
    whole = os.path.expanduser(path)
    user = path.partition("/")[0]
    require(not whole.startswith("~"), f"{path!r}: {user} has no home folder here (a name that begins so: ./{user})")
    return whole
