"""data_tools/imagenet_shards.py and clipscale/shardkit/imagenet.py, on small imitations of the official layouts."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torchvision
import webdataset
from PIL import Image
from shards import picture, write_tar
from tools import load_tool

from clipscale.config.data import Data, SourceSettings
from clipscale.data.source import open_source
from clipscale.errors import UserError
from clipscale.shardkit.imagenet import Labels, find_pictures, read_labels

SYNSETS = ("n02119789", "n01440764", "n03100240")  # not in their order: the order of the development kit
PER_CLASS = 12


def cmyk(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(picture(seed, 40, 50))).convert("CMYK").save(buffer, "JPEG")
    return buffer.getvalue()


def photo(synset: int, number: int) -> bytes:
    """ImageNet's oddities among them: a PNG called .JPEG, and CMYK."""
    seed = 100 * synset + number
    if number == 3:
        return picture(seed, 40, 50, "PNG")
    return cmyk(seed) if number == 5 else picture(seed, 40, 50)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """train/n01440764/n01440764_0.JPEG, ..."""
    root = tmp_path_factory.mktemp("imagenet") / "train"
    for number, synset in enumerate(SYNSETS):
        (root / synset).mkdir(parents=True)
        for i in range(PER_CLASS):
            (root / synset / f"{synset}_{i}.JPEG").write_bytes(photo(number, i))
    return root


@pytest.fixture(scope="module")
def train_tar(folder) -> Path:
    """The same as a tar of tars."""
    members = []
    for synset in SYNSETS:
        inner = [(path.name, path.read_bytes()) for path in sorted((folder / synset).iterdir())]
        members.append((f"{synset}.tar", write_tar(folder.parent / "inner.tar", inner).read_bytes()))
    return write_tar(folder.parent / "ILSVRC2012_img_train.tar", members, tarfile.GNU_FORMAT)


def read(folder: Path, prefix: str) -> list[dict]:
    """As webdataset's own reader gives them."""
    paths = sorted(folder.glob(f"{prefix}-*.tar"))
    return [sample for path in paths for sample in webdataset.WebDataset(str(path), shardshuffle=False)]


def by_name(folder: Path, prefix: str) -> dict[str, dict]:
    return {json.loads(sample["json"])["filepath"]: sample for sample in read(folder, prefix)}


def test_folder_and_tar_of_tars_give_the_same_shards(folder, train_tar, tmp_path, capsys):
    tool = load_tool("imagenet_shards")
    for name, source in (("a", folder), ("b", train_tar)):
        command = [str(source), "--output", str(tmp_path / name), "--samples-per-shard=10", "--jobs=2"]
        assert tool.main(command) == 0
    assert "36 samples in 4 shards" in capsys.readouterr().out
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("a", "b")]
    assert files[0] == files[1]
    assert files[0]["train-synsets.txt"].decode().split() == sorted(SYNSETS)
    assert files[0]["refused.jsonl"] == b""

    reference = torchvision.datasets.ImageFolder(folder)
    samples = by_name(tmp_path / "a", "train")
    assert len(samples) == len(reference) == 36
    for path, label in reference.samples:
        name = str(Path(path).relative_to(folder))
        sample, facts = samples[name], json.loads(samples[name]["json"])
        assert int(sample["cls"]) == label
        assert facts["synset"] == reference.classes[label] == name.partition("/")[0]
        extension = "png" if name.endswith("_3.JPEG") else "jpg"
        assert sample[extension] == Path(path).read_bytes()
        assert "txt" not in sample
    # Classes mix: every shard of 10 holds all three.
    labels = [sample["cls"] for sample in read(tmp_path / "a", "train")]
    assert [len(set(labels[start : start + 10])) for start in (0, 10, 20)] == [3, 3, 3]


