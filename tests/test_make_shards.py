"""data_tools/make_shards.py and clipscale/shardkit/inputs.py, pictures.py and packing.py."""

import csv
import hashlib
import io
import json
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from PIL import Image, ImageOps
from processes import wait_until
from tools import FOLDER, load_tool

from clipscale.config.data import Data, SourceSettings
from clipscale.data.source import open_source

TOOL = FOLDER / "make_shards.py"


@pytest.fixture(scope="module")
def tool():
    return load_tool("make_shards")


def picture(kind: str = "JPEG", seed: int = 0, size: tuple[int, int] = (20, 16)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=kind)
    return buffer.getvalue()


def read(folder: Path, prefix: str = "train") -> list[dict]:
    samples = []
    for path in sorted(folder.glob(f"{prefix}-*.tar")):
        samples += list(wds.WebDataset(str(path), shardshuffle=False))
    return samples


def refused(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "refused.jsonl").read_text(encoding="utf-8").splitlines()]


def causes(folder: Path) -> dict[str, int]:
    return dict(Counter(row["cause"] for row in refused(folder)))


def one_error_line(capsys) -> str:
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("make_shards.py: error: ")
    return lines[0]


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Nine good pictures pic0.jpg ... pic8.jpg in tmp_path/pics."""
    folder = tmp_path / "pics"
    folder.mkdir()
    for index in range(9):
        (folder / f"pic{index}.jpg").write_bytes(picture(seed=index))
    return folder


def write_csv(path: Path, header: list[str], rows: list[list], delimiter: str = ",") -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows([header, *rows])
    return path


# --- lists ------------------------------------------------------------------------------------------------------------


def test_csv_to_shards_and_back(tool, pictures, tmp_path, capsys):
    (pictures / "pic1.jpg").write_bytes(picture("PNG", seed=1))  # the name lies: extension goes by the bytes
    (pictures / "pic2.jpg").write_bytes(picture("WEBP", seed=2))
    rows = [[f"caption, {index}", f"pics/pic{index}.jpg", index * 10] for index in range(8)]
    rows.append(["zwölf\nZeilen", str(pictures / "pic8.jpg"), 80])  # absolute path, quoted line break
    source = write_csv(tmp_path / "list.csv", ["caption", "filepath", "label"], rows)
    out = tmp_path / "out"
    command = [str(source), "--output", str(out), "--samples-per-shard", "4", "--label-key", "label", "--jobs", "3"]
    assert tool.main(command) == 0
    assert "9 samples in 3 shards, train-0000.tar to train-0002.tar" in capsys.readouterr().out
    assert refused(out) == []

    samples = read(out)
    assert [sample["__key__"] for sample in samples] == [f"{index:09d}" for index in range(9)]
    order = [json.loads(sample["json"])["filepath"] for sample in samples]
    assert order != [row[1] for row in rows]  # shuffled
    by_path = {json.loads(sample["json"])["filepath"]: sample for sample in samples}
    for index, (caption, path, label) in enumerate(rows):
        sample = by_path[path]
        extension = {1: "png", 2: "webp"}.get(index, "jpg")
        assert {name for name in sample if not name.startswith("__")} == {extension, "txt", "cls", "json"}
        assert sample[extension] == (pictures / f"pic{index}.jpg").read_bytes()
        assert sample["txt"].decode() == caption
        assert int(sample["cls"]) == label
        facts = json.loads(sample["json"])
        assert re.fullmatch("[0-9a-f]{32}", facts.pop("uid"))
        assert facts == {
            "key": sample["__key__"],
            "filepath": path,
            "sha256": hashlib.sha256(sample[extension]).hexdigest(),
            **{"width": 20, "height": 16, "original_width": 20, "original_height": 16},
        }


def test_order_follows_the_seed_and_not_the_processes(tool, pictures, tmp_path):
    source = write_csv(
        tmp_path / "list.csv", ["filepath", "caption"], [[f"pics/pic{i}.jpg", f"c{i}"] for i in range(9)]
    )

    def build(name: str, *options: str) -> tuple[bytes, list[bytes]]:
        assert tool.main([str(source), "--output", str(tmp_path / name), *options]) == 0
        return (tmp_path / name / "train-0000.tar").read_bytes(), [s["txt"] for s in read(tmp_path / name)]

    first, order = build("a", "--jobs=1")
    assert build("b", "--jobs=3")[0] == first
    assert build("c", "--seed=1")[1] != order
    assert build("d", "--no-shuffle")[1] == [f"c{i}".encode() for i in range(9)]


@pytest.mark.parametrize(
    "form", ["tsv", "jsonl", "headless", "open_clip", "hugging face", "tabs", "keys", "bom", "usual"]
)
def test_other_forms_of_lists(tool, pictures, tmp_path, form):
    rows = [[f"pics/pic{index}.jpg", f"caption {index}"] for index in range(3)]
    source, options = tmp_path / "list.csv", []
    if form == "tsv":
        source = write_csv(tmp_path / "list.tsv", ["filepath", "caption"], rows, delimiter="\t")
    elif form == "jsonl":
        source = tmp_path / "list.jsonl"
        source.write_text("".join(json.dumps({"caption": c, "filepath": p, "n": 1}) + "\n\n" for p, c in rows))
    elif form == "headless":
        write_csv(source, rows[0], rows[1:])
    elif form == "open_clip":  # columns between that are neither
        write_csv(source, ["filepath", "id", "title"], [[path, "x", caption] for path, caption in rows])
    elif form == "hugging face":
        write_csv(source, [" File_Name", "split", "Text "], [[path, "train", caption] for path, caption in rows])
    elif form == "tabs":  # what open_clip reads as .csv by default
        write_csv(source, ["filepath", "title"], [[path, f"{caption}, {path}"] for path, caption in rows], "\t")
        rows = [[path, f"{caption}, {path}"] for path, caption in rows]
    elif form == "keys":
        write_csv(source, ["text", "filepath", "img"], [[c, "wrong.jpg", p] for p, c in rows])
        options = ["--image-key", "img", "--caption-key", "text"]
    elif form == "usual":  # beside others that may be meant
        write_csv(source, ["image", "text", "filepath", "caption"], [["no.jpg", "no", *row] for row in rows])
    elif form == "bom":
        source.write_text("filepath,caption\n" + "".join(f"{p},{c}\n" for p, c in rows), encoding="utf-8-sig")
    assert tool.main([str(source), "--output", str(tmp_path / "out"), "--no-shuffle", *options]) == 0
    assert [sample["txt"].decode() for sample in read(tmp_path / "out")] == [caption for _, caption in rows]


@pytest.mark.parametrize(
    ("first", "options", "message"),
    [
        ("filepath,id,words", [], "the columns 'filepath', 'id', 'words': say which the caption (--caption-key NAME)"),
        ("file,split,text", [], "'text': say which holds the picture's path (--image-key NAME)"),
        ("picture,words", [], "path (--image-key NAME) and which the caption (--caption-key NAME)"),
        ("filepath,Caption,text", [], "which the caption (--caption-key NAME: 'Caption' or 'text')"),
        ("path,image,title", [], "path (--image-key NAME: 'path' or 'image')"),
        (
            "path,image,title,text",
            ["--image-key=path"],
            "say which the caption (--caption-key NAME: 'title' or 'text')",
        ),
        ("filepath,caption,caption", ["--caption-key=caption"], "has 2 columns 'caption'"),
        ("url,caption,key,status", [], "(--image-key NAME); tables of img2dataset name no files"),
        ("caption,key,status,width", [], "(--image-key NAME); tables of img2dataset name no files"),
        ("pics/pic0.jpg,train,a cat", [], "if this is no header, write one before it"),
        ("a cat,pics/pic0.jpg", [], "if this is no header, write one before it"),
        ("pics/pic0.jpg\ta cat", [], "has the one column"),
    ],
)
def test_columns_are_asked_for_and_not_guessed(tool, pictures, tmp_path, capsys, first, options, message):
    source = tmp_path / "list.csv"
    source.write_text(f"{first}\n" + first.replace("filepath", "pics/pic0.jpg") + "\n")
    assert tool.main([str(source), "--output", str(tmp_path / "out"), *options]) == 2
    assert message in one_error_line(capsys)
    assert not (tmp_path / "out").exists()


def test_columns_of_json_lines_are_asked_for_and_taken_ones_told(tool, pictures, tmp_path, capsys):
    source = tmp_path / "list.jsonl"
    source.write_text(json.dumps({"id": "a", "path": "pics/pic0.jpg", "title": "good"}))
    assert tool.main([str(source), "--output", str(tmp_path / "out")]) == 0
    told = f"make_shards.py: {source}: pictures from the column 'path', captions from 'title'"
    assert capsys.readouterr().err.splitlines() == [told]
    assert [sample["txt"] for sample in read(tmp_path / "out")] == [b"good"]
    source.write_text(json.dumps({"id": "pics/pic0.jpg", "words": "good"}))
    assert tool.main([str(source), "--output", str(tmp_path / "out2")]) == 2
    assert "(--image-key NAME) and which the caption (--caption-key NAME)" in one_error_line(capsys)


def test_one_picture_under_two_spellings(tool, pictures, tmp_path):
    paths = ["pics/pic0.jpg", "./pics/pic0.jpg", "pics/../pics/pic0.jpg", str(pictures / "pic0.jpg")]
    source = write_csv(tmp_path / "list.csv", ["filepath", "caption"], [[path, "x"] for path in paths])
    assert tool.main([str(source), "--output", str(tmp_path / "out")]) == 0
    assert causes(tmp_path / "out") == {"duplicate row": 3}


def test_refusals_are_counted_by_cause_and_listed(tool, pictures, tmp_path, capsys):
    good = picture(seed=3)
    (pictures / "cut.jpg").write_bytes(good[: len(good) // 2])
    (pictures / "cut.png").write_bytes(picture("PNG")[:400])
    (pictures / "head.webp").write_bytes(picture("WEBP")[:40])
    (pictures / "soi.jpg").write_bytes(b"\xff\xd8\xff")
    (pictures / "text.jpg").write_text("<html>404</html>")
    (pictures / "empty.jpg").write_bytes(b"")
    (pictures / "moving.gif").write_bytes(picture("GIF"))
    (pictures / "huge.png").write_bytes(picture("PNG", size=(120, 90)))
    (pictures / "folder.jpg").mkdir()
    lines = [
        b"filepath,caption,label",
        b"pics/pic0.jpg,good,1",
        b"pics/pic0.jpg,good,1",  # the same row again
        b"pics/pic0.jpg,another caption of the same picture,1",
        b"pics/gone.jpg,x,1",
        b"pics/pic1.jpg,   ,1",
        b"pics/pic1.jpg,caf\xe9,1",
        b"pics/pic1.jpg,x,first",
        b"pics/pic1.jpg,x,-1",
        b"pics/pic1.jpg,x,1,surplus",
        b'pics/pic1.jpg,"x"y,1',
        b",x,1",
        *(f"pics/{name},x,1".encode() for name in ("cut.jpg", "cut.png", "head.webp", "soi.jpg")),
        *(f"pics/{name},x,1".encode() for name in ("text.jpg", "empty.jpg", "moving.gif", "huge.png", "folder.jpg")),
        b"pics/pic2.jpg,caf\xc3\xa9,2",
    ]
    (tmp_path / "list.csv").write_bytes(b"\n".join(lines))
    out = tmp_path / "out"
    command = [
        str(tmp_path / "list.csv"),
        "--output",
        str(out),
        "--label-key=label",
        "--max-pixels=10000",
        "--no-shuffle",
    ]
    assert tool.main(command) == 0
    expected = {
        "duplicate row": 1,
        "missing file": 1,
        "empty caption": 1,
        "caption not UTF-8": 1,
        "label is not a number": 2,
        "broken row": 2,
        "empty path": 1,
        "broken picture": 4,
        "not JPEG, PNG or WebP": 3,
        "too many pixels": 1,
        "unreadable file": 1,
    }
    assert causes(out) == expected
    assert [sample["txt"].decode() for sample in read(out)] == ["good", "another caption of the same picture", "café"]
    table = capsys.readouterr().out
    for cause, count in expected.items():
        row = next(line for line in table.splitlines() if f"refused: {cause} " in line)
        assert f" {count} " in row
    row = next(row for row in refused(out) if row["cause"] == "too many pixels")
    assert row["prefix"] == "train"
    assert row["path"] == "pics/huge.png"
    assert row["place"] == "line 20"
    assert "120 x 90" in row["detail"]


def test_broken_json_lines(tool, pictures, tmp_path):
    lines = [
        '{"filepath": "pics/pic0.jpg", "caption": "good"}',
        "{not json",
        "[1, 2]",
        '{"filepath": "pics/pic1.jpg"}',
        '{"filepath": "pics/pic1.jpg", "caption": 5}',
        '{"filepath": "pics/pic1.jpg", "caption": "\\ud800"}',
        "[" * 100_000,
    ]
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    assert tool.main([str(tmp_path / "list.jsonl"), "--output", str(tmp_path / "out")]) == 0
    assert causes(tmp_path / "out") == {"broken row": 5, "caption not UTF-8": 1}
    assert len(read(tmp_path / "out")) == 1


def test_an_unbalanced_quote_is_reported_with_the_lines_it_took(tool, pictures, tmp_path):
    lines = ["filepath\tcaption", "pics/pic0.jpg\tgood"]
    lines += ['pics/pic1.jpg\t"Nice', "pics/pic2.jpg\tx", 'pics/pic3.jpg\tis "it" now', "pics/pic4.jpg\tgood"]
    (tmp_path / "list.tsv").write_text("\n".join(lines))
    assert tool.main([str(tmp_path / "list.tsv"), "--output", str(tmp_path / "out")]) == 0
    assert [row["place"] for row in refused(tmp_path / "out")] == ["lines 3-5"]
    assert len(read(tmp_path / "out")) == 2


def test_a_picture_that_training_would_mask_is_refused(tool, pictures, tmp_path):
    """Pillow opens this damaged JPEG without complaint, the loader's strict decoder does not."""
    data = (pictures / "pic0.jpg").read_bytes()
    data = data[:-40] + b"\xff\xd0" + data[-38:]
    Image.open(io.BytesIO(data)).load()
    (pictures / "pic0.jpg").write_bytes(data)
    source = write_csv(tmp_path / "list.csv", ["filepath", "caption"], [[f"pics/pic{i}.jpg", "x"] for i in range(2)])
    assert tool.main([str(source), "--output", str(tmp_path / "out")]) == 0
    assert causes(tmp_path / "out") == {"broken picture": 1}


