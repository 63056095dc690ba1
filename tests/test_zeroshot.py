"""clipscale/eval/zeroshot.py against open_clip's encoders, CLIP_benchmark's accuracy and a computation of its own."""

import dataclasses
import importlib
import io
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from shards import picture, write_shard
from tiny import MODEL

from clipscale.config import ZeroShot
from clipscale.config.data import Data
from clipscale.data.pixels.decode import Decoding
from clipscale.data.tokenize import build_tokenizer
from clipscale.dist import World
from clipscale.errors import UserError
from clipscale.eval.classifier import Classifiers
from clipscale.eval.per_class import class_table, worst_confusions
from clipscale.eval.view import View
from clipscale.eval.zeroshot import ZeroShotResult, ZeroShotTask, check_task, evaluate_zeroshot, load_task
from clipscale.towers import Towers, build_towers

NAMES = ["red circle", "blue star", "pink heart", "grey {odd} ring", "cross", "green square", "moon"]
TEMPLATES = ["a photo of the {}.", "{}", "one {} on gravel"]
LABELS = [i % 6 if i % 4 else 2 for i in range(41)]  # 'moon' has no picture
ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
TOKENIZE = build_tokenizer(None, 8)


def spread_towers(factor: float = 3) -> Towers:
    """Weights with some spread, so that predictions differ between pictures."""
    towers = build_towers(MODEL, seed=1)
    with torch.no_grad():
        for parameter in towers.model.parameters():
            parameter.mul_(factor)
    return towers


@pytest.fixture(scope="module")
def towers() -> Towers:
    return spread_towers()


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Path:
    """The same 41 pictures as two shards and as an ImageFolder tree, with names and templates."""
    root = tmp_path_factory.mktemp("zeroshot")
    samples = [(f"{i:04d}", {"png": picture(i, 16, 16, "PNG"), "cls": b"%d" % label}) for i, label in enumerate(LABELS)]
    write_shard(root / "0.tar", samples[:20])
    write_shard(root / "1.tar", samples[20:])
    for label in range(len(NAMES)):  # folders that are called like no class, in the order of the names
        (root / "tree" / f"class-{label}").mkdir(parents=True)
    for (key, sample), label in zip(samples, LABELS, strict=True):
        (root / "tree" / f"class-{label}" / f"{key}.png").write_bytes(sample["png"])
    (root / "names.txt").write_text("\n".join(NAMES) + "\n\n")
    (root / "templates.txt").write_text("\n".join(TEMPLATES) + "\n")
    return root


def settings(places: Path, **changes) -> ZeroShot:
    base = {"urls": f"{places}/{{0,1}}.tar", "classnames": str(places / "names.txt")}
    return ZeroShot(**base | {"templates": str(places / "templates.txt")} | changes)


def classify(towers: Towers, config: ZeroShot, world: World = ALONE, **changes) -> ZeroShotResult:
    reading = {"batch": 8, "threads": 2, "view": View(16, Decoding(max_pixels=10_000))} | changes
    task = load_task(config, Data())
    return evaluate_zeroshot(towers, task, classifier(towers, task), world, **reading)


def classifier(towers: Towers, task: ZeroShotTask, chunk: int = 5) -> torch.Tensor:
    return Classifiers(towers, TOKENIZE, chunk, ALONE).of(task.classnames, task.templates)


def similarity(towers: Towers, names: Sequence[str] = NAMES) -> torch.Tensor:
    """[41, C] by open_clip's preprocessing, encoders and classifier."""
    theirs = open_clip.CustomTextCLIP(
        embed_dim=16, vision_cfg=open_clip.CLIPVisionCfg(**MODEL.vision), text_cfg=open_clip.CLIPTextCfg(**MODEL.text)
    ).eval()
    theirs.load_state_dict(towers.model.state_dict())
    images = torch.stack([image for image, _ in Pictures()])
    classifier_DC = open_clip.build_zero_shot_classifier(theirs, TOKENIZE, names, lambdas())
    with torch.no_grad():
        return theirs.encode_image(images, normalize=True) @ classifier_DC


def lambdas() -> list:
    """The templates as functions: str.format would trip over braces in a class name."""
    return [lambda name, template=template: template.replace("{}", name) for template in TEMPLATES]


class Pictures(torch.utils.data.Dataset):
    """(picture as open_clip prepares it, label)."""

    classes = NAMES

    def __len__(self) -> int:
        return len(LABELS)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        if i >= len(self):
            raise IndexError
        return open_clip.image_transform(16, is_train=False)(Image.open(io.BytesIO(picture(i, 16, 16, "PNG")))), LABELS[
            i
        ]


