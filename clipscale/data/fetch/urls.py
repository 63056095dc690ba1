"""From what a config says about shards to paths and URLs, each of them one that can be read.

    expand_urls("data/{train,extra}-*.tar::https://host/x-{00..09}.tar")     # a list of paths and URLs
    masked("https://me:word@host/x.tar?token=abc")                          # https://***@host/x.tar?token=***

Braces are expanded as webdataset expands them. Whatever tells a person about a URL shows it `masked`.
"""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from typing import NamedTuple

from braceexpand import braceexpand

from clipscale.errors import UserError, require
from clipscale.paths import is_local, scheme_of, without_file_scheme


class Opener(NamedTuple):
    """What opens the URLs of a scheme."""

    kind: str  # open_<kind>.py, beside this file, has their `open_body`
    package: str | None = None  # to install for fsspec's client


OPENERS = {  # by scheme: the schemes that are read
    "http": Opener("http"),
    "https": Opener("http"),
    "s3": Opener("fsspec", "clipscale[s3]"),
    "gs": Opener("fsspec", "clipscale[gcs]"),
    "gcs": Opener("fsspec", "clipscale[gcs]"),
    "hf": Opener("fsspec", "huggingface_hub"),
    "pipe": Opener("pipe"),
}
_INDEX_SUFFIX = ".index"  # of the sidecars that lie beside shards: no glob means them
_SECRET = re.compile(
    r"(?i)((?<![\w-])(?=[\w-]*(?:authorization|api-?key|access_key|token|password|secret))[\w-]+\s*[:=]\s*"
    r"(?:(?:bearer|basic|token)\s+)?)[^\s'\"&]+"
)
_QUERY_VALUE = re.compile(r"((?:^|&)(?:[^&=]*=)?)[^&]*?[^&\"')>\],;:.]([\"')>\],;:.]*)(?=&|$)")  # not what ends a quote


def expand_urls(urls: str, allow_pipe: bool = False) -> list[str]:
    """Braces, '::' and, for local paths, globs (sorted). Every local path that comes back exists, every URL's scheme
    is one that can be read here.

    Raises:
        UserError: nothing left, a file that is not there, a glob without a match, the same URL or file twice, a scheme
            that is not read or whose client is not installed, a pipe without `allow_pipe`.
    """
    try:
        patterns = [url.strip() for part in urls.split("::") for url in braceexpand(part) if url.strip()]
    except ValueError as error:  # braces that do not match
        raise UserError(f"shards {masked(urls)!r}: cannot expand the pattern ({masked(str(error))})") from error
    expanded: list[str] = []
    for pattern in patterns:
        if not is_local(pattern):
            expanded.append(pattern)
            continue
        path = without_file_scheme(pattern)
        if not os.path.isfile(path) and any(sign in path for sign in "*?["):
            matches = sorted(found for found in glob.glob(path, recursive=True) if not found.endswith(_INDEX_SUFFIX))
            require(bool(matches), f"shards {pattern!r}: no file matches the pattern")
            expanded.extend(matches)
        else:
            expanded.append(path)
    missing = [path for path in expanded if is_local(path) and not os.path.isfile(path)]
    more = f" (and {len(missing) - 1} more of {len(expanded)})" if len(missing) > 1 else ""
    require(not missing, f"shard {missing[0] if missing else ''!r} is not a file{more}; check the path in the config")
    require(bool(expanded), f"shards {masked(urls)!r}: the pattern names no shard")
    for url in {scheme_of(url): url for url in expanded if not is_local(url)}.values():  # one of each scheme
        check_scheme(url, allow_pipe)
    places = Counter(os.path.abspath(url) if is_local(url) else url for url in expanded)
    place, times = max(places.items(), key=lambda item: item[1])
    require(times == 1, f"shard {masked(place)!r} is named {times} times in {masked(urls)!r}; name each shard once")
    twice = _one_file_twice([path for path in expanded if is_local(path)])
    require(twice is None, f"shards {twice and ' and '.join(map(repr, twice))} are one file; name each shard once")
    return expanded


def _one_file_twice(paths: list[str]) -> tuple[str, str] | None:
    """The first two that are one file by links or spelling. File systems that number files badly do not mislead it."""
    first: dict[tuple[int, int], str] = {}
    for path in paths:
        stat = os.stat(path)
        other = first.setdefault((stat.st_dev, stat.st_ino), path)
        if other != path and (stat.st_nlink > 1 or os.path.realpath(other) == os.path.realpath(path)):
            return other, path
    return None


def masked(text: str) -> str:
    """`text` without what may be secret in it: user and password of a URL, every value of a query, and what follows
    such words as `Authorization:` or `secret=` in a pipe's command."""
    return re.sub(r"(?<=://)\S+", _mask_url, _SECRET.sub(r"\1***", text))


def _mask_url(match: re.Match[str]) -> str:
    place, query, values = re.fullmatch(r"([^?]*)(\??)(.*)", match[0], re.DOTALL).groups()
    return re.sub(r"^[^/]*@", "***@", place) + query + _QUERY_VALUE.sub(r"\1***\2", values)


def check_scheme(url: str, allow_pipe: bool) -> None:
    """Raise UserError unless remote URLs like this one can be read here."""
    scheme, shown = scheme_of(url), masked(url)
    remote = ", ".join(f"{name}://" for name in OPENERS if name != "pipe")
    require(
        scheme in OPENERS,
        f"shards {shown!r}: {scheme + ':'!r} is no scheme that is read; use a path, file:, {remote}, "
        "or pipe: with data.allow_pipe=true (a path with a colon: file:<path>)",
    )
    if scheme == "pipe":
        require(
            allow_pipe,
            f"shards {shown!r}: pipes run shell commands and are refused; data.allow_pipe=true lets them run",
        )
        return
    require(
        re.match(r"[^:]+://[^/\s]", url) is not None,
        f"shards {shown!r}: no host or bucket follows; write {scheme}://<host or bucket>/<path>",
    )
    opener = OPENERS[scheme]
    if opener.kind == "fsspec":
        import fsspec  # only for those who read through it

        try:
            fsspec.get_filesystem_class(scheme)
        except ImportError as error:
            raise UserError(
                f"shards {shown!r}: the client for {scheme}:// is not installed; pip install '{opener.package}'"
            ) from error
