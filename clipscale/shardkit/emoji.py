"""npm's emoji-datasource-<vendor> packages -> captioned shards: some vendors' drawings train, another's are the test.

    packages = [read_package(Path("emoji-datasource-google-16.0.0.tgz")), read_package(Path("twitter/package"))]
    made = convert(packages, Path("shards"), test="twitter", unseen=100, per_shard=500, seed=0, overwrite=False)
    made.counts         # {'train': 3355, 'validation': 100, 'test': 1842, ...}

A caption is a line: the emoji's name, its other short names and, to train on, its group ("animal mammal"; not of skin
tones, or groups would be half of all captions). Emoji that the data call replaced are left out, and of the test those
drawn like an earlier one (flags of islands).
Pictures lie on white and stay PNG, 64 pixels a side, so that readers which drop transparency see the same.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from clipscale.counter import fold, shuffled
from clipscale.data.bad import BadSample
from clipscale.data.pixels.decode import decode
from clipscale.data.shard.writer import ShardWriter
from clipscale.errors import UserError, require
from clipscale.files import write_file
from clipscale.progress import progress_bar
from clipscale.shardkit.destination import Destination, building

SPLITS = ("train", "validation", "test", "groups", "unseen")
_DATA = "emoji.json"
_PICTURE = re.compile(r"img/([\w-]+)/64/([\w-]+\.png)")
_TONES = {"1F3FB": "light", "1F3FC": "medium-light", "1F3FD": "medium", "1F3FE": "medium-dark", "1F3FF": "dark"}
_MAX_PIXELS = 1 << 20
_CODES = "country-flag"  # whose short names are codes: flag-at


@dataclass(frozen=True)
class Package:
    vendor: str
    emoji: list[dict[str, Any]]  # emoji.json, as it is
    pictures: dict[str, bytes]  # by the name of the file


@dataclass(frozen=True)
class Drawing:
    """One picture of one vendor."""

    unified: str  # the emoji's code points, the same for every vendor and skin tone
    name: str
    captions: list[str]  # name and short names, each once
    group: str
    tone: str  # of skin, or ""
    vendor: str
    png: bytes  # without transparency


class Made(NamedTuple):
    counts: dict[str, int]  # pictures of each split
    trained: list[str]  # vendors
    passed_over: Counter[str]  # cause -> emoji


def read_package(path: Path) -> Package:
    """The data and the 64-pixel pictures of a package: its .tgz, or the folder that this was unpacked to.

    Raises:
        UserError: neither, a damaged archive, or one without the data or the pictures.
        OSError: no such file.
    """
    data, pictures = None, {}
    for name, content in _files(path):
        if match := _PICTURE.fullmatch(name):
            pictures.setdefault(match[1], {})[match[2]] = content
        else:
            data = content
    require(
        data is not None and len(pictures) == 1,
        f"{path} is no emoji-datasource-<vendor> package: it must hold emoji.json and img/<vendor>/64/*.png",
    )
    try:
        emoji = json.loads(data)
        for one in emoji:
            _ = one["name"].lower(), one["unified"], one["short_names"], one["subcategory"].lower()
            _ = [variant["image"] for variant in _variants(one).values()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: emoji.json is not what the package's README says ({error!r})") from error
    [(vendor, its)] = pictures.items()
    return Package(vendor, emoji, its)


def convert(
    packages: list[Package], output: Path, *, test: str, unseen: int, per_shard: int, seed: int, overwrite: bool
) -> Made:
    """Write every shard and list.

    Args:
        test: the vendor whose drawings are the test; the others' train.
        unseen: so many emoji, in every skin tone, are kept from training.

    Raises:
        UserError: vendors that do not fit, a broken picture, too few emoji, or shards that are there already.
    """
    vendors = [package.vendor for package in packages]
    require(len({*vendors}) == len(vendors), f"the packages are of {', '.join(vendors)}: give each vendor once")
    require(test in vendors, f"--test {test}: none of the packages is of this vendor; they are of {', '.join(vendors)}")
    require(
        len(vendors) > 1, f"only {test}'s package is given, and its drawings are the test: give another to train on"
    )
    old = [path for split in SPLITS for path in Destination(output, split, per_shard, overwrite).old_shards()]
    passed_over: Counter[str] = Counter()
    tests = _tests(next(package for package in packages if package.vendor == test), passed_over)
    trains = [drawing for package in packages if package.vendor != test for drawing in _drawings(package, passed_over)]
    held_out = _held_out(trains, tests, unseen, seed)
    splits = {
        "train": [drawing for drawing in trains if drawing.unified not in held_out],
        "validation": [drawing for drawing in trains if drawing.unified in held_out and not drawing.tone],
        "test": tests,
        "groups": tests,
        "unseen": [drawing for drawing in tests if drawing.unified in held_out],
    }
    require(all(splits.values()), f"no picture for {', '.join(name for name, its in splits.items() if not its)}")
    splits["train"] = [splits["train"][at] for at in shuffled(fold(seed, "train"), len(splits["train"])).tolist()]
    names, groups = [one.name for one in tests], [*dict.fromkeys(one.group for one in tests)]
    labels = {"test": names, "groups": groups}
    with building(output, "emoji", old) as build:
        for split, drawings in splits.items():
            _write(build / split, drawings, labels.get(split, []), per_shard)
    unseen_names = [one.name for one in splits["unseen"]]
    for file, lines in (("classnames", names), ("groups", groups), ("unseen", unseen_names), ("templates", ["{}"])):
        write_file(output / f"{file}.txt", "".join(f"{line}\n" for line in lines))
    counts = {split: len(drawings) for split, drawings in splits.items()}
    return Made(counts, [vendor for vendor in vendors if vendor != test], passed_over)


# --- a package's files ------------------------------------------------------------------------------------------------


def _files(path: Path) -> Iterator[tuple[str, bytes]]:
    """The data and the pictures by their names below the package's folder. Nothing is unpacked."""
    if path.is_dir():
        root = path if (path / _DATA).exists() else path / "package"
        for file in sorted([*root.glob(_DATA), *root.glob("img/*/64/*.png")]):
            yield file.relative_to(root).as_posix(), file.read_bytes()
        return
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = member.name.partition("/")[2]
                if member.isfile() and (name == _DATA or _PICTURE.fullmatch(name)):
                    yield name, archive.extractfile(member).read()
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: neither a package's folder nor a whole .tgz ({error})") from error