def test_accuracies_equal_an_independent_computation(towers, places):
    result = classify(towers, settings(places))
    order = similarity(towers).numpy().argsort(axis=1)[:, ::-1]
    first = np.array([row[0] == label for row, label in zip(order, LABELS, strict=True)])
    fifth = np.array([label in row[:5] for row, label in zip(order, LABELS, strict=True)])
    assert 0 < first.mean() < fifth.mean() < 1  # else the comparison says little
    assert result.top1 == pytest.approx(first.mean())
    assert result.top5 == pytest.approx(fifth.mean())
    assert (result.pictures, result.bad) == (41, 0)
    for label, accuracy in enumerate(result.per_class_top1[:6]):
        assert accuracy == pytest.approx(first[np.array(LABELS) == label].mean())
    assert math.isnan(result.per_class_top1[6])


@pytest.mark.needs("clip_benchmark")
def test_accuracies_equal_clip_benchmarks(towers, places, monkeypatch):
    """https://github.com/LAION-AI/CLIP_benchmark; 1.6.2 takes float() of 1-element arrays, which NumPy 2.4 refuses."""
    benchmark = importlib.import_module("clip_benchmark.metrics.zeroshot_classification")
    monkeypatch.setattr(benchmark, "float", lambda array: array.item(), raising=False)
    names = [name.replace("{odd}", "odd") for name in NAMES]  # its templates go through str.format
    (places / "plain.txt").write_text("\n".join(names))
    result = classify(towers, settings(places, classnames=str(places / "plain.txt")))
    scores = similarity(towers, names)
    top1, top5 = benchmark.accuracy(scores, torch.tensor(LABELS), topk=(1, 5))
    assert (result.top1, result.top5) == (pytest.approx(top1), pytest.approx(top5))

    towers.model.eval()
    loader = torch.utils.data.DataLoader(Pictures(), batch_size=10)
    templates = [template.replace("{}", "{c}") for template in TEMPLATES]
    theirs = benchmark.evaluate(towers.model, loader, TOKENIZE, names, templates, "cpu", amp=False)
    assert result.top1 == pytest.approx(theirs["acc1"])
    assert result.top5 == pytest.approx(theirs["acc5"])
    recalls = [accuracy for accuracy in result.per_class_top1 if not math.isnan(accuracy)]
    assert (
        np.mean(recalls)
        == pytest.approx(result.mean_per_class_recall)
        == pytest.approx(theirs["mean_per_class_recall"])
    )


def test_shards_and_a_folder_give_the_same_numbers(towers, places):
    shards = classify(towers, settings(places))
    tree = classify(towers, settings(places, urls=None, folder=str(places / "tree")))
    assert tree == shards == classify(towers, settings(places), batch=41, threads=1)


def test_fewer_than_five_classes(towers, places, tmp_path):
    (tmp_path / "names.txt").write_text("a\nb\nc")
    write_shard(tmp_path / "0.tar", [(f"{i}", {"png": picture(i, 16, 16, "PNG"), "cls": b"2\n"}) for i in range(4)])
    config = settings(places, urls=str(tmp_path / "0.tar"), classnames=str(tmp_path / "names.txt"))
    assert classify(towers, config).top5 == 1.0


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_the_ranks_shares_add_up(towers, places, ranks):
    class Recorder(World):
        """One rank of several, whose share is only noted down."""

        def sum(self, values: Sequence[float]) -> list[float]:
            counts.append(list(values))
            return list(values)

        def collect(self, values_N: torch.Tensor) -> torch.Tensor:
            misses.append(values_N)
            return values_N

        def each(self, work, *, patient=False):
            return work()

        def broadcast(self, item):
            return item

    counts: list[list[float]] = []
    misses: list[torch.Tensor] = []
    for rank in range(ranks):
        classify(towers, settings(places), Recorder(rank, ranks, 0, ALONE.device))
    shares = np.sum(counts, axis=0), torch.cat(misses).sort().values.tolist()
    counts.clear(), misses.clear()
    classify(towers, settings(places), Recorder(0, 1, 0, ALONE.device))
    np.testing.assert_array_equal(shares[0], counts[0])
    assert shares[1] == misses[0].sort().values.tolist()