def test_the_index_reads_labels(train_tar, tmp_path):
    assert load_tool("imagenet_shards").main([str(train_tar), "--output", str(tmp_path), "--no-shuffle"]) == 0
    source = open_source("x", SourceSettings(f"{tmp_path}/*.tar"), Data(), need="labelled")
    assert source.counts.tolist() == [36]
    labels = [int(source.read(0, i).note) for i in range(36)]
    source.close()
    assert labels == [1] * 12 + [0] * 12 + [2] * 12  # in the order of the archive


def test_resize(folder, tmp_path):
    assert (
        load_tool("imagenet_shards").main([str(folder), "--output", str(tmp_path), "--resize=20", "--format=jpg"]) == 0
    )
    samples = read(tmp_path, "train")
    assert len(samples) == 36
    assert {Image.open(io.BytesIO(sample["jpg"])).size for sample in samples} == {(25, 20)}


@pytest.fixture(scope="module")
def val(tmp_path_factory) -> tuple[Path, list[str], dict[str, bytes]]:
    """(the flat tar, the synset of each picture by name, the pictures)."""
    root = tmp_path_factory.mktemp("val")
    answers = [SYNSETS[i] for i in (2, 0, 1, 1, 0, 2, 2)]
    pictures = {f"ILSVRC2012_val_{i + 1:08}.JPEG": picture(i, 30, 40) for i in range(len(answers))}
    unsorted = list(pictures.items())[::-1]  # tars have no order of names
    return write_tar(root / "ILSVRC2012_img_val.tar", unsorted), answers, pictures


@pytest.mark.parametrize("form", ["synsets", "named", "kaggle", "caffe", "ground truth", "folder"])
def test_validation_labels(val, tmp_path, form):
    tar, answers, pictures = val
    names, options, source = list(pictures), [], tar
    ordered = sorted(SYNSETS)
    if form == "named":
        lines = [f"{name} {synset}" for name, synset in zip(names, answers, strict=True)][::-1]
    elif form == "kaggle":
        stems = [Path(name).stem for name in names]
        lines = ["ImageId,PredictionString", *(f"{n},{s} 85 1 499 272" for n, s in zip(stems, answers, strict=True))][
            ::1
        ]
    elif form == "caffe":  # counts from 0, in the order of the names
        lines = [f"{name} {ordered.index(synset)}" for name, synset in zip(names, answers, strict=True)]
        (tmp_path / "synsets.txt").write_text("".join(f"{synset} a word\n" for synset in ordered))
        options = ["--synsets", str(tmp_path / "synsets.txt")]
    elif form == "ground truth":  # counts from 1, in the order of the development kit
        lines = [str(SYNSETS.index(synset) + 1) for synset in answers]
        (tmp_path / "synsets.txt").write_text("\n".join(SYNSETS))
        options = ["--synsets", str(tmp_path / "synsets.txt")]
    else:
        lines = answers
    if form == "folder":
        source = tmp_path / "val"
        source.mkdir()
        for name, data in pictures.items():
            (source / name).write_bytes(data)
    (tmp_path / "labels.txt").write_text("\n".join(lines) + "\n")
    command = [str(source), "--output", str(tmp_path / "out"), "--prefix=val", "--val-labels"]
    assert load_tool("imagenet_shards").main([*command, str(tmp_path / "labels.txt"), *options]) == 0
    samples = by_name(tmp_path / "out", "val")
    assert {name: sample["jpg"] for name, sample in samples.items()} == pictures
    assert {name: int(sample["cls"]) for name, sample in samples.items()} == {
        name: ordered.index(synset) for name, synset in zip(names, answers, strict=True)
    }


