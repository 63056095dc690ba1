"""A labelled set as CLIP_benchmark keeps it: shards, class names and templates in one folder, or below one URL.

found = open_wds("sets/wds_cifar10", config.data)       # or "https://host/wds_cifar10"
found.urls, found.names, found.templates                # "sets/wds_cifar10/test/{0..9}.tar", ["airplane", ...], ...

wds_cifar10/test/nshards.txt                            # 10
wds_cifar10/test/0.tar ... 9.tar                        # pictures with .cls members
wds_cifar10/classnames.txt                              # line i: label i
wds_cifar10/zeroshot_classification_templates.txt       # one a line, '{c}' = class name
"""

from __future__ import annotations

from dataclasses import dataclass

from clipscale.config import ZeroShot
from clipscale.config.data import Data
from clipscale.data.fetch.text import read_text
from clipscale.data.fetch.urls import masked
from clipscale.errors import UserError, require
from clipscale.eval.lines import lines_of

NAMES, TEMPLATES, SHARDS, KIND = (
    "classnames.txt",
    "zeroshot_classification_templates.txt",
    "test/nshards.txt",
    "dataset_type.txt",
)
_HUGGING_FACE = "https://huggingface.co/datasets/"


@dataclass(frozen=True)
class LabelledShards:
    urls: str | None  # as a source has them
    names: list[str] | None = None  # what comes with them; None: it does not
    templates: list[str] | None = None  # '{}' stands for the class name

    def replaced(self, config: ZeroShot, key: str) -> str:
        """What to tell of settings that are used in place of the set's own, or ""."""
        used = [
            f"{key}.{setting}={getattr(config, setting)}"
            for setting, own in (("classnames", self.names), ("templates", self.templates))
            if own is not None and getattr(config, setting) is not None
        ]
        return f"{' and '.join(used)} in place of the set's own; null takes those" if used else ""


def labelled_shards(config: ZeroShot, data: Data, key: str) -> LabelledShards:
    """The shards of a zero-shot evaluation, if it has any. Raises UserError as `open_wds`."""
    return LabelledShards(config.urls) if config.wds is None else open_wds(config.wds, data, key)


def open_wds(place: str, data: Data, key: str = "eval.zeroshot") -> LabelledShards:
    """The shards of its test split, and what comes with them.

    Args:
        place: a folder, a URL, or the page of a set on Hugging Face (.../datasets/<user>/<set>/tree/main).
        key: where the settings stand, for messages.

    Raises:
        UserError: no such set, one of another kind, or a file of it that cannot be read.
    """
    shown = f"{key}.wds={masked(place)!r}"

    def text(name: str) -> str | None:
        try:
            return read_text(below(place, name), data.fetch, data.allow_pipe)
        except UserError as error:
            raise UserError(f"{shown}: {error}") from error

    count = text(SHARDS)
    require(count is not None, f"{shown} has no {SHARDS}, which says how many shards its folder test has")
    count = count.strip()
    require(
        count.isascii() and count.isdigit() and int(count) > 0,
        f"{shown}: {SHARDS} holds {count[:40]!r}; it must be the number of the shards",
    )
    kind = (text(KIND) or "classification").strip().lower()
    hint = f"set eval.retrieval.urls='{masked(below(place, 'test/*.tar'))}'" if kind == "retrieval" else "take another"
    require(kind == "classification", f"{shown} is a set for {kind} ({KIND}), not one of labelled pictures; {hint}")
    names, templates = (
        None if found is None else lines_of(found, f"{shown}: {name}")
        for name, found in ((name, text(name)) for name in (NAMES, TEMPLATES))
    )
    if templates is not None:
        templates = [template.replace("{c}", "{}") for template in templates]
    return LabelledShards(below(place, f"test/{{0..{int(count) - 1}}}.tar"), names, templates)


def below(place: str, name: str) -> str:
    """The path or URL of a file of the set; a URL's query stays at its end."""
    if place.startswith(_HUGGING_FACE):
        place = place.replace("/tree/", "/resolve/", 1)
    folder, mark, query = place.partition("?") if "://" in place else (place, "", "")
    return f"{folder.rstrip('/')}/{name}{mark}{query}"