# --- folders ----------------------------------------------------------------------------------------------------------


def test_folder_with_captions_beside(tool, tmp_path):
    source = tmp_path / "tree"
    for name in ("a/one.jpg", "a/b/two.PNG", "three.webp", "c.d/four.x.jpeg"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(picture({"PNG": "PNG", "webp": "WEBP"}.get(name.split(".")[-1], "JPEG")))
        (source / name).with_suffix(".txt").write_text(f"  caption of {name}\n")
    (source / "a" / "one.png").write_bytes(picture("PNG"))  # a second picture for one.txt
    (source / "alone.jpg").write_bytes(picture())
    (source / "orphan.txt").write_text("no picture")
    (source / "blank.jpg").write_bytes(picture())
    (source / "blank.txt").write_text(" \n")
    (source / "latin.jpg").write_bytes(picture())
    (source / "latin.txt").write_bytes(b"caf\xe9")
    (source / "notes.md").write_text("ignored")
    (source / ".hidden.jpg").write_bytes(b"ignored")
    (source / "a" / "loop").symlink_to(source)
    out = source / "shards"  # inside the source, as people do
    for _ in range(2):
        assert tool.main([str(source), "--output", str(out), "--prefix", "validation", "--overwrite"]) == 0
        expected = {
            "duplicate key": 1,
            "no caption file": 1,
            "missing file": 1,
            "empty caption": 1,
            "caption not UTF-8": 1,
        }
        assert causes(out) == expected
        found = {json.loads(s["json"])["filepath"]: s["txt"].decode() for s in read(out, "validation")}
        assert found == {
            name: f"caption of {name}" for name in ("a/one.jpg", "a/b/two.PNG", "three.webp", "c.d/four.x.jpeg")
        }
    assert sorted(path.name for path in out.iterdir()) == ["refused.jsonl", "validation-0000.tar"]


def test_files_that_are_no_samples_are_counted(tool, tmp_path, capsys):
    source = tmp_path / "tree"
    for folder in ("a", ".ipynb_checkpoints", "__MACOSX"):
        (source / folder).mkdir(parents=True)
        (source / folder / "x.jpg").write_bytes(picture())
        (source / folder / "x.txt").write_text("x")
    for name in (".DS_Store", "._x.jpg", "._x.txt", "x.json", "y.json", "film.MP4", "README", "lines\nof.pictures.jpg"):
        (source / "a" / name).write_bytes(b"?")
    assert tool.main([str(source), "--output", str(tmp_path / "out")]) == 0
    assert [json.loads(sample["json"])["filepath"] for sample in read(tmp_path / "out")] == ["a/x.jpg"]
    assert [(row["path"], row["cause"]) for row in refused(tmp_path / "out")] == [
        ("a/lines\nof.pictures.jpg", "no caption file")
    ]
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in capsys.readouterr().out.splitlines()]
    assert [row for row in rows if row[0].startswith("passed over: ")] == [
        ["passed over: hidden file", "3", "a/.DS_Store"],
        ["passed over: hidden folder", "2", ".ipynb_checkpoints"],
        ["passed over: other format, .json", "2", "a/x.json"],
        ["passed over: other format", "1", "a/README"],
        ["passed over: other format, .mp4", "1", "a/film.MP4"],
    ]