def test_labels_that_do_not_fit_are_refused(val, tmp_path, capsys):
    tar, answers, _ = val
    labels, synsets = tmp_path / "labels.txt", tmp_path / "synsets.txt"
    synsets.write_text("\n".join(SYNSETS))

    def refusal(text: str, *options: str) -> str:
        labels.write_text(text)
        command = [str(tar), "--output", str(tmp_path / "out"), "--val-labels", str(labels), *options]
        assert load_tool("imagenet_shards").main(command) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "has 6 labels for 7 pictures" in refusal("\n".join(answers[:6]))
    assert "no label for ILSVRC2012_val_00000002.JPEG" in refusal(f"ILSVRC2012_val_00000001 {SYNSETS[0]}")
    assert "holds numbers: give --synsets" in refusal("1\n" * 7)
    assert "count from 0 or 1 does not show" in refusal("1\n2\n" * 3 + "1\n", "--synsets", str(synsets))
    assert "numbers 0 to 9" in refusal("0\n9\n" * 3 + "1\n", "--synsets", str(synsets))
    assert "neither a synset id" in refusal("cat\n" + "n01440764\n" * 6 + "dog\n")
    assert "which" in refusal("n00000001\n" * 7, "--synsets", str(synsets))
    assert not (tmp_path / "out").exists()
    labels.write_text("1\n" * 7)
    assert read_labels(Labels(labels, synsets, first=1), [f"{i}.JPEG" for i in range(7)])[0] == [SYNSETS[0]] * 7


def test_sources_that_are_none_are_refused(val, tmp_path):
    (tmp_path / "empty.tar").write_bytes(b"")
    (tmp_path / "text.tar").write_bytes(b"no tar" * 500)
    (tmp_path / "classes" / "n01440764").mkdir(parents=True)
    for source, message in [
        (tmp_path / "gone", "does not exist"),
        (tmp_path / "empty.tar", "is empty"),
        (tmp_path / "text.tar", "neither a folder nor a tar"),
        (tmp_path / "classes", "holds no pictures"),
        (val[0], "outside of any class; for a flat set give --val-labels"),
    ]:
        with pytest.raises(UserError, match=message):
            find_pictures(source, None)


def write_classes(root: Path, names: list[str], form: str) -> Path:
    """A picture of each class, as a folder of folders or as a tar of tars."""
    tars = []
    for number, name in enumerate(names):
        jpeg = picture(number, 20, 20)
        if form == "tar":
            tars.append((f"{name}.tar", write_tar(root / "inner.tar", [(f"{name}.jpg", jpeg)]).read_bytes()))
        else:
            (root / "set" / name).mkdir(parents=True)
            (root / "set" / name / f"{name}.jpg").write_bytes(jpeg)
    return write_tar(root / "set.tar", tars) if tars else root / "set"


@pytest.mark.parametrize("form", ["folder", "tar"])
def test_classes_that_are_numbers_are_the_labels(tmp_path, told, form):
    source = write_classes(tmp_path / "a", [str(i) for i in range(12)], form)
    found = find_pictures(source, None)
    assert {row.name: row.label for row in found.rows} == {f"{i}/{i}.jpg": i for i in range(12)}
    assert found.classes == [str(i) for i in range(12)]
    assert told == [f"{source}: its classes are the numbers 0 to 11: their labels are 0 to 11"]
    source = write_classes(tmp_path / "b", [f"{i:02}" for i in range(1, 13)], form)
    assert {row.facts["synset"]: row.label for row in find_pictures(source, None, first_label=1).rows} == {
        f"{i:02}": i - 1 for i in range(1, 13)
    }
    for names, message in [
        (["01", "1", "0"], "has the classes 01 and 1, which are one number"),
        (["1", "2"], "1 to 2, but there is no 0: labels count from 0, or from --first-label, without a gap"),
        (["0", "1", "3"], "0 to 3, but there is no 2"),
        ([*map(str, range(11)), "cat"], r"some of its classes are numbers \(0\), others not \(cat\)"),
    ]:
        with pytest.raises(UserError, match=message):
            find_pictures(write_classes(tmp_path / "-".join(names), names, form), None)
    for names in (["cat", "dog1", "dog10", "dog2"], ["0", "1", "cat"]):  # of which the order is that of names
        assert find_pictures(write_classes(tmp_path / "-".join(names), names, form), None).classes == names


