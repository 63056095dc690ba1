"""clipscale/eval/classes.py: class names, class folders and labels held against each other."""

from __future__ import annotations

from pathlib import Path

import pytest

from clipscale.config import ZeroShot
from clipscale.errors import UserError
from clipscale.eval.classes import Classes, class_folders, find_classes
from clipscale.upstream.open_clip_files import imagenet_classes

IDS = [f"n{number:08}" for number in range(1000)]


def find(folders: list[str], names: list[str] | None) -> Classes:
    """Of a tree and a names file in the current folder; None: no names are given."""
    for name in folders:
        Path("tree", name).mkdir(parents=True)
    if names is not None:
        Path("names.txt").write_text("\n".join(names))
    return find_classes(ZeroShot(folder="tree", classnames=None if names is None else "names.txt"))


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_numbers_are_labels():
    names = [f"class {label}" for label in range(1000)]
    classes = find([str(label) for label in range(1000)], names)
    assert classes.names == names
    assert classes.labels == {str(label): label for label in range(1000)}


def test_numbers_may_have_leading_zeros_and_gaps():
    assert find(["000", "002", "010"], list("abcdefghijklm")).labels == {"000": 0, "002": 2, "010": 10}


@pytest.mark.parametrize("folders", [["dog", "cat", "great owl"], ["Dog", "CAT", "great_owl"], ["dog", "great-owl"]])
def test_folders_that_are_names_are_matched_by_name(folders):
    classes = find(folders, ["great owl", "dog", "cat"])
    assert classes.labels == {
        folder: {"g": 0, "d": 1, "c": 2}[folder[0].lower()]
        for folder in sorted(folders, key=class_folders("tree").index)
    }
    assert classes.note == ""


def test_names_that_differ_by_case_alone_are_matched_exactly():
    assert find(["Crane", "crane"], ["crane", "Crane"]).labels == {"Crane": 1, "crane": 0}


def test_others_go_by_their_order_and_that_is_told():
    classes = find(["c1", "c0", "c2", "c3"], ["dog", "cat", "owl", "fox"])
    assert classes.labels == {"c0": 0, "c1": 1, "c2": 2, "c3": 3}
    assert classes.note.endswith("line by line: c0 = dog, c1 = cat, c2 = owl, ...")


def test_some_may_be_called_like_the_class_in_their_place():
    assert find(["airplane", "automobile"], ["airplane", "car"]).labels == {"airplane": 0, "automobile": 1}


def test_without_names_the_folders_are_the_names():
    classes = find(["red_circle", "blue star", ".ipynb_checkpoints", ".git"], None)
    assert classes.names == ["blue star", "red circle"]
    assert classes.labels == {"blue star": 0, "red_circle": 1}
    assert "the 2 class folders are the names ('blue star', 'red_circle')" in classes.note


@pytest.mark.parametrize("folders", [IDS, [str(label) for label in range(1000)]])
def test_without_names_imagenets_folders_have_imagenets_names(folders):
    classes = find(folders, None)
    assert classes.names == imagenet_classes()
    assert classes.labels == {folder: label for label, folder in enumerate(folders)}
    assert classes.note == ""


def test_shards_without_names_have_imagenets():
    assert find_classes(ZeroShot(urls="a.tar")) == Classes(imagenet_classes())


@pytest.mark.parametrize(
    ("folders", "names", "said"),
    [
        (["0", "1", "7"], ["a", "b"], "the folders are labels, and '7' has no class name: there are 2 (0 to 1)"),
        (["1", "01"], ["a", "b"], "'01', '1' are one class, 'b'"),
        (["red_circle", "red circle"], ["a", "red circle"], "'red circle', 'red_circle' are one class, 'red circle'"),
        (["0", "1"], ["1", "0"], "the folder '0' is label 0 by its number, and line 1 (from 0) of "),
        (
            ["cat", "dog", "wolf"],
            ["dog", "cat", "fox"],
            "the folder 'cat' is label 0 by its place, and line 1 (from 0)",
        ),
        (["cat", "wolf"], ["dog", "cat", "fox"], "has 2 class folders, eval.zeroshot.classnames='names.txt' names 3, "),
        (["cat", "wolf"], ["dog", "cat", "fox"], " and 'wolf' is none of them"),
        (["0", "1"], None, "has 2 class folders ('0', '1'), which are no names and not ImageNet's 1,000; set "),
        (IDS[:200], None, "has 200 class folders ('n00000000', 'n00000001', 'n00000002', ...), which are no names"),
        ([*IDS[:999], "cat"], None, "has 1,000 class folders"),
        ([".hidden"], ["a"], "'tree' has no class folders"),
    ],
)
def test_what_contradicts_itself_is_refused_in_a_line(folders, names, said):
    with pytest.raises(UserError) as error:
        find(folders, names)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