def test_the_table_of_classes_equals_an_independent_computation(towers, places):
    task = load_task(settings(places), Data())
    table = class_table(task, classify(towers, settings(places)))
    order, labels = similarity(towers).numpy().argsort(axis=1)[:, ::-1], np.array(LABELS)
    for label, row in enumerate(table["classes"]):
        mine = order[labels == label]
        first, fifth = (mine[:, 0] == label).sum(), (mine[:, :5] == label).sum()
        assert list(row.values())[:4] == [NAMES[label], len(mine), first, fifth]
        assert list(row.values())[4:] == ([first / len(mine), fifth / len(mine)] if len(mine) else [None, None])
    wrong = Counter((NAMES[c], NAMES[row[0]]) for c, row in zip(labels, order, strict=True) if row[0] != c)
    found = [tuple(row.values()) for row in table["confusions"]]
    assert {(a, b): times for a, b, times in found} == wrong
    assert [times for *_, times in found] == sorted(wrong.values(), reverse=True)
    lines = worst_confusions(table, 3)
    assert lines[0] == f"most often confused, of {wrong.total()} pictures in another class than their own:"
    a, b, times = found[0]
    assert lines[1] == f"{times:8} of {LABELS.count(NAMES.index(a))}  {a} -> {b}"
    assert len(lines) == 4
    assert worst_confusions(table | {"confusions": []}) == []


def test_training_mode_comes_back(towers, places):
    for mode in (True, False):
        towers.model.train(mode)
        classify(towers, settings(places))
        assert towers.model.training is mode


def test_broken_pictures_are_counted_and_left_out(towers, places, tmp_path):
    good = [(f"{i:04d}", {"png": picture(i, 16, 16, "PNG"), "cls": b"%d" % LABELS[i]}) for i in range(41)]
    bad = [(f"bad{i}", {"png": data, "cls": b"1"}) for i, data in enumerate((b"", b"GIF89a", good[0][1]["png"][:60]))]
    write_shard(tmp_path / "0.tar", good[:3] + bad + good[3:])
    result = classify(towers, settings(places, urls=str(tmp_path / "0.tar")))
    whole = classify(towers, settings(places))
    assert (result.pictures, result.bad) == (41, 3)
    assert (result.top1, result.top5) == (whole.top1, whole.top5)
    write_shard(tmp_path / "1.tar", bad)
    with pytest.raises(UserError, match="none of the 3 pictures can be decoded"):
        classify(towers, settings(places, urls=str(tmp_path / "1.tar")))


# --- names, templates, labels -----------------------------------------------------------------------------------------


def test_imagenet_is_open_clips(places):
    task = load_task(settings(places, classnames="imagenet", templates="imagenet"), Data())
    assert task.classnames == list(open_clip.IMAGENET_CLASSNAMES)
    assert (len(task.classnames), len(task.templates)) == (1000, 80)
    filled = [template.replace("{}", "tench") for template in task.templates]
    assert filled == [template("tench") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]


def test_names_and_templates_from_files(places):
    task = load_task(settings(places), Data())
    assert (task.classnames, task.templates) == (NAMES, TEMPLATES)


def test_a_label_without_a_class_name(towers, places, tmp_path):
    write_shard(tmp_path / "0.tar", [("a", {"png": picture(0, 16, 16, "PNG"), "cls": b"7"})])
    with pytest.raises(UserError, match="label 7 has no class name: there are 7"):
        classify(towers, settings(places, urls=str(tmp_path / "0.tar")))


