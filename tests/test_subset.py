"""clipscale/eval/subset.py: which classes may be answered and which are right, against full logits, columns masked."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import timm
from shards import picture, write_shard
from test_zeroshot import ALONE, TOKENIZE, similarity, spread_towers
from tiny import write_config

from clipscale.cli import main
from clipscale.config import ZeroShot
from clipscale.config.data import Data
from clipscale.data.pixels.decode import Decoding
from clipscale.errors import UserError
from clipscale.eval.classes import find_classes
from clipscale.eval.classifier import Classifiers
from clipscale.eval.per_class import class_table
from clipscale.eval.subset import Subset, find_subset
from clipscale.eval.view import View
from clipscale.eval.zeroshot import ZeroShotResult, ZeroShotTask, check_task, evaluate_zeroshot, load_task
from clipscale.upstream.open_clip_files import imagenet_classes
from clipscale.upstream.timm_files import SUBSETS, imagenet_subset, imagenet_synsets

NAMES = ["ant", "bee", "cat", "cat", "dog", "elk"]  # two of one name, as ImageNet has


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def towers():
    return spread_towers(2)  # with more some names tie


@pytest.fixture(scope="module")
def score(towers):
    """Of a task; all of them have one classifier."""
    classifiers = Classifiers(towers, TOKENIZE, 16, ALONE)

    def evaluate(task: ZeroShotTask) -> ZeroShotResult:
        view = View(16, Decoding(max_pixels=10_000))
        classifier_CD = classifiers.of(task.classnames, task.templates)
        return evaluate_zeroshot(towers, task, classifier_CD, ALONE, batch=8, view=view, threads=1)

    return evaluate


@pytest.fixture(scope="module")
def logits(towers) -> np.ndarray:
    """[41, 1000] of the pictures 0 to 40, by open_clip."""
    return similarity(towers, imagenet_classes()).numpy()


def masked(logits: np.ndarray, answers: list[int]) -> np.ndarray:
    """The classes of each picture from the nearest on, those outside last."""
    inside = np.full(logits.shape[1], -np.inf)
    inside[answers] = 0
    return (logits + inside).argsort(axis=1)[:, ::-1]


def tree(folders: list[str]) -> str:
    """Picture i in the i-th folder."""
    for i, folder in enumerate(folders):
        Path("tree", folder).mkdir(parents=True, exist_ok=True)
        Path("tree", folder, f"{i:03}.png").write_bytes(picture(i, 16, 16, "PNG"))
    return "tree"


def settings(**changes) -> ZeroShot:
    Path("templates.txt").write_text("a photo of the {}.\n{}\none {} on gravel\n")
    return ZeroShot(templates="templates.txt", **changes)


# --- scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subset", SUBSETS)
def test_a_and_r_are_scored_over_their_classes(score, logits, subset):
    """A third of the pictures is in the class that is the nearest of the subset, a third in the third nearest."""
    answers, synsets = imagenet_subset(subset), imagenet_synsets()
    order = masked(logits, answers)
    labels = np.array([row[[0, 2, 30][i % 3]] for i, row in enumerate(order)])
    labels[::7] = next(label for label in range(1000) if label not in answers)  # passed over
    inside = np.arange(41) % 7 != 0
    config = settings(folder=tree([synsets[label] for label in labels]), subset=subset)
    task = load_task(config, Data())
    assert check_task(task) == (
        f"1 class folder not in eval.zeroshot.subset={subset} passed over ('{synsets[labels[0]]}')"
    )
    result = score(task)
    first, fifth = order[:, 0] == labels, (order[:, :5] == labels[:, None]).any(1)
    assert (result.pictures, result.passed) == (inside.sum(), 1)
    assert (sum(result.hits1), sum(result.hits5)) == (first[inside].sum(), fifth[inside].sum())
    assert 0 < result.top1 < result.top5 < 1
    assert sum(result.hits1) > (logits.argmax(1) == labels)[inside].sum()  # over all 1,000 it would be another number
    assert [seen for seen in result.seen if seen] == [times for _, times in sorted(Counter(labels[inside]).items())]
    table = class_table(task, result)
    assert len(table["classes"]) == 200
    names = imagenet_classes()
    wrong = Counter((names[c], names[row[0]]) for c, row in zip(labels[inside], order[inside], strict=True))
    assert {(row["class"], row["answered"]): row["pictures"] for row in table["confusions"]} == {
        pair: times for pair, times in wrong.items() if pair[0] != pair[1]
    }


def test_a_mapping_counts_any_of_a_folders_classes_as_right(score, logits):
    """Classes of several folders, and folders of several classes: as ObjectNet's are."""
    mapping = {"lamp": [1, 2, 3], "a chair": [3, 4], "cup": 900, "unseen": ["tench", "n02099601", *range(400, 420)]}
    answers = [0, 1, 2, 3, 4, 207, *range(400, 420), 900]
    order = masked(logits, answers)
    folders = [["lamp", "a_chair", "cup", "other"][i % 4] for i in range(41)]
    Path("map.json").write_text(json.dumps(mapping))
    config = settings(folder=tree(folders), subset="map.json")
    task = load_task(config, Data())
    assert task.subset.answers == answers
    assert check_task(task) == (
        "warning: no folder for 1 of the 4 in eval.zeroshot.subset=map.json ('unseen'); "
        "1 class folder not in eval.zeroshot.subset=map.json passed over ('other')"
    )
    right = {"lamp": [1, 2, 3], "a_chair": [3, 4], "cup": [900]}
    hits = {folder: [0, 0, 0] for folder in right}
    for folder, row in zip(folders, order, strict=True):
        if folder in right:
            found = [row[0] in right[folder], bool(set(row[:5]) & set(right[folder])), True]
            hits[folder] = np.add(hits[folder], found).tolist()
    result = score(task)
    counts = list(zip(result.hits1, result.hits5, result.seen, strict=True))
    assert counts == [(*hits["lamp"],), (*hits["a_chair"],), (*hits["cup"],), (0, 0, 0)]
    assert 0 < result.top1 < result.top5 < 1
    samples = [  # the same as shards: labels are places in the mapping
        (f"{i}", {"png": picture(i, 16, 16, "PNG"), "cls": b"%d" % list(right).index(folder)})
        for i, folder in enumerate(folders)
        if folder in right
    ]
    write_shard(Path("0.tar"), samples)
    shards = settings(urls="0.tar", subset="map.json")
    assert check_task(load_task(shards, Data())) == ""
    assert score(load_task(shards, Data())).hits5 == result.hits5


