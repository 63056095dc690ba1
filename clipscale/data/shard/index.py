"""The shard index: one sidecar per tar with where each usable sample's picture and note (caption or label) lie.

    index = Index(Rules(), index_dir=None, cache_dir=None)
    shard = index.known("train-0000.tar")               # from its sidecar; None where there is no current one
    shard = index.build("train-0000.tar")               # walks the tar's headers and writes the sidecar
    shard.samples, shard.refused                        # 9998, {'no caption': 2}

Selection happens here (select.py), so that counts are final and an epoch is a number. A sidecar lies beside its shard
(`train-0000.tar.index`; `train-0000.tar.<rules>.index` for rules other than the usual), in `index_dir` when one is
given, or in the cache folder for remote shards and where the shard's folder cannot be written. A shard whose size or
time changed is indexed again; whether its bytes changed too is told.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from clipscale.data.fetch.urls import is_local
from clipscale.data.shard import sidecar
from clipscale.data.shard.select import Rules, select_samples
from clipscale.data.shard.tar import list_members, mapped
from clipscale.files import cache_folder, hash_file

_FACTS = {"samples", "identity", "bytes", "crc32", "sha256", "refused", "not_read", "cut"}
Hash = Literal["crc32", "sha256"]


@dataclass(frozen=True)
class Shard:
    """What is known of one shard without its records."""

    url: str  # or path
    sidecar: str  # empty: its number of samples was declared, and it is indexed when it is first read
    samples: int  # usable, or declared
    identity: int  # of the shard's bytes and of which samples of them are used; or of what was declared
    bytes: int = 0
    mtime_ns: int | None = None  # of a local shard
    crc32: int = 0
    sha256: str | None = None
    refused: dict[str, int] = field(default_factory=dict)  # samples left out, by cause
    not_read: dict[str, int] = field(default_factory=dict)  # members whose suffix is not on the allow-list, by suffix
    cut: str = ""  # why the archive ends early; empty: it does not
    changed: str = ""  # how its bytes differ from those indexed before; empty: they do not
    etag: str | None = None  # of a remote shard, as its server named it when these bytes came

    @classmethod
    def declared(cls, url: str, samples: int) -> Shard:
        return cls(url, "", samples, sidecar.identity_of("declared", basename(url), samples))


@dataclass(frozen=True)
class Index:
    """Sidecars of one set of rules. `lazily`: of shards whose counts were declared, not taken from here."""

    rules: Rules = field(default_factory=Rules)
    index_dir: str | None = None
    cache_dir: str | None = None
    hash: Hash = "crc32"
    lazily: bool = False

    def known(self, url: str) -> Shard | None:
        """The shard as its sidecar has it; None where there is none, or one of other bytes.

        Raises:
            OSError: a local shard that cannot be read.
        """
        stamp = _stamp(url, url) if is_local(url) else {}
        for place in self._places(url, self._tag):
            facts = sidecar.read_facts(place)
            if not stamp and facts.get("cut") and "etag" not in facts:
                continue  # of a time when any answer of a server was taken for the shard
            if stamp.items() <= facts.items() and facts.keys() >= _FACTS and (self.hash == "crc32" or facts["sha256"]):
                return _shard(url, place, facts)
        return None

    def build(self, url: str, file: str | int | None = None, told: dict[str, Any] | None = None) -> Shard:
        """Index the shard and write its sidecar. `file`: path or descriptor of its bytes, where `url` is remote, and
        `told`: what the cache knows of its copy.

        Raises:
            OSError: the shard cannot be read, or changes meanwhile, or there is no place for the sidecar.
            UserError: a uid file that cannot be used.
        """
        file = url if file is None else file
        stamp = _stamp(url, file)
        before = [facts for tag in (self._tag, "") for p in self._places(url, tag) if (facts := sidecar.read_facts(p))]
        hashes = self._hashes(file, stamp, before)
        with mapped(file) as tar:
            listing = list_members(tar)
            chosen = select_samples(tar, listing, self.rules)
        if _stamp(url, file) != stamp:
            raise OSError("it was written to while it was indexed")
        facts = stamp | hashes | {"refused": chosen.refused, "not_read": chosen.not_read, "cut": listing.cut}
        if not is_local(url):  # unless another copy has come meanwhile
            facts["etag"] = told.get("etag") if told and told.get("crc32") == hashes["crc32"] else None
        places = self._places(url, self._tag)
        for place in places:
            try:
                facts = sidecar.write(place, facts, chosen.spans, chosen.keys)
                return _shard(url, place, facts, _change(before, facts))
            except OSError as error:
                cause = error
        raise OSError(f"cannot write the index to any of {[str(place) for place in places]} ({cause})") from cause

    @cached_property
    def _tag(self) -> str:
        return ".".join(filter(None, [self.rules.tag, "declared" if self.lazily else ""]))

    def _hashes(self, file: str | int, stamp: dict[str, int], before: list[dict[str, Any]]) -> dict[str, Any]:
        """From a sidecar of the same bytes where there is one, so that other rules do not read it again."""
        for facts in before:
            if "mtime_ns" in stamp and stamp.items() <= facts.items() and (self.hash == "crc32" or facts["sha256"]):
                return {"crc32": facts["crc32"], "sha256": facts["sha256"]}
        found = hash_file(file, crc32=True, sha256=self.hash == "sha256")
        return {"crc32": found["crc32"], "sha256": found["sha256"]}

    def _places(self, url: str, tag: str) -> list[Path]:
        name = ".".join(filter(None, [basename(url), tag, "index"]))
        where = os.path.abspath(url) if is_local(url) else url
        tagged = f"{hashlib.sha1(where.encode()).hexdigest()[:16]}-{name[-200:]}"
        if self.index_dir is not None:
            return [Path(self.index_dir) / tagged]
        in_cache = cache_folder(self.cache_dir) / "index" / tagged
        return [Path(url).with_name(name), in_cache] if is_local(url) else [in_cache]


def basename(url: str) -> str:
    """The last part of a path or URL, without a query."""
    return os.path.basename(url if is_local(url) else urlsplit(url).path) or "shard"


def _stamp(url: str, file: str | int) -> dict[str, int]:
    """By what a change of the shard is noticed without reading it; the time of a remote shard's copy says nothing."""
    stat = os.stat(file)
    return {"bytes": stat.st_size} | ({"mtime_ns": stat.st_mtime_ns} if is_local(url) else {})


def _change(before: list[dict[str, Any]], now: dict[str, Any]) -> str:
    """How the shard differs from what the first of its former sidecars says."""
    if not before or (before[0]["bytes"], before[0]["crc32"]) == (now["bytes"], now["crc32"]):
        return ""
    old, new = (f"{facts['bytes']} bytes, crc32 {facts['crc32']:08x}" for facts in (before[0], now))
    return f"{old} -> {new}"


def _shard(url: str, place: Path, facts: dict[str, Any], changed: str = "") -> Shard:
    known = {name: facts[name] for name in _FACTS}
    return Shard(url, str(place), mtime_ns=facts.get("mtime_ns"), changed=changed, etag=facts.get("etag"), **known)
