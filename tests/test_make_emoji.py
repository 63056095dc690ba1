"""data_tools/make_emoji.py and clipscale/shardkit/emoji.py, on imitations of npm's emoji-datasource packages."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from tools import load_tool

from clipscale.config import ZeroShot
from clipscale.config.data import Data
from clipscale.eval.zeroshot import check_task, load_task

NAMES = ["DOG FACE", "CAT FACE", "Aland Flag", "Bland Flag", "WAVING HAND SIGN", "RUNNER", "RED APPLE"]
GROUPS = ["animal-mammal", "animal-mammal", "country-flag", "country-flag", "hand-fingers-open", "person", "food-fruit"]
SHORT = [["dog"], ["cat", "cat_face"], ["flag-al"], ["bl", "flag-bl"], ["wave"], ["runner"], ["apple"]]


@pytest.fixture(scope="module")
def tool():
    return load_tool("make_emoji")


def drawing(vendor: str, number: int) -> np.ndarray:
    """RGBA of 64 pixels a side, its upper half clear over black; the two flags of twitter are alike."""
    number = 2 if vendor == "twitter" and number == 3 else number
    pixels = np.random.default_rng([len(vendor), number]).integers(0, 256, (64, 64, 4), dtype=np.uint8)
    pixels[:32], pixels[32:, :, 3] = 0, 255
    return pixels


def package(folder: Path, vendor: str) -> Path:
    """Seven emoji: one in two skin tones, one that was replaced. `folder`/package, as npm's archive has it."""
    pictures = folder / "package" / "img" / vendor / "64"
    pictures.mkdir(parents=True)
    (folder / "package" / "img" / vendor / "sheets").mkdir()
    (folder / "package" / "img" / vendor / "sheets" / "64.png").write_bytes(b"no drawing")
    emoji = [
        {"name": name, "unified": f"1F{i}", "image": f"1f{i}.png", "short_names": short, "subcategory": group}
        for i, (name, group, short) in enumerate(zip(NAMES, GROUPS, SHORT, strict=True))
    ]
    emoji[4]["skin_variations"] = {"1F3FB": {"image": "1f4-1.png"}, "1F3FC-1F3FF": {"image": "1f4-2.png"}}
    emoji[5]["obsoleted_by"] = "1F9"
    images = [one["image"] for one in emoji] + ["1f4-1.png", "1f4-2.png"]
    for number, image in enumerate(images):
        Image.fromarray(drawing(vendor, number)).save(pictures / image)
    (folder / "package" / "emoji.json").write_text(json.dumps(emoji))
    return folder


def archive(folder: Path) -> Path:
    with tarfile.open(folder.with_suffix(".tgz"), "w:gz") as file:
        file.add(folder / "package", "package")
    return folder.with_suffix(".tgz")


def read(folder: Path, split: str) -> list[dict]:
    return [
        sample
        for path in sorted(folder.glob(f"{split}-*.tar"))
        for sample in webdataset.WebDataset(str(path), shardshuffle=False)
    ]


def captions(samples: list[dict]) -> list[list[str]]:
    return [sample["txt"].decode().splitlines() for sample in samples]


@pytest.fixture(scope="module")
def made(tool, tmp_path_factory) -> Path:
    """The set, one of whose emoji is unseen, from a folder and an archive."""
    folder = tmp_path_factory.mktemp("emoji")
    train, test = package(folder / "google", "google"), archive(package(folder / "twitter", "twitter"))
    words = [str(test), str(train), "--output", str(folder / "set"), "--unseen", "1", "--samples-per-shard", "4"]
    assert tool.main(words) == 0
    return folder / "set"


def test_a_vendor_trains_and_another_is_the_test(made):
    """Of the seven emoji one was replaced; twitter's second flag is drawn like its first."""
    train, validation, test, unseen = (read(made, split) for split in ("train", "validation", "test", "unseen"))
    [kept] = (made / "unseen.txt").read_text().splitlines()
    assert {json.loads(sample["json"])["vendor"] for sample in [*train, *validation]} == {"google"}
    assert {json.loads(sample["json"])["vendor"] for sample in [*test, *unseen]} == {"twitter"}
    names = [name.lower() for name in NAMES if name not in ("RUNNER", "Bland Flag")]
    assert (made / "classnames.txt").read_text().splitlines() == names
    assert [json.loads(sample["json"])["name"] for sample in test] == names
    assert {json.loads(sample["json"])["name"] for sample in train} == {*names, "bland flag"} - {kept}
    assert [json.loads(sample["json"])["name"] for sample in [*validation, *unseen]] == [kept, kept]
    assert len(train) == (8 if kept != "waving hand sign" else 6) - 1


