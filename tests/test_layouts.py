"""What others write is read as it is: img2dataset's output, open_clip's shards, clip_benchmark's test sets."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from shards import picture
from tools import load_tool

from clipscale.config.data import Data, SourceSettings
from clipscale.data.source import open_source


def read_all(source: SourceSettings, need: str = "pairs") -> dict[str, tuple[bytes, str]]:
    """Key -> (picture, caption or label), by way of the index."""
    opened = open_source("x", source, Data(index_jobs=1), need=need)
    found = {}
    for shard, count in enumerate(opened.counts.tolist()):
        for index in range(count):
            sample = opened.read(shard, index)
            note = opened.caption(sample.note, draw=0) if need == "pairs" else sample.note.decode()
            assert sample.key not in found
            found[sample.key] = sample.image, note
    opened.close()
    return found


@pytest.fixture
def img2dataset(tmp_path) -> tuple[Path, dict[str, tuple[bytes, str]]]:
    """Its files and names; members by webdataset's TarWriter, which is what img2dataset writes with. Downloads that
    failed leave gaps in the keys."""
    folder, expected = tmp_path / "laion", {}
    folder.mkdir()
    for shard in range(3):
        with webdataset.TarWriter(str(folder / f"{shard:05}.tar")) as tar:
            for number in (0, 1, 4, 7):
                key, caption = f"{shard:05}{number:04}", f"caption {number} of {shard}, größer"
                jpeg = picture(10 * shard + number, 24, 32)
                facts = {
                    **{"caption": caption, "url": f"https://host/{key}?w=1&h=2", "key": key, "status": "success"},
                    **{"error_message": None, "width": 32, "height": 24, "original_width": 64, "original_height": 48},
                    **{"exif": "{}", "sha256": hashlib.sha256(jpeg).hexdigest(), "uid": f"{shard:016x}{number:016x}"},
                    **{"similarity": number / 10, "synthetic": ["a first line", "a second line"]},
                }
                tar.write({"__key__": key, "jpg": jpeg, "txt": caption, "json": json.dumps(facts, indent=4)})
                expected[key] = jpeg, caption
        statistics = {"count": 10, "successes": 4, "failed_to_download": 6, "failed_to_resize": 0}
        (folder / f"{shard:05}_stats.json").write_text(json.dumps(statistics))
        (folder / f"{shard:05}.parquet").write_bytes(b"PAR1" + bytes(100) + b"PAR1")
    return folder, expected


def test_img2dataset_output(img2dataset):
    folder, expected = img2dataset
    assert read_all(SourceSettings(f"{folder}/{{00000..00002}}.tar")) == expected
    assert read_all(SourceSettings(f"{folder}/*.tar", caption="json:caption")) == expected
    first = read_all(SourceSettings(f"{folder}/*.tar", caption="json:synthetic", captions="first"))
    assert {caption for _, caption in first.values()} == {"a first line"}


def test_the_tools_read_img2dataset_output(img2dataset, tmp_path, capsys):
    folder, _ = img2dataset
    assert load_tool("check_shards").main([f"{folder}/*.tar", "--need=pairs", "--jobs=1"]) == 0
    assert "12 samples in 3 shards" in capsys.readouterr().out
    assert load_tool("inspect_shard").main([f"{folder}/00001.tar", "--output", str(tmp_path / "sheet.html")]) == 0
    assert "caption 7 of 1, größer" in (tmp_path / "sheet.html").read_text(encoding="utf-8")


def test_open_clip_shards(tmp_path):
    """As open_clip's README trains on CC3M: named shards, folders in keys, capitals, every suffix of a picture."""
    expected = {}
    kinds = (("jpg", "JPEG"), ("JPG", "JPEG"), ("jpeg", "JPEG"), ("png", "PNG"), ("webp", "WEBP"))
    for shard in range(2):
        with webdataset.TarWriter(str(tmp_path / f"cc3m-train-{shard:04}.tar")) as tar:
            for number, (suffix, kind) in enumerate(kinds):
                key, data = f"part{shard}/{number:08}", picture(number, 20, 20, kind)
                tar.write({"__key__": key, suffix: data, "txt": f"caption {number}\n", "json": {"a": 1}})
                expected[key] = data, f"caption {number}"
    sizes = {path.name: 5 for path in tmp_path.glob("*.tar")}
    (tmp_path / "sizes.json").write_text(json.dumps(sizes))
    assert (
        read_all(SourceSettings(f"{tmp_path}/cc3m-train-{{0000..0001}}.tar", counts=f"{tmp_path}/sizes.json"))
        == expected
    )


def test_clip_benchmark_test_sets(tmp_path):
    """test/0.tar, ... with .webp and .cls; the class names beside them."""
    (tmp_path / "test").mkdir()
    (tmp_path / "classnames.txt").write_text("cat\ndog\n")
    (tmp_path / "test" / "nshards.txt").write_text("2")
    expected = {}
    for shard in range(2):
        with webdataset.TarWriter(str(tmp_path / f"test/{shard}.tar")) as tar:
            for number in range(3):
                key, data = f"s{3 * shard + number:07}", picture(number, 20, 20, "WEBP")
                tar.write({"__key__": key, "webp": data, "cls": number % 2})
                expected[key] = data, str(number % 2)
    assert read_all(SourceSettings(f"{tmp_path}/test/{{0..1}}.tar"), need="labelled") == expected


def test_webdatasets_own_pipeline_reads_what_make_shards_writes(tmp_path):
    """Decoded by webdataset, as people who train with it would."""
    (tmp_path / "pics").mkdir()
    pictures = {f"{i}.jpg": picture(i, 24, 32) for i in range(7)}
    for name, data in pictures.items():
        (tmp_path / "pics" / name).write_bytes(data)
        (tmp_path / "pics" / name).with_suffix(".txt").write_text(f"caption of {name}")
    command = [
        str(tmp_path / "pics"),
        "--output",
        str(tmp_path / "out"),
        "--prefix=",
        "--samples-per-shard=4",
        "--jobs=1",
    ]
    assert load_tool("make_shards").main(command) == 0
    urls = f"{tmp_path}/out/{{00000..00001}}.tar"
    dataset = webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8").to_tuple("jpg", "txt", "json", "__key__")
    found = list(dataset)
    assert [key for *_, key in found] == [f"{i:09}" for i in range(7)]
    assert sorted(facts["filepath"] for _, _, facts, _ in found) == sorted(pictures)
    for pixels, caption, facts, key in found:
        data = pictures[facts["filepath"]]
        np.testing.assert_array_equal(pixels, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
        assert caption == f"caption of {facts['filepath']}"
        assert (facts["key"], facts["sha256"]) == (key, hashlib.sha256(data).hexdigest())