# --- pictures made smaller --------------------------------------------------------------------------------------------


def smooth(kind: str, size: tuple[int, int], mode: str = "RGB", **options) -> bytes:
    """A picture without sharp edges: a corner of its own for each colour."""
    coarse = Image.fromarray(np.random.default_rng(7).integers(0, 256, (3, 3, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    coarse.resize(size, Image.Resampling.BICUBIC).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def pack_pictures(tool, folder: Path, files: dict[str, bytes], *options: str) -> dict[str, tuple[str, bytes, dict]]:
    """Name -> (extension, picture, its JSON) after make_shards of a folder."""
    (folder / "pics").mkdir(parents=True)
    for name, data in files.items():
        (folder / "pics" / name).write_bytes(data)
        (folder / "pics" / name).with_suffix(".txt").write_text(name)
    assert tool.main([str(folder / "pics"), "--output", str(folder / "out"), "--jobs=1", *options]) == 0
    found = {}
    for sample in read(folder / "out"):
        extension = next(name for name in ("jpg", "png", "webp") if name in sample)
        found[sample["txt"].decode()] = (extension, sample[extension], json.loads(sample["json"]))
    return found


def test_resize_is_pillows_bicubic_upright_and_keeps_the_kind(tool, tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6
    files = {
        "wide.jpg": smooth("JPEG", (301, 200), quality=95),
        "tall.png": smooth("PNG", (200, 300)),
        "web.webp": smooth("WEBP", (200, 300), lossless=True),
        "cmyk.jpg": smooth("JPEG", (300, 200), "CMYK", quality=95),
        "small.jpg": smooth("JPEG", (99, 64)),
        "turned.jpg": smooth("JPEG", (300, 200), quality=95, exif=turned),
        "turned-small.jpg": smooth("JPEG", (99, 64), quality=95, exif=turned),
    }
    found = pack_pictures(tool, tmp_path, files, "--resize=100")
    sizes = {name: (facts["width"], facts["height"]) for name, (_, _, facts) in found.items()}
    assert sizes == {
        "wide.jpg": (150, 100),
        "tall.png": (100, 150),
        "web.webp": (100, 150),
        "cmyk.jpg": (150, 100),
        "small.jpg": (99, 64),
        "turned.jpg": (100, 150),
        "turned-small.jpg": (64, 99),
    }
    assert found["small.jpg"][1] == files["small.jpg"]
    for name, (extension, data, facts) in found.items():
        assert extension == name.partition(".")[2]
        assert facts["sha256"] == hashlib.sha256(files[name]).hexdigest()  # of the original, as img2dataset's
        original = Image.open(io.BytesIO(files[name]))
        assert (facts["original_width"], facts["original_height"]) == original.size
        upright = ImageOps.exif_transpose(original).convert("RGB").resize(sizes[name], Image.Resampling.BICUBIC)
        result = Image.open(io.BytesIO(data))
        assert result.size == sizes[name]
        assert name == "small.jpg" or not result.getexif()
        difference = np.abs(np.asarray(result.convert("RGB")).astype(int) - np.asarray(upright).astype(int)).mean()
        assert difference < (0.6 if extension == "png" else 2.5), (name, difference)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation(tool, tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = smooth("PNG", (90, 60), exif=exif)
    _, packed, _ = pack_pictures(tool, tmp_path, {"a.png": data}, "--resize=60")["a.png"]
    np.testing.assert_array_equal(
        np.asarray(Image.open(io.BytesIO(packed))), np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    )


def test_without_resize_bytes_stay_and_formats_convert_where_asked(tool, tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 3
    files = {"a.jpg": smooth("JPEG", (50, 40)), "b.png": smooth("PNG", (50, 40)), "c.webp": smooth("WEBP", (50, 40))}
    files["turned.jpg"] = smooth("JPEG", (50, 40), exif=turned)
    kept = pack_pictures(tool, tmp_path / "keep", files)
    assert {name: data for name, (_, data, _) in kept.items()} == files
    for format in ("jpg", "webp"):
        found = pack_pictures(tool, tmp_path / format, files, f"--format={format}", "--quality=80")
        assert {extension for extension, _, _ in found.values()} == {format}
        same = next(name for name in files if name.endswith(format))
        assert found[same][1] == files[same]
        assert found["turned.jpg"][1] != files["turned.jpg"]
        for name, (_, data, _) in found.items():
            decoded = Image.open(io.BytesIO(data))
            assert decoded.format == {"jpg": "JPEG", "webp": "WEBP"}[format], name


def test_enlarge(tool, tmp_path):
    files = {"a.png": smooth("PNG", (50, 40))}
    assert pack_pictures(tool, tmp_path / "no", files, "--resize=80")["a.png"][1] == files["a.png"]
    assert Image.open(
        io.BytesIO(pack_pictures(tool, tmp_path / "yes", files, "--resize=80", "--enlarge")["a.png"][1])
    ).size == (100, 80)


def test_bytes_do_not_depend_on_the_processes(tool, tmp_path):
    folder = tmp_path / "pics"
    folder.mkdir()
    for number in range(100):
        data = picture(seed=number, size=(120 + number, 100))
        (folder / f"{number:03}.jpg").write_bytes(data if number % 7 else data[:300])
        (folder / f"{number:03}.txt").write_text(f"caption {number}")
    shards = []
    for jobs in (1, 2, 3):
        out = tmp_path / f"out{jobs}"
        command = [str(folder), "--output", str(out), "--resize=64", "--samples-per-shard=30", f"--jobs={jobs}"]
        assert tool.main(command) == 0
        shards.append([path.read_bytes() for path in sorted(out.iterdir())])
        assert causes(out) == {"broken picture": 15}
    assert len(shards[0]) == 4
    assert shards[0] == shards[1] == shards[2]


def test_names_without_prefix_are_img2datasets_and_the_index_reads_them(tool, pictures, tmp_path):
    source = write_csv(
        tmp_path / "list.csv", ["filepath", "caption"], [[f"pics/pic{i}.jpg", f"c{i}"] for i in range(9)]
    )
    command = [str(source), "--output", str(tmp_path / "out"), "--prefix=", "--samples-per-shard=4"]
    assert tool.main(command) == 0
    assert sorted(path.name for path in (tmp_path / "out").glob("*.tar")) == ["00000.tar", "00001.tar", "00002.tar"]
    indexed = open_source("x", SourceSettings(f"{tmp_path}/out/*.tar"), Data(), need="pairs")
    assert indexed.counts.tolist() == [4, 4, 1]
    assert {indexed.caption(indexed.read(shard, 0).note) for shard in range(3)} <= {f"c{i}" for i in range(9)}
    indexed.close()
    assert tool.main(command) == 2
    assert tool.main([*command, "--overwrite", "--samples-per-shard=9"]) == 0
    assert [path.name for path in (tmp_path / "out").glob("*.tar")] == ["00000.tar"]


def test_ctrl_c_adds_no_shard(tmp_path):
    folder = tmp_path / "pics"
    folder.mkdir()
    data = picture(size=(1000, 900))
    for number in range(400):
        (folder / f"{number:03}.jpg").write_bytes(data)
        (folder / f"{number:03}.txt").write_text("x")
    command = [sys.executable, TOOL, folder, "--output", tmp_path / "out", "--samples-per-shard=5", "--jobs=2"]
    done = subprocess.Popen([*map(str, command), "--resize=100"], stderr=subprocess.PIPE, text=True)
    wait_until(lambda: list(tmp_path.glob("out/.train.building/*.tar")))
    done.send_signal(signal.SIGINT)
    assert "interrupted, no shard was added" in done.communicate(timeout=300)[1]
    assert done.returncode == 130
    assert list((tmp_path / "out").iterdir()) == []


# --- wrong input: one line, exit status 2 -----------------------------------------------------------------------------


def test_wrong_input_is_one_line_and_status_2(tool, pictures, tmp_path, capsys):
    output = ["--output", str(tmp_path / "out")]
    source = write_csv(tmp_path / "list.csv", ["filepath", "words"], [["pics/pic0.jpg", "x"]])
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "one.csv").write_text("a column\nvalue\n")
    (tmp_path / "list.parquet").write_text("PAR1")
    for arguments, message in [
        ([str(tmp_path / "gone.csv")], "does not exist"),
        ([str(tmp_path / "list.parquet")], "neither a folder nor a list ending in .csv"),
        ([str(tmp_path / "empty.csv")], "is empty"),
        ([str(tmp_path / "empty.jsonl")], "holds no JSON object"),
        ([str(tmp_path / "one.csv")], "the one column 'a column'"),
        ([str(source), "--caption-key", "text"], "has no column 'text' (it has 'filepath', 'words')"),
        ([str(source), "--label-key", "label"], "has no column 'label'"),
        ([str(pictures), "--image-key", "x"], "are for lists"),
        ([str(source), "--prefix", "a/b"], "must be a plain file name"),
    ]:
        assert tool.main(arguments + output) == 2, arguments
        assert message in one_error_line(capsys)
    assert tool.main([str(source), "--output", str(source)]) == 2
    assert "is a file" in one_error_line(capsys)
    assert not (tmp_path / "out").exists()


def test_existing_shards_are_kept_unless_overwrite(tool, pictures, tmp_path, capsys):
    source = write_csv(tmp_path / "list.csv", ["filepath", "caption"], [[f"pics/pic{i}.jpg", "x"] for i in range(9)])
    out = tmp_path / "out"
    command = [str(source), "--output", str(out)]
    assert tool.main([*command, "--samples-per-shard=3"]) == 0
    assert tool.main([*command, "--prefix=train-b"]) == 0  # another prefix is no conflict
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    capsys.readouterr()
    assert tool.main(command) == 2
    assert "already holds 3 shards train-*.tar" in one_error_line(capsys)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before

    # Nothing usable: the old shards stay even under --overwrite.
    bad = write_csv(tmp_path / "bad.csv", ["filepath", "caption"], [["gone.jpg", "x"], ["pics/pic0.jpg", ""]])
    assert tool.main([str(bad), "--output", str(out), "--overwrite"]) == 2
    printed = capsys.readouterr()
    assert "no usable sample" in printed.err
    assert "refused: missing file" in printed.out
    assert len(read(out)) == 9 + 9  # train and train-b
    assert causes(out) == {"missing file": 1, "empty caption": 1}

    assert tool.main([*command, "--overwrite", "--samples-per-shard=5"]) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "refused.jsonl",
        "train-0000.tar",
        "train-0001.tar",
        "train-b-0000.tar",
    ]
    assert refused(out) == []


def test_a_source_without_pictures_is_told(tool, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert tool.main([str(tmp_path / "empty"), "--output", str(tmp_path / "out")]) == 2
    assert one_error_line(capsys).endswith(f"no usable sample in {tmp_path / 'empty'}; it holds no picture and no row")


def test_refusals_of_other_prefixes_stay_listed(tool, pictures, tmp_path):
    for prefix, row in (("train", ["gone.jpg", "x"]), ("test", ["pics/pic1.jpg", ""])):
        source = write_csv(tmp_path / "list.csv", ["filepath", "caption"], [["pics/pic0.jpg", "x"], row])
        assert tool.main([str(source), "--output", str(tmp_path / "out"), "--prefix", prefix]) == 0
    listed = [(row["prefix"], row["path"], row["cause"]) for row in refused(tmp_path / "out")]
    assert listed == [("train", "gone.jpg", "missing file"), ("test", "pics/pic1.jpg", "empty caption")]


@pytest.mark.slow
def test_as_a_command(pictures, tmp_path):
    source = write_csv(tmp_path / "list.csv", ["filepath", "caption"], [["pics/pic0.jpg", "x"], ["pics/pic1.jpg", "y"]])
    command = [sys.executable, str(TOOL)]
    done = subprocess.run([*command, str(source), "--output", str(tmp_path / "out")], capture_output=True, text=True)
    assert (done.returncode, done.stderr.strip()) == (0, "")
    assert "2 samples in train-0000.tar" in done.stdout
    done = subprocess.run([*command, str(source), "--output", str(tmp_path / "out")], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


def test_help_shows_an_example(tool, capsys):
    with pytest.raises(SystemExit) as stop:
        tool.main(["--help"])
    assert stop.value.code == 0
    assert "python data_tools/make_shards.py captions.csv --output shards" in capsys.readouterr().out