def test_what_systems_leave_behind_is_no_class_and_no_picture(tmp_path, told):
    source = write_classes(tmp_path, ["n00000001", "n00000002"], "folder")
    for name in ("__MACOSX", ".ipynb_checkpoints", "n00000001/more", "n00000000"):
        (source / name).mkdir()
    for name in ("._n00000001", "loose.jpg", "list.txt", "n00000001/._a.jpg", "n00000002/b.gif"):
        (source / name).write_bytes(b"?")
    found = find_pictures(source, None)
    assert {row.name: row.label for row in found.rows} == {"n00000001/n00000001.jpg": 1, "n00000002/n00000002.jpg": 2}
    assert {passed.name: passed.cause for passed in found.passed_over} == {
        "__MACOSX": "hidden folder",
        ".ipynb_checkpoints": "hidden folder",
        "._n00000001": "hidden file",
        "loose.jpg": "outside of any class",
        "list.txt": "other format, .txt",
        "n00000001/._a.jpg": "hidden file",
        "n00000001/more": "folder inside of a class",
        "n00000002/b.gif": "other format, .gif",
    }
    assert told == [f"{source}: 1 of 3 classes have no picture (n00000000); they keep their labels"]
    inner = write_tar(tmp_path / "inner.tar", [("a.jpg", picture(0, 20, 20)), ("._a.jpg", b"?")]).read_bytes()
    found = find_pictures(write_tar(tmp_path / "x.tar", [("._n00000001.tar", b"?"), ("n00000001.tar", inner)]), None)
    assert (found.classes, [row.label for row in found.rows]) == (["n00000001"], [0])
    assert [passed.name for passed in found.passed_over] == ["._n00000001.tar", "n00000001/._a.jpg"]
    with pytest.raises(UserError, match=r"holds n00000001/a\.jpg outside of any class"):
        find_pictures(write_tar(tmp_path / "y.tar", [("n00000001/a.jpg", picture(0, 20, 20))]), None)


def test_labels_without_names_need_one_order_of_names(tmp_path):
    answers = tmp_path / "labels.txt"
    answers.write_text("n00000001\n" * 11)
    names = sorted(f"{i}.JPEG" for i in range(11))
    with pytest.raises(UserError, match=r"whether 10\.JPEG or 2\.JPEG comes first does not show"):
        read_labels(Labels(answers), names)
    assert len(read_labels(Labels(answers), [f"{i:02}.JPEG" for i in range(11)])[0]) == 11
    answers.write_text("".join(f"{name} n0000000{i % 2}\n" for i, name in enumerate(names)))
    assert read_labels(Labels(answers), names)[0] == [f"n0000000{i % 2}" for i in range(11)]
    answers.write_text("n00000001\n" + "²\n" * 10)
    with pytest.raises(UserError, match="neither a synset id"):
        read_labels(Labels(answers), [f"{i:02}.JPEG" for i in range(11)])


def test_damaged_archives_never_shift_the_labels(train_tar, tmp_path):
    data = train_tar.read_bytes()
    (tmp_path / "cut.tar").write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(UserError, match=r"cut\.tar is damaged, so that classes or pictures are missing \(cut short at"):
        find_pictures(tmp_path / "cut.tar", None)
    with tarfile.open(train_tar) as tar:
        member = tar.getmembers()[1]
    assert member.name == f"{sorted(SYNSETS)[0]}.tar"
    first_bytes = 512 + -(-len(photo(1, 0)) // 512) * 512
    for whole_bytes, left in ((0, 0), (first_bytes, 1)):  # all of the class is lost, or all but its first picture
        broken = bytearray(data)
        broken[member.offset_data + whole_bytes : member.offset_data + member.size] = b"x" * (member.size - whole_bytes)
        (tmp_path / "broken.tar").write_bytes(broken)
        found = find_pictures(tmp_path / "broken.tar", None)
        assert [(refusal.name, refusal.cause) for refusal in found.refusals] == [(member.name, "damaged archive")]
        assert found.classes == sorted(SYNSETS)
        assert np.bincount([row.label for row in found.rows]).tolist() == [left, 12, 12]
