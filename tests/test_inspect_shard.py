"""data_tools/inspect_shard.py and clipscale/shardkit/sheet.py: contact sheets as PNG and HTML."""

from __future__ import annotations

import base64
import io
import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFont
from shards import picture, write_pairs, write_shard
from tools import load_tool

from clipscale.shardkit import sheet

EVIL = '"><script>alert(1)</script><img src=x onerror=alert(2)>\u202e{0}'
CAPTIONS = ["a plain caption", "一只猫坐在垫子上", "кошка", "قطة على السجادة", "🐈", EVIL, "x" * 5000]


class Page(HTMLParser):
    """Tags, attributes and text, as a parser that is not ours has them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.pictures, self.texts = [], [], []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.tags.append((tag, sorted(name for name, _ in attributes)))
        self.pictures += [value for name, value in attributes if name == "src"]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def solid(colour: tuple[int, int, int], size: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def test_png_shows_each_picture_in_its_place(tmp_path, capsys):
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255)]
    samples = [(f"{i:03}", {"png": solid(c, (300, 300)), "txt": b"x"}) for i, c in enumerate(colours)]
    samples.insert(2, ("bad", {"jpg": b"\xff\xd8\xff no picture", "txt": b"x"}))
    path, sheet = write_shard(tmp_path / "x.tar", samples), tmp_path / "sheet.png"
    command = [str(path), "--output", str(sheet), "--columns=3", "--tile=100"]
    assert load_tool("inspect_shard").main(command) == 0
    assert capsys.readouterr().out == f"{sheet}: 6 of 6 samples, 1 without a picture\n"
    pixels = np.asarray(Image.open(sheet))
    assert pixels.shape[1] == 3 * 108 + 8
    tall = (pixels.shape[0] - 8) // 2
    expected = [*colours[:2], (128, 128, 128), *colours[2:]]
    for i, colour in enumerate(expected):
        top, left = 8 + i // 3 * tall, 8 + i % 3 * 108
        assert tuple(pixels[top + 90, left + 50]) == colour, i  # low in the tile: a cause is written at its top
    assert len(np.unique(pixels[8:108, 8 + 2 * 108 : 108 + 2 * 108].reshape(-1, 3), axis=0)) > 2  # the cause is there


@pytest.mark.parametrize("font", ["DejaVu or Pillow's", "Pillow's", "no FreeType"])
def test_png_takes_captions_in_any_script(tmp_path, monkeypatch, font):
    tool = load_tool("inspect_shard")
    if font == "Pillow's":
        monkeypatch.setattr(sheet, "load_font", lambda: ImageFont.load_default(12))
    elif font == "no FreeType":
        monkeypatch.setattr(sheet, "load_font", ImageFont.load_default_imagefont)
    samples = [(f"ключ{i}", {"jpg": picture(i, 30, 40), "txt": text.encode()}) for i, text in enumerate(CAPTIONS)]
    path = write_shard(tmp_path / "x.tar", samples)
    assert tool.main([str(path), "--output", str(tmp_path / "sheet.png")]) == 0
    with Image.open(tmp_path / "sheet.png") as drawn:
        drawn.load()


def test_html_is_one_file_in_which_nothing_runs(tmp_path):
    samples = [
        (f"{EVIL[:20].replace('.', '')}{i}", {"jpg": picture(i, 30, 40), "txt": text.encode()})
        for i, text in enumerate(CAPTIONS)
    ]
    samples.append(("broken", {"jpg": b"<script>alert(3)</script>", "txt": b"x"}))
    path = write_shard(tmp_path / "x.tar", samples)
    assert load_tool("inspect_shard").main([str(path), "--output", str(tmp_path / "sheet.html")]) == 0
    text = (tmp_path / "sheet.html").read_text(encoding="utf-8")
    page = Page(text)
    assert {tag for tag, _ in page.tags} == {
        *("html", "head", "meta", "title", "style", "body", "h1", "p", "main"),
        *("figure", "div", "img", "figcaption", "bdi"),
    }
    assert {name for _, names in page.tags for name in names} == {
        "charset",
        "http-equiv",
        "content",
        "class",
        "alt",
        "src",
    }
    assert "default-src 'none'; img-src data:" in text
    assert set(CAPTIONS) <= set(page.texts)
    assert any("not JPEG, PNG or WebP" in text for text in page.texts)
    assert len(page.pictures) == len(CAPTIONS)
    for source, i in zip(page.pictures, range(len(CAPTIONS)), strict=True):
        head, _, data = source.partition(",")
        assert head == "data:image/jpeg;base64"
        shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))).astype(int)
        original = np.asarray(Image.open(io.BytesIO(picture(i, 30, 40)))).astype(int)
        assert shown.shape == original.shape
        assert np.abs(shown - original).mean() < 4


def keys_shown(path: Path) -> list[str]:
    return [text.split()[0] for text in Page(path.read_text()).texts if text.endswith(" 16 x 16")]


def test_which_samples_are_shown(tmp_path):
    write_pairs(tmp_path, shards=1, per_shard=40, size=16)
    tool, sheet = load_tool("inspect_shard"), tmp_path / "sheet.html"

    def chosen(*options: str) -> list[str]:
        assert tool.main([str(tmp_path / "0000.tar"), "--output", str(sheet), *options]) == 0
        return keys_shown(sheet)

    assert chosen("--samples=5") == [f"{i:06}" for i in range(5)]
    assert chosen("--start=38", "--samples=5") == ["000038", "000039"]
    drawn = chosen("--seed=1", "--samples=10")
    assert len(set(drawn)) == 10
    assert drawn == chosen("--seed=1", "--samples=10") != chosen("--seed=2", "--samples=10")
    assert min(chosen("--seed=1", "--start=30")) == "000030"


def test_labels_and_json_captions(tmp_path):
    jpeg, facts = picture(0, 20, 20), json.dumps({"text": {"long": "from the JSON"}}).encode()
    path = write_shard(
        tmp_path / "x.tar", [("a", {"jpg": jpeg, "cls": b"17", "json": facts}), ("b", {"txt": b"alone"})]
    )
    sheet = tmp_path / "sheet.html"
    tool = load_tool("inspect_shard")
    assert tool.main([str(path), "--output", str(sheet), "--caption=json:text.long"]) == 0
    assert "from the JSON [label 17]" in Page(sheet.read_text()).texts
    assert tool.main([str(path), "--output", str(sheet)]) == 0
    texts = Page(sheet.read_text()).texts
    assert {"[label 17]", "alone", "no picture"} <= set(texts)


def test_wrong_arguments_are_one_line_and_status_2(tmp_path, capsys):
    write_pairs(tmp_path, shards=2, per_shard=1)
    (tmp_path / "none.tar").write_bytes(bytes(1024))
    tool, shard, png = load_tool("inspect_shard"), str(tmp_path / "0000.tar"), str(tmp_path / "sheet.png")
    for arguments, message in [
        ([shard, "--output", str(tmp_path / "sheet.gif")], "must end in .png or .html"),
        ([str(tmp_path / "gone.tar"), "--output", png], "is not a file"),
        ([str(tmp_path / "000*.tar"), "--output", png], "names 2 shards"),
        ([str(tmp_path / "none.tar"), "--output", png], "holds no sample"),
        ([shard, "--output", png, "--start=1"], "--start 1: the shard has the samples 0 to 0"),
        ([shard, "--output", str(tmp_path / "no" / "sheet.png")], "No such file"),
    ]:
        assert tool.main(arguments) == 2, arguments
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("inspect_shard.py: error: ")
        assert message in line
    assert not list(tmp_path.glob("sheet*"))
    with pytest.raises(SystemExit) as stop:
        tool.main(["--help"])
    assert stop.value.code == 0
    assert "inspect_shard.py data/train-0000.tar --output sheet.png" in capsys.readouterr().out
