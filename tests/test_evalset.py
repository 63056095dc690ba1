import pytest
import torch
from shards import picture, write_pairs, write_shard
from torchvision.datasets import ImageFolder

from clipscale.config.data import Data, SourceSettings
from clipscale.data.pixels.decode import Decoding
from clipscale.data.source import open_source
from clipscale.errors import UserError
from clipscale.eval.classes import class_folders
from clipscale.eval.pictures import FolderPictures, ShardPictures, batches
from clipscale.eval.view import View


def view(side: int) -> View:
    return View(side, Decoding(max_pixels=10_000))


@pytest.mark.parametrize("threads", [1, 3])
def test_shards_come_in_their_order_and_broken_pictures_are_marked(tmp_path, threads):
    source = open_source("test", SourceSettings(write_pairs(tmp_path, 3, 5, broken={6})), Data(), need="pairs")
    pictures = ShardPictures(source)
    assert len(pictures) == 15
    numbers = []
    for images, notes, valid in batches(pictures, range(15), batch=4, view=view(20), threads=threads):
        assert len(images) == len(notes) == len(valid) <= 4
        for image, note, ok in zip(images, notes, valid, strict=True):
            number = len(numbers)
            numbers.append(number)
            if number == 6:
                assert not ok
                assert not image.any()
                assert note == b""
            else:
                assert ok
                assert note == f"number {number % 5} of shard {number // 5}".encode()
                assert torch.equal(image, view(20)(picture(number, 32, 32)))
    assert len(numbers) == 15


def test_labels_and_the_share_of_a_rank(tmp_path):
    samples = [(str(i), {"png": picture(i, 9, 14, "PNG"), "cls": str(i % 3).encode()}) for i in range(10)]
    source = open_source(
        "test", SourceSettings(str(write_shard(tmp_path / "test.tar", samples))), Data(), need="labelled"
    )
    mine = range(1, 10, 2)
    found = list(batches(ShardPictures(source), mine, batch=3, view=view(8), threads=2))
    assert [int(note) for _, notes, _ in found for note in notes] == [i % 3 for i in mine]
    assert torch.equal(
        torch.cat([images for images, _, _ in found]), torch.stack([view(8)(samples[i][1]["png"]) for i in mine])
    )


def test_a_folder_of_classes(tmp_path):
    for name, seeds in (("dog", (1, 2)), ("cat", (3,)), ("empty", ())):
        (tmp_path / name / "deeper").mkdir(parents=True)
        for seed in seeds:
            (tmp_path / name / "deeper" / f"{seed}.JPEG").write_bytes(picture(seed, 20, 30))
    (tmp_path / "dog" / "notes.txt").write_bytes(b"")
    (tmp_path / "dog" / "0.png").write_bytes(b"broken")
    (tmp_path / "readme.md").write_bytes(b"")
    (tmp_path / "dog" / "._1.jpg").write_bytes(b"a Mac's")
    (tmp_path / "dog" / ".ipynb_checkpoints").mkdir()
    (tmp_path / "dog" / ".ipynb_checkpoints" / "1.jpg").write_bytes(picture(1, 20, 30))
    (tmp_path / ".ipynb_checkpoints").mkdir()
    pictures = FolderPictures(str(tmp_path), {"cat": 0, "dog": 1, "empty": 2})
    assert pictures.empty == ["empty"]
    assert pictures.passed == {"hidden": 3, ".txt": 1, "beside the class folders": 1}
    ((images, notes, valid),) = batches(pictures, range(len(pictures)), batch=9, view=view(16), threads=2)
    assert (notes, valid.tolist()) == ([b"0", b"", b"1", b"1"], [True, False, True, True])
    assert torch.equal(images[0], view(16)(picture(3, 20, 30)))


def test_folders_without_pictures_are_refused(tmp_path):
    with pytest.raises(UserError, match="is not a folder"):
        class_folders(str(tmp_path / "none"))
    (tmp_path / "class").mkdir()
    with pytest.raises(UserError, match=r"holds no jpg/jpeg/png/ppm/bmp/.* in its folders"):
        FolderPictures(str(tmp_path), {"class": 0})


def test_a_tree_has_the_pictures_that_image_folder_has(tmp_path):
    """Every suffix that it takes, and those that are passed over are counted; links to folders are followed."""
    for suffix in ("jpg", "JPEG", "png", "ppm", "bmp", "pgm", "tif", "tiff", "webp", "gif", "heic", "svg", "npy"):
        (tmp_path / "tree" / "a").mkdir(parents=True, exist_ok=True)
        kind = {"jpg": "JPEG", "tif": "TIFF", "pgm": "PPM"}.get(suffix, suffix.upper())
        data = picture(1, 20, 30, kind) if kind in ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF") else b"x"
        (tmp_path / "tree" / "a" / f"0.{suffix}").write_bytes(data)
    (tmp_path / "tree" / "b").mkdir()
    (tmp_path / "tree" / "b" / "more").symlink_to(tmp_path / "tree" / "a")
    pictures = FolderPictures(str(tmp_path / "tree"), {"a": 0, "b": 1})
    theirs = ImageFolder(str(tmp_path / "tree"))
    assert sorted(pictures._files) == sorted(theirs.samples)
    assert pictures.passed == {".gif": 2, ".heic": 2, ".svg": 2, ".npy": 2}
    ((_, _, valid),) = batches(pictures, range(len(pictures)), batch=99, view=view(16), threads=2)
    assert valid.all()