def test_labels_that_are_no_number_are_left_out_and_told(places, tmp_path, told):
    labels = [b"2\n", b"cat", b"", b"-1", b"1.5", b"1_0"]
    samples = [(f"{i}", {"png": picture(i, 16, 16, "PNG"), "cls": label}) for i, label in enumerate(labels)]
    write_shard(tmp_path / "0.tar", samples)
    task = load_task(settings(places, urls=str(tmp_path / "0.tar")), Data())
    assert [task.pictures.read(i)[1] for i in range(len(task.pictures))] == [b"2\n"]
    assert told == ["source 'zeroshot': 5 samples refused (label is not a number: 5); 1 is usable"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"classnames": "nowhere.txt"}, r"eval\.zeroshot\.classnames='nowhere\.txt' cannot be read"),
        ({"templates": "nowhere.txt"}, r"eval\.zeroshot\.templates='nowhere\.txt' cannot be read"),
        ({"urls": "nowhere.tar"}, r"'nowhere\.tar'"),
        ({"urls": None, "folder": "nowhere"}, r"eval\.zeroshot\.folder 'nowhere' is not a folder"),
        ({"urls": None}, r"set eval\.zeroshot\.urls or eval\.zeroshot\.folder"),
        ({"classnames": "empty.txt"}, "is empty; write one a line"),
        ({"classnames": "gap.txt"}, "line 2 is empty; take it out"),
        ({"classnames": "bytes.txt"}, "cannot be read.*utf-8"),
        ({"templates": "empty.txt"}, "is empty; write one a line"),
        ({"templates": "bare.txt"}, r"\['a photo'\] must hold '\{\}' once"),
        ({"urls": None, "folder": "tree", "classnames": "two.txt"}, r"has 7 class folders, .*two\.txt' names 2"),
        ({"urls": "unlabelled.tar"}, r"a picture and a label \(\.cls\)"),
    ],
)
def test_what_cannot_be_used_is_told_in_a_line(places, tmp_path, monkeypatch, changes, said):
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("\n\n")
    Path("gap.txt").write_text("a\n\nb\n")
    Path("bytes.txt").write_bytes(b"caf\xe9")
    Path("bare.txt").write_text("a photo")
    Path("two.txt").write_text("a\nb")
    Path("tree").symlink_to(places / "tree")
    write_shard(Path("unlabelled.tar"), [("a", {"png": picture(0, 16, 16, "PNG"), "txt": b"a"})])
    with pytest.raises(UserError, match=said) as error:
        load_task(settings(places, **changes), Data())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (10, ""),
        (
            12,
            "warning: eval.zeroshot.classnames has 12 names, and no label of the pictures is above 9: 2 classes that ",
        ),
        (9, "label 9 has no class name: there are 9 (0 to 8); eval.zeroshot.classnames must be the list of this set"),
    ],
)
def test_names_and_labels_are_held_against_each_other_first(places, tmp_path, names, found):
    samples = [(f"{i}", {"png": picture(i, 16, 16, "PNG"), "cls": b"%d" % i}) for i in range(10)]
    write_shard(tmp_path / "0.tar", samples)
    (tmp_path / "names.txt").write_text("\n".join(f"class {i}" for i in range(names)))
    config = settings(places, urls=str(tmp_path / "0.tar"), classnames=str(tmp_path / "names.txt"))
    task = load_task(config, Data())
    try:
        told = check_task(task)
    except UserError as error:
        told = str(error)
    assert told.startswith(found)
    assert bool(told) == bool(found)


def test_folders_that_go_by_their_order_and_empty_ones_are_told(places):
    assert check_task(load_task(settings(places, urls=None, folder=str(places / "tree")), Data())) == (
        "class folders are taken in the order of their names, line by line: class-0 = red circle, class-1 = blue star, "
        "class-2 = pink heart, ...; warning: no picture for 1 of 7 classes ('class-6')"
    )


@pytest.mark.parametrize("folders", ["numbers", "names", "names alone"])
def test_a_tree_gives_the_same_whatever_its_folders_are_called(towers, places, tmp_path, folders):
    """Sorted as text, numbers to ten and names in another order than their file's would all be other labels."""
    more = [*NAMES, "a", "b", "c", "d"]  # 10 comes before 2
    (tmp_path / "names.txt").write_text("\n".join(more))
    called = {label: str(label) if folders == "numbers" else name for label, name in enumerate(more)}
    for label in range(len(more)):
        (tmp_path / "tree" / called[label]).mkdir(parents=True)
        for path in (places / "tree" / f"class-{label}").glob("*"):
            (tmp_path / "tree" / called[label] / path.name).symlink_to(path)
    names = str(tmp_path / "names.txt")
    tree = settings(places, urls=None, folder=str(tmp_path / "tree"), classnames=names)
    if folders == "names alone":
        tree = dataclasses.replace(tree, classnames=None)
    shards = classify(towers, settings(places, classnames=names))
    found = classify(towers, tree)
    assert (found.top1, found.top5, found.pictures) == (shards.top1, shards.top5, 41)
    assert found.classes_seen == shards.classes_seen == 6
    assert found.mean_per_class_recall == pytest.approx(shards.mean_per_class_recall)


def test_what_is_passed_over_is_counted(towers, places, tmp_path):
    samples = [(f"{i}", {"png": picture(i, 16, 16, "PNG"), "cls": b"%d" % i}) for i in range(3)]
    samples += [("gif", {"gif": picture(0, 16, 16, "GIF"), "cls": b"1"}), ("bare", {"png": b"x"})]
    write_shard(tmp_path / "0.tar", samples)
    assert classify(towers, settings(places, urls=str(tmp_path / "0.tar"))).passed == 2
    (tmp_path / "tree").mkdir()
    for label in range(len(NAMES)):
        (tmp_path / "tree" / f"class-{label}").symlink_to(places / "tree" / f"class-{label}")
    (tmp_path / "tree" / "list.txt").touch()
    assert classify(towers, settings(places, urls=None, folder=str(tmp_path / "tree"))).passed == 1