# --- folders ----------------------------------------------------------------------------------------------------------


def classes_of(folders: list[str], **changes):
    for folder in folders:
        Path("tree", folder).mkdir(parents=True)
    return find_classes(ZeroShot(folder="tree", **changes))


@pytest.mark.parametrize("classnames", [None, "imagenet"])
def test_wordnet_ids_are_imagenets_classes(classnames):
    """Of which a tree may have all (Sketch) or some."""
    folders = [imagenet_synsets()[label] for label in (7, 300, 999)]
    found = classes_of(folders, classnames=classnames)
    assert found.labels == dict(zip(folders, (7, 300, 999), strict=True))
    assert found.names == imagenet_classes()
    assert found.note == (
        "warning: 3 class folders of ImageNet's 1,000, and all 1,000 are answers; eval.zeroshot.subset=FILE takes "
        "those alone"
    )


def test_all_of_them_are_told_nothing_and_those_of_r_its_name():
    assert classes_of(imagenet_synsets()).note == ""
    assert classes_of([], subset="imagenet_a").labels == {
        imagenet_synsets()[i]: i for i in imagenet_subset("imagenet_a")
    }
    for label in set(range(1000)) - set(imagenet_subset("imagenet_r")):
        Path("tree", imagenet_synsets()[label]).rmdir()
    assert classes_of([]).note.endswith("eval.zeroshot.subset=imagenet_r takes those alone")


def test_names_of_ones_own_may_stand_for_imagenets_in_their_order():
    Path("names.txt").write_text("\n".join(f"Klasse {label}" for label in range(1000)))
    found = classes_of([imagenet_synsets()[i] for i in (6, 11)], classnames="names.txt", subset="imagenet_a")
    assert found.labels == {imagenet_synsets()[6]: 6, imagenet_synsets()[11]: 11}


# --- the setting ------------------------------------------------------------------------------------------------------


def find(text: str, names: list[str] = NAMES) -> Subset:
    Path("subset").write_text(text)
    return find_subset("subset", names)


@pytest.mark.parametrize("subset", SUBSETS)
def test_the_lists_are_timms(subset):
    found = find_subset(subset, imagenet_classes())
    theirs = Path(timm.__file__).parent / "data/_info" / f"{subset}_synsets.txt"
    assert [imagenet_synsets()[label] for label in found.answers] == theirs.read_text().split()
    assert [label for label, right in enumerate(found.right) if right] == found.answers
    assert found.labels == 200


def test_a_file_of_lines_has_numbers_names_or_wordnet_ids():
    assert find("elk\n1\n4\n") == Subset([1, 4, 5], [[], [1], [], [], [4], [5]], NAMES)
    assert find("6\ntench\nn02099601", imagenet_classes()).answers == [0, 6, 207]


