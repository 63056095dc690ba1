"""The shard index: one sidecar per tar with where each usable sample's picture and note (caption or label) lie.

    index = Index(Rules(), index_dir=None, cache_dir=None)
    shard = index.known("train-0000.tar")               # from its sidecar; None where there is no current one
    shard = index.build("train-0000.tar")               # walks the tar's headers and writes the sidecar
    shard.samples, shard.refused                        # 9998, {'no caption': 2}

Selection happens here (select.py), so that counts are final and an epoch is a number. A sidecar lies beside its shard
(`train-0000.tar.index`; `train-0000.tar.<rules>.index` for rules other than the usual), in `index_dir` when one is
given, or in the cache folder for remote shards and where the shard's folder cannot be written. A shard whose size or
time changed is indexed again; whether its bytes changed too is told. Where only its inode, or the inode's time, is
another than this host saw when it indexed, the shard is hashed: with the same bytes, its index is current.
"""

from __future__ import annotations

import hashlib
import os
import socket
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from clipscale.data.fetch.urls import is_local
from clipscale.data.shard import sidecar
from clipscale.data.shard.extra import extra_stamp, join
from clipscale.data.shard.lost import lost_samples
from clipscale.data.shard.select import Chosen, Rules, select_samples
from clipscale.data.shard.tar import list_members, mapped
from clipscale.errors import UserError, reason
from clipscale.files import cache_folder, hash_file

_FACTS = {"samples", "identity", "bytes", "crc32", "sha256", "refused", "not_read", "cut", "unread", "lost"}
_SEEN = ("host", "ctime_ns", "inode")
Hash = Literal["crc32", "sha256"]

# By sidecar and identity, what this process saw of shards that it verified: told again where that cannot be written.
_verified: dict[tuple[str, int], dict[str, Any]] = {}


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
    not_read: dict[str, int] = field(default_factory=dict)  # members not looked at, by suffix or why in no sample
    cut: str = ""  # why the archive ends early; empty: it does not
    unread: int = 0  # bytes behind the last member of an archive that is cut
    captions: dict[str, int] = field(default_factory=dict)  # samples that have each of several; empty: one is asked for
    lost: int = 0  # samples that it held before it was cut, where that is known
    changed: str = ""  # how its bytes differ from those indexed before; empty: they do not
    extra: dict[str, int] = field(default_factory=dict)  # size, time and crc32 of the extra shard, where there is one
    seen: dict[str, Any] = field(default_factory=dict, compare=False)  # of a local shard's inode, and by which host
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
    extra: dict[str, str] = field(default_factory=dict)  # by shard, the local one with its extra captions

    def known(self, url: str) -> Shard | None:
        """The shard as its sidecar has it; None where there is none, or one of other bytes.

        Raises:
            OSError: a local shard that cannot be read.
        """
        stat = os.stat(url) if is_local(url) else None
        for place in self._places(url, self._tag):
            facts = sidecar.read_facts(place)
            if self._fits(url, facts, stat) and not _is_doubtful(place, facts, stat):
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
        stat = os.stat(file)
        same_rules, other_rules = self._before(url, self._tag), self._before(url, "")
        before = [facts for _, facts in same_rules + other_rules]
        hashes = self._hashes(url, file, stat, same_rules + other_rules)
        if is_local(url) and (current := self._current_after_all(url, stat, hashes)):
            return current
        with mapped(file) as tar:
            listing = list_members(tar)
            chosen = select_samples(tar, listing, self.rules)
        chosen, extra = self._joined(url, chosen)
        stamp = _stamp(url, stat)
        if _stamp(url, os.stat(file)) != stamp:
            raise OSError("it was written to while it was indexed")
        facts = stamp | hashes | {"refused": chosen.refused, "not_read": chosen.not_read, "cut": listing.cut}
        facts |= {name: value for name, value in (("captions", chosen.captions), ("extra", extra)) if value}
        facts |= {"unread": 0, "lost": 0} | (_seen(stat) if is_local(url) else {})
        if listing.cut:
            found = len(chosen.keys) + sum(chosen.refused.values())
            lost = lost_samples(url if is_local(url) else None, found, [facts for _, facts in same_rules])
            facts |= {"unread": max(0, stat.st_size - listing.end), "lost": lost}
        if not is_local(url):  # unless another copy has come meanwhile
            facts["etag"] = told.get("etag") if told and told.get("crc32") == hashes["crc32"] else None
        places = self._places(url, self._tag)
        for place in places:
            try:
                facts = sidecar.write(place, facts, chosen.spans, chosen.keys)
                return _shard(url, place, facts, _change(before, facts))
            except OSError as error:
                cause = error
        raise OSError(
            f"cannot write the index to any of {[str(place) for place in places]} ({reason(cause)}); let "
            "data.index_dir name a folder that can be written"
        ) from cause

    def _joined(self, url: str, chosen: Chosen) -> tuple[Chosen, dict[str, int]]:
        """The samples with their extra captions, and the facts of the extra shard; empty where there is none."""
        path = self.extra.get(url)
        if path is None:
            return chosen, {}
        facts = extra_stamp(path) | {"crc32": hash_file(path, crc32=True, sha256=False)["crc32"]}
        with mapped(path) as tar:
            chosen = join(chosen, self.rules, tar, path)
        if not extra_stamp(path).items() <= facts.items():
            raise OSError(f"its extra shard {path} was written to while it was indexed")
        return chosen, facts

    def _fits(self, url: str, facts: dict[str, Any], stat: os.stat_result | None) -> bool:
        """Whether these facts of a sidecar are all there, and of a shard (and an extra one) of this size and time."""
        if not facts.keys() >= _FACTS or (self.hash == "sha256" and not facts["sha256"]):
            return False
        path = self.extra.get(url)
        if path is not None and not extra_stamp(path).items() <= facts.get("extra", {}).items():
            return False
        return stat is None or (facts["bytes"], facts.get("mtime_ns")) == (stat.st_size, stat.st_mtime_ns)

    def _current_after_all(self, url: str, stat: os.stat_result, hashes: dict[str, Any]) -> Shard | None:
        """The shard as its sidecar has it, where that was in doubt and the bytes are the same after all."""
        places = self._places(url, self._tag)
        for place in places:
            facts = sidecar.read_facts(place)
            if (
                not self._fits(url, facts, stat)
                or not _is_doubtful(place, facts, stat)
                or facts["crc32"] != hashes["crc32"]
            ):
                continue
            facts |= _seen(stat)
            for target in places:
                with suppress(OSError):
                    sidecar.rewrite(place, target, facts)
                    return _shard(url, target, facts)
            return _shard(url, place, facts)
        return None

    def _before(self, url: str, tag: str) -> list[tuple[Path, dict[str, Any]]]:
        """What the shard's sidecars of these rules said until now, and where they lie."""
        found = [(place, sidecar.read_facts(place, before=True)) for place in self._places(url, tag)]
        return [(place, facts) for place, facts in found if facts]

    @cached_property
    def _tag(self) -> str:
        return ".".join(filter(None, [self.rules.tag, "declared" if self.lazily else ""]))

    def _hashes(
        self, url: str, file: str | int, stat: os.stat_result, before: list[tuple[Path, dict[str, Any]]]
    ) -> dict[str, Any]:
        """From a sidecar of the same bytes where there is one, so that other rules do not read it again."""
        for place, facts in before if is_local(url) else ():
            same = _stamp(url, stat).items() <= facts.items() and not _is_doubtful(place, facts, stat)
            if same and (self.hash == "crc32" or facts["sha256"]):
                return {"crc32": facts["crc32"], "sha256": facts["sha256"]}
        found = hash_file(file, crc32=True, sha256=self.hash == "sha256")
        return {"crc32": found["crc32"], "sha256": found["sha256"]}

    def _places(self, url: str, tag: str) -> list[Path]:
        if tag and url in self.extra:  # one for each extra shard that it goes with
            extra = os.path.abspath(self.extra[url]).encode(errors="surrogatepass")
            tag = f"{tag}-{hashlib.sha1(extra).hexdigest()[:8]}"
        name = ".".join(filter(None, [basename(url), tag, "index"]))
        where = os.path.abspath(url) if is_local(url) else url
        place = hashlib.sha1(where.encode(errors="surrogatepass"))  # file names may be no UTF-8
        tagged = f"{place.hexdigest()[:16]}-{name[-200:]}"
        if self.index_dir is not None:
            return [Path(self.index_dir) / tagged]
        places = [Path(url).with_name(name)] if is_local(url) else []
        try:
            places.append(cache_folder(self.cache_dir) / "index" / tagged)
        except UserError:  # no home folder: an index beside its shard needs none
            if not places:
                raise
        return places


