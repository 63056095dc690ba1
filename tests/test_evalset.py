import numpy as np
import pytest
import torch
from PIL import Image
from shards import picture, write_pairs, write_shard

from clipscale.config.data import Data, SourceSettings
from clipscale.data.pixels.decode import Decoding, center_square, crop_and_resize, decode
from clipscale.data.source import open_source
from clipscale.errors import UserError
from clipscale.eval.pictures import FolderPictures, ShardPictures, batches


def view(data: bytes, side: int) -> torch.Tensor:
    pixels = decode(data, 10_000_000)
    return crop_and_resize(pixels, center_square(*pixels.shape[:2]), side)


@pytest.mark.parametrize("threads", [1, 3])
def test_shards_come_in_their_order_and_broken_pictures_are_marked(tmp_path, threads):
    source = open_source("test", SourceSettings(write_pairs(tmp_path, 3, 5, broken={6})), Data(), need="pairs")
    pictures = ShardPictures(source)
    assert len(pictures) == 15
    numbers = []
    for images, notes, valid in batches(
        pictures, range(15), batch=4, side=20, threads=threads, decoding=Decoding(max_pixels=10_000)
    ):
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
                assert torch.equal(image, view(picture(number, 32, 32), 20))
    assert len(numbers) == 15


def test_labels_and_the_share_of_a_rank(tmp_path):
    samples = [(str(i), {"png": picture(i, 9, 14, "PNG"), "cls": str(i % 3).encode()}) for i in range(10)]
    source = open_source(
        "test", SourceSettings(str(write_shard(tmp_path / "test.tar", samples))), Data(), need="labelled"
    )
    mine = range(1, 10, 2)
    found = list(batches(ShardPictures(source), mine, batch=3, side=8, threads=2, decoding=Decoding(max_pixels=1000)))
    assert [int(note) for _, notes, _ in found for note in notes] == [i % 3 for i in mine]
    assert torch.equal(
        torch.cat([images for images, _, _ in found]), torch.stack([view(samples[i][1]["png"], 8) for i in mine])
    )


def test_a_folder_of_classes(tmp_path):
    for name, seeds in (("dog", (1, 2)), ("cat", (3,)), ("empty", ())):
        (tmp_path / name / "deeper").mkdir(parents=True)
        for seed in seeds:
            (tmp_path / name / "deeper" / f"{seed}.JPEG").write_bytes(picture(seed, 20, 30))
    (tmp_path / "dog" / "notes.txt").write_bytes(b"")
    (tmp_path / "dog" / "0.png").write_bytes(b"broken")
    pictures = FolderPictures(str(tmp_path))
    assert pictures.folders == ["cat", "dog", "empty"]
    ((images, notes, valid),) = batches(
        pictures, range(len(pictures)), batch=9, side=16, threads=2, decoding=Decoding(max_pixels=10_000)
    )
    assert (notes, valid.tolist()) == ([b"0", b"", b"1", b"1"], [True, False, True, True])
    assert torch.equal(images[0], view(picture(3, 20, 30), 16))


def test_folders_without_pictures_are_refused(tmp_path):
    with pytest.raises(UserError, match="is not a folder"):
        FolderPictures(str(tmp_path / "none"))
    (tmp_path / "class").mkdir()
    with pytest.raises(UserError, match="holds no jpg/jpeg/png/webp in its folders"):
        FolderPictures(str(tmp_path))


def test_the_view_is_the_middle_as_pillow_resizes_it():
    data = picture(5, 90, 130, "PNG")
    pixels = decode(data, 100_000)
    middle = Image.fromarray(pixels[:, 20:110])
    reference = np.array(middle.resize((40, 40), Image.Resampling.BICUBIC)).transpose(2, 0, 1).astype(float)
    assert abs(view(data, 40).numpy() - reference).mean() <= 0.5