def test_a_file_of_json_has_folders_and_their_classes():
    found = find('{"pet": ["dog", 2, 3, "2"], "small": "bee", "old": 2}')
    assert found == Subset([1, 2, 3, 4], [[2, 3, 4], [1], [2]], ["pet", "small", "old"], mapped=True)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty; write one a line"),
        ("1\n\n2", "line 2 is empty; take it out"),
        ("1\n6", "eval.zeroshot.subset=subset: line 2: there is no class 6: there are 6 (0 to 5)"),
        ("1\nbees", "line 2: 'bees' is none of the 6 class names; did you mean bee?"),
        ("1\nzebra", "line 2: 'zebra' is none of the 6 class names; mend it"),
        ("1\ncat", "line 2: 'cat' is the name of classes 2 and 3; write a number"),
        ("1\nbee", "has class 1 ('bee') twice; take one out"),
        ("1", "leaves fewer than two classes to answer; name more"),
        ("{}", "leaves fewer than two classes to answer; name more"),
        ('{"a": 1', "subset=subset is no JSON: Expecting ',' delimiter"),
        ('{"a": []}', "'a' has no class; name one, or take it out"),
        ('{"a": 1, "a": 2}', "has 'a' twice; take one out"),
        ('{"a": [1, "bees"]}', "'a': 'bees' is none of the 6 class names; did you mean bee?"),
        ('{"a": {"b": 1}}', "'a': ('b', 1) is no class; write a name or its number"),
        ('{"a": 1.5}', "'a': 1.5 is no class; write a name or its number"),
        ('{"a": true}', "'a': True is no class; write a name or its number"),
        ('{"a": -1}', "'a': there is no class -1"),
    ],
)
def test_a_file_that_names_no_classes_is_told_in_a_line(text, said):
    with pytest.raises(UserError) as error:
        find(text)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("folders", "changes", "said"),
    [
        (["a"], {"subset": "nowhere"}, "eval.zeroshot.subset='nowhere' cannot be read"),
        (["a"], {"subset": "objectnet"}, "comes with ObjectNet and with no package; write it as a JSON file"),
        (
            ["a"],
            {"subset": "imagenet_a", "classnames": "names.txt"},
            "takes 200 of ImageNet's 1,000 classes, and there",
        ),
        (["0", "6"], {"subset": "imagenet_a"}, "the folders are labels, lines of the class names, and '0' is none of"),
        (["x", "y"], {"subset": "map.json"}, "none of the folders ('x', 'y') is in eval.zeroshot.subset=map.json"),
        ([imagenet_synsets()[0]], {"subset": "imagenet_a"}, "none of the folders ('n01440764') is in "),
        (["x", "y"], {"subset": "imagenet_a"}, "has 2 class folders, eval.zeroshot.classnames='imagenet' names 1000"),
    ],
)
def test_a_subset_that_does_not_fit_is_told_in_a_line(folders, changes, said):
    Path("names.txt").write_text("\n".join(NAMES))
    Path("map.json").write_text('{"a": 0, "b": 1}')
    with pytest.raises(UserError) as error:
        classes_of(folders, **changes)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("subset", "label", "said"),
    [
        (
            "lines.txt",
            b"2",
            "label 2 ('cat') is none of the 2 classes of eval.zeroshot.subset; labels are lines of the",
        ),
        ("map.json", b"2", "label 2 has no class name: there are 2 (0 to 1); eval.zeroshot.subset must have them all"),
    ],
)
def test_a_label_outside_the_subset_is_told_in_a_line(subset, label, said):
    Path("names.txt").write_text("\n".join(NAMES))
    Path("lines.txt").write_text("0\nbee")
    Path("map.json").write_text('{"a": 0, "b": 1}')
    write_shard(
        Path("0.tar"), [(f"{i}", {"png": picture(i, 16, 16, "PNG"), "cls": c}) for i, c in enumerate((b"0", label))]
    )
    task = load_task(settings(urls="0.tar", classnames="names.txt", subset=subset), Data())
    with pytest.raises(UserError) as error:
        check_task(task)
    assert said in str(error.value)


def test_a_training_is_refused_before_its_first_step(capsys):
    tree(["a", "b"])
    Path("x.tar").touch()
    config = write_config(Path.cwd(), "x.tar")
    assert main(["train", config, "eval.zeroshot_sets.o={folder: tree, subset: objectnet}"]) == 2
    assert "eval.zeroshot_sets.o.subset=objectnet: which ImageNet classes ObjectNet's" in capsys.readouterr().err
    assert not Path("run").exists()
