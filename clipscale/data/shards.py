"""From what a config says about shards to files on this machine.

    expand_urls("data/{train,extra}-*.tar::https://host/x-{00..09}.tar")     # a list of paths and URLs
    local_path("https://host/x-00.tar", cache_dir)                          # the copy in the cache, fetched once

webdataset expands braces and opens what is not a local file (its `gopen` schemes); the cache is ours, because
webdataset's names files by basename, so that a/0000.tar and b/0000.tar collide.
"""

from __future__ import annotations

import glob
import hashlib
import os
import shutil
import uuid
from collections import Counter
from pathlib import Path

import webdataset
from webdataset.shardlists import expand_urls as expand_braces

from clipscale.errors import UserError, require


def cache_folder(cache_dir: str | None) -> Path:
    """`data.cache_dir`, else the user's cache folder for clipscale."""
    if cache_dir is not None:
        return Path(cache_dir)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "clipscale"


def expand_urls(urls: str) -> list[str]:
    """Braces, '::' and, for local paths, globs (sorted). Every local path that comes back exists.

    Raises:
        UserError: nothing left, a file that is not there, a glob without a match, the same shard twice, a pipe.
    """
    try:
        patterns = [url.strip() for url in expand_braces(urls) if url.strip()]
    except Exception as error:  # braceexpand and webdataset raise several kinds
        raise UserError(f"shards {urls!r}: cannot expand the pattern ({error})") from error
    expanded: list[str] = []
    for pattern in patterns:
        pipe = pattern.lower().startswith("pipe:")
        require(not pipe, f"shards {pattern!r}: pipes run shell commands and are refused")
        if not is_local(pattern):
            expanded.append(pattern)
            continue
        path = pattern.removeprefix("file:")
        if not os.path.isfile(path) and any(sign in path for sign in "*?["):
            matches = sorted(glob.glob(path, recursive=True))
            require(bool(matches), f"shards {pattern!r}: no file matches the pattern")
            expanded.extend(matches)
        else:
            expanded.append(path)
    missing = [path for path in expanded if is_local(path) and not os.path.isfile(path)]
    more = f" (and {len(missing) - 1} more of {len(expanded)})" if len(missing) > 1 else ""
    require(not missing, f"shard {missing[0] if missing else ''!r} is not a file{more}; check the path in the config")
    require(bool(expanded), f"shards {urls!r}: the pattern names no shard")
    places = Counter(os.path.abspath(url) if is_local(url) else url for url in expanded)
    place, times = max(places.items(), key=lambda item: item[1])
    require(times == 1, f"shard {place!r} is named {times} times in {urls!r}; name each shard once")
    return expanded


def is_local(url: str) -> bool:
    return url.startswith("file:") or ":" not in url.split("/")[0]


def local_path(url: str, cache_dir: str | None) -> str:
    """A local file with the shard's bytes: the shard itself, or its copy in the cache."""
    if is_local(url):
        return url.removeprefix("file:")
    target = cache_folder(cache_dir) / "shards" / hashlib.sha1(url.encode()).hexdigest()[:20] / os.path.basename(url)
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
        try:
            with webdataset.gopen(url, "rb") as stream, open(partial, "wb") as file:
                shutil.copyfileobj(stream, file, 1 << 20)
            partial.rename(target)
        except Exception as error:  # each gopen scheme raises kinds of its own
            raise UserError(f"shard {url!r}: cannot be fetched ({error})") from error
        finally:
            partial.unlink(missing_ok=True)
    return str(target)
