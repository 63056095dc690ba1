"""data_tools/make_cifar10.py and clipscale/shardkit/cifar10.py, on an imitation of the data set's binary version."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from tools import load_tool


@pytest.fixture(scope="module")
def tool():
    return load_tool("make_cifar10")


@pytest.fixture
def source(tmp_path) -> Path:
    """Five training batches of 6 pictures and a test batch of 4."""
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    (folder / "batches.meta.txt").write_text("airplane\nautomobile\nbird\n\n")
    random = np.random.default_rng(0)
    for name, n in [*((f"data_batch_{i}.bin", 6) for i in range(1, 6)), ("test_batch.bin", 4)]:
        batch = random.integers(0, 256, (n, 3073), dtype=np.uint8)
        batch[:, 0] %= 3
        batch.tofile(folder / name)
    return folder


def read(folder: Path, split: str) -> list[dict]:
    paths = sorted(folder.glob(f"{split}-*.tar"))
    return [sample for path in paths for sample in webdataset.WebDataset(str(path), shardshuffle=False)]


def test_shards_hold_the_data_set(tool, source, tmp_path, capsys):
    output = tmp_path / "shards"
    assert tool.main([str(source), "--output", str(output), "--samples-per-shard", "8"]) == 0
    assert capsys.readouterr().out == f"{output}: 30 train pictures, 4 test pictures\n"
    names = (output / "classnames.txt").read_text().split()
    assert names == ["airplane", "automobile", "bird"]
    for split, files in (("train", [f"data_batch_{i}.bin" for i in range(1, 6)]), ("test", ["test_batch.bin"])):
        raw = np.concatenate([np.fromfile(source / file, np.uint8) for file in files]).reshape(-1, 3073)
        samples = read(output, split)
        assert len(samples) == len(raw)
        for row, sample in zip(raw, samples, strict=True):
            pixels = np.asarray(Image.open(io.BytesIO(sample["png"])))
            np.testing.assert_array_equal(pixels.transpose(2, 0, 1).ravel(), row[1:])
            assert sample["txt"].decode() == f"a photo of a {names[row[0]]}."
            assert ("cls" in sample) == (split == "test")
            assert int(sample.get("cls", row[0])) == row[0]


@pytest.mark.parametrize(
    ("break_it", "told"),
    [
        (lambda folder: (folder / "test_batch.bin").unlink(), "missing: "),
        (lambda folder: (folder / "test_batch.bin").write_bytes(b"x" * 3072), "3072 bytes is no multiple of 3073"),
        (lambda folder: (folder / "test_batch.bin").write_bytes(b"\x07" * 3073), "label 7 has no name"),
        (lambda folder: (folder / "batches.meta.txt").unlink(), "must be the unpacked binary version of CIFAR-10"),
    ],
)
def test_a_damaged_data_set_is_one_line(tool, source, tmp_path, capsys, break_it, told):
    break_it(source)
    assert tool.main([str(source), "--output", str(tmp_path / "shards")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("make_cifar10.py: error: ")
    assert told in err
    assert err.count("\n") == 1
    assert not list((tmp_path / "shards").glob("*"))