# --- emoji -> drawings ------------------------------------------------------------------------------------------------


def _tests(package: Package, passed_over: Counter[str]) -> list[Drawing]:
    """Without skin tones, each name and each drawing once."""
    found, names, pictures = [], set(), set()
    for drawing in _drawings(package, passed_over):
        if drawing.tone:
            continue
        if drawing.name in names or drawing.png in pictures:
            passed_over[f"{package.vendor}'s that are drawn or called like an earlier one"] += 1
            continue
        names.add(drawing.name)
        pictures.add(drawing.png)
        found.append(drawing)
    return found


def _drawings(package: Package, passed_over: Counter[str]) -> Iterator[Drawing]:
    """In the order of the data, which is that of the code points."""
    for emoji in package.emoji:
        if emoji.get("obsoleted_by"):
            passed_over[f"{package.vendor}'s that the data call replaced"] += 1
            continue
        variants = _variants(emoji)
        missing = [tones for tones, one in variants.items() if one["image"] not in package.pictures]
        passed_over[f"{package.vendor}'s pictures that are not there"] += len(missing)
        for tones, one in variants.items():
            if tones not in missing:
                yield _drawing(package, emoji, tones, one["image"])


def _variants(emoji: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Code points of the skin tones, "" for none -> what names the picture."""
    return {"": emoji, **emoji.get("skin_variations", {})}


def _drawing(package: Package, emoji: dict[str, Any], tones: str, image: str) -> Drawing:
    name, group = emoji["name"].lower(), emoji["subcategory"]
    short = [] if group == _CODES else [re.sub("[_-]+", " ", one).strip() for one in emoji["short_names"]]
    tone = " and ".join(dict.fromkeys(_TONES.get(one, one) for one in tones.split("-"))) if tones else ""
    captions = [f"{caption}, {tone} skin tone" if tone else caption for caption in dict.fromkeys([name, *short])]
    try:
        pixels = decode(package.pictures[image], _MAX_PIXELS)
    except BadSample as error:
        raise UserError(f"{package.vendor}'s {image}: {error}") from error
    png = io.BytesIO()
    Image.fromarray(pixels).save(png, "PNG")
    group = group.replace("-", " ")
    return Drawing(emoji["unified"], name, captions, group, tone, package.vendor, png.getvalue())


def _held_out(trains: list[Drawing], tests: list[Drawing], unseen: int, seed: int) -> set[str]:
    """Code points of `unseen` emoji that are both trained on and tested."""
    trained = {drawing.unified for drawing in trains}
    both = [drawing.unified for drawing in tests if drawing.unified in trained]
    require(
        unseen < len(both), f"--unseen {unseen}: the vendors have {len(both)} emoji in common; keep some to train on"
    )
    return {both[at] for at in shuffled(fold(seed, "unseen"), len(both))[:unseen].tolist()}


# --- shards -----------------------------------------------------------------------------------------------------------


def _write(prefix: Path, drawings: list[Drawing], classes: list[str], per_shard: int) -> None:
    """`classes`: names or groups, whose numbers are the labels; none: pairs without labels."""
    split = prefix.name
    with ShardWriter(prefix, samples_per_shard=per_shard) as writer, progress_bar(split) as progress:
        for drawing in drawings:
            grouped = split == "train" and not drawing.tone
            captions = [*drawing.captions, drawing.group] if grouped else drawing.captions
            facts = {"name": drawing.name, "group": drawing.group, "tone": drawing.tone}
            facts |= {"unified": drawing.unified, "vendor": drawing.vendor}
            sample = {"png": drawing.png, "txt": "\n".join(captions), "json": facts}
            if classes:
                sample["cls"] = classes.index(drawing.group if split == "groups" else drawing.name)
            writer.write(f"{split}{writer.samples:06}", sample)
            progress(writer.samples, len(drawings))