def test_captions_are_name_short_names_and_group(made):
    found = {its[0]: its[1:] for its in captions(read(made, "train") + read(made, "validation"))}
    groups = {"dog face": ["animal mammal"], "cat face": ["animal mammal"], "aland flag": ["country flag"]}
    short = {"dog face": ["dog"], "cat face": ["cat"], "aland flag": []}
    tone = "light skin tone", "medium-light and dark skin tone"
    groups |= {"waving hand sign": ["hand fingers open"]} | {f"waving hand sign, {its}": [] for its in tone}
    short |= {"waving hand sign": ["wave"]} | {f"waving hand sign, {its}": [f"wave, {its}"] for its in tone}
    [kept] = (made / "unseen.txt").read_text().splitlines()
    for name in groups.keys() & found:
        assert found[name] == short[name] + (groups[name] if name != kept else [])
    assert len(groups.keys() & found) >= 3
    assert captions(read(made, "test"))[:3] == [["dog face", "dog"], ["cat face", "cat"], ["aland flag"]]


def test_labels_are_lines_and_evaluation_takes_them(made):
    for split, lists, which in (("test", "classnames", "name"), ("groups", "groups", "group")):
        names, samples = (made / f"{lists}.txt").read_text().splitlines(), read(made, split)
        assert [names[int(sample["cls"])] for sample in samples] == [json.loads(s["json"])[which] for s in samples]
        settings = ZeroShot(
            urls=f"{made}/{split}-*.tar", classnames=f"{made}/{lists}.txt", templates=f"{made}/templates.txt"
        )
        task = load_task(settings, Data())
        assert (len(task.pictures), check_task(task), task.templates) == (5, "", ["{}"])
    assert len({*names}) == len(names) == 4


def test_pictures_lie_on_white(made):
    """Readers that drop transparency would show the black below."""
    for number, sample in enumerate(read(made, "test")[:2]):
        image = Image.open(io.BytesIO(sample["png"]))
        pixels = np.asarray(image)
        assert image.mode == "RGB"
        assert (pixels[:32] == 255).all()
        np.testing.assert_array_equal(pixels[32:], drawing("twitter", number)[32:, :, :3])


def test_equal_packages_give_equal_bytes_and_nothing_is_replaced_unasked(tool, made, tmp_path, capsys):
    words = [str(made.parent / vendor / "package") for vendor in ("twitter", "google")]
    words += ["--unseen", "1", "--samples-per-shard", "4", "--output", str(tmp_path)]
    assert tool.main(words) == 0
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert files == {name: (made / name).read_bytes() for name in files}
    assert {name for name in files if name.endswith(".tar")} == {path.name for path in made.glob("*.tar")}
    out = capsys.readouterr().out
    assert "1 of twitter's that are drawn or called like an earlier one" in out
    assert "1 of google's that the data call replaced" in out
    assert tool.main(words) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert tool.main([*words, "--samples-per-shard", "99", "--overwrite"]) == 0
    assert len([*tmp_path.glob("*.tar")]) == 5


@pytest.mark.parametrize(
    ("break_it", "options", "told"),
    [
        (lambda here: (here / "package/emoji.json").unlink(), [], "is no emoji-datasource-<vendor> package"),
        (lambda here: (here / "package/emoji.json").write_text("{"), [], "is not what the package's README says"),
        (lambda here: (here / "package/emoji.json").write_text("[{}]"), [], "is not what the package's README says"),
        (lambda here: (here / "package/img/apple/64/1f0.png").write_bytes(b"x"), [], "apple's 1f0.png: "),
        (lambda here: (here / "package").rename(here / "other"), [], "is no emoji-datasource-<vendor> package"),
        (lambda here: None, ["--test=emojione"], "--test emojione: none of the packages is of this vendor"),
        (lambda here: None, ["--test=apple", "--unseen=6"], "--unseen 6: the vendors have 6 emoji in common"),
        (lambda here: None, ["TWICE"], "give each vendor once"),
        (lambda here: None, ["ALONE", "--test=apple"], "give another to train on"),
        (lambda here: None, ["gone.tgz"], "gone.tgz does not exist"),
        (lambda here: None, ["CUT"], "neither a package's folder nor a whole .tgz"),
    ],
)
def test_mistakes_are_one_line(tool, made, tmp_path, capsys, break_it, options, told):
    here = package(tmp_path / "apple", "apple")
    break_it(here)
    cut = tmp_path / "cut.tgz"
    cut.write_bytes((made.parent / "twitter.tgz").read_bytes()[:9000])
    meant = {"TWICE": str(here), "CUT": str(cut)}
    others = [] if "ALONE" in options else [str(made.parent / "twitter")]
    words = [meant.get(option, option) for option in options if option != "ALONE"]
    assert tool.main(["--output", str(tmp_path / "set"), "--unseen=1", *sorted(words), str(here), *others]) == 2
    err = capsys.readouterr().err
    assert err.startswith("make_emoji.py: error: ")
    assert told in err
    assert err.count("\n") == 1
    assert not list((tmp_path / "set").glob("*"))