def basename(url: str) -> str:
    """The last part of a path or URL, without a query."""
    return os.path.basename(url if is_local(url) else urlsplit(url).path) or "shard"


def remember(shard: Shard) -> None:
    """That this shard was verified, here or in a process of ours: not again for a sidecar that cannot be written."""
    _verified[shard.sidecar, shard.identity] = shard.seen


def _stamp(url: str, stat: os.stat_result) -> dict[str, int]:
    """By what a change of the shard is noticed without reading it; the time of a remote shard's copy says nothing."""
    return {"bytes": stat.st_size} | ({"mtime_ns": stat.st_mtime_ns} if is_local(url) else {})


def _seen(stat: os.stat_result) -> dict[str, Any]:
    """Changes also where a file is rewritten with its size and time, and at times where it is not. Other hosts may see
    other numbers of the same file."""
    return {"host": _host(), "ctime_ns": stat.st_ctime_ns, "inode": stat.st_ino}


@cache
def _host() -> str:
    """This host until it is started anew: containers of several hosts may have one name."""
    with suppress(OSError):
        return f"{socket.gethostname()} {Path('/proc/sys/kernel/random/boot_id').read_text().strip()}"
    return socket.gethostname()


def _is_doubtful(place: Path, facts: dict[str, Any], stat: os.stat_result | None) -> bool:
    """Whether this host saw another inode when it wrote the sidecar: the bytes may have changed."""
    if stat is None or facts.get("host") != _host():
        return False
    now = _seen(stat)
    return not now.items() <= facts.items() and _verified.get((str(place), facts["identity"])) != now


def _change(before: list[dict[str, Any]], now: dict[str, Any]) -> str:
    """How the shard differs from what the first of its former sidecars says."""
    if not before or (before[0]["bytes"], before[0]["crc32"]) == (now["bytes"], now["crc32"]):
        return ""
    old, new = (f"{facts['bytes']} bytes, crc32 {facts['crc32']:08x}" for facts in (before[0], now))
    return f"{old} -> {new}"


def _shard(url: str, place: Path, facts: dict[str, Any], changed: str = "") -> Shard:
    known = {name: facts[name] for name in _FACTS}
    seen = {name: facts[name] for name in _SEEN if name in facts}
    own = {"mtime_ns": facts.get("mtime_ns"), "etag": facts.get("etag"), "seen": seen}
    own |= {name: facts.get(name, {}) for name in ("captions", "extra")}
    return Shard(url, str(place), changed=changed, **own, **known)
