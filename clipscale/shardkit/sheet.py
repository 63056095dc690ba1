"""A contact sheet of a shard: its pictures with their captions, as PNG or as a page of HTML.

    tiles, samples = read_tiles("train-0000.tar", Look("txt", 50_000_000, side=224), 0, 24, seed=None, cache_dir=None)
    draw_sheet(tiles, columns=6, side=224)                             # the bytes of a PNG
    write_page(tiles, "train-0000.tar", "24 of 10,000 samples", 6, 224)    # the text of a page

Keys and captions may be hostile: in HTML everything is escaped, pictures are encoded anew, and the page may load and
run nothing. A picture that the loader cannot decode is a grey tile with the cause.
"""

from __future__ import annotations

import base64
import html
import io
import textwrap
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from clipscale.data.bad import BadSample
from clipscale.data.fetch.urls import masked
from clipscale.data.pixels.decode import decode, picture_size
from clipscale.data.shard.captions import CaptionError, CaptionRule, caption_rules
from clipscale.data.shard.judge import IMAGE_SUFFIXES, MAX_PICTURE_BYTES
from clipscale.data.shard.labels import MAX_LABEL_BYTES
from clipscale.data.shard.select import group
from clipscale.data.shard.tar import Listing, list_members
from clipscale.errors import require
from clipscale.escape import escaped, shown
from clipscale.shardkit.checks import opened
from clipscale.shardkit.remote import cache_for

GREY, MARGIN, LINES, LINE_PIXELS, LETTER_PIXELS = (128, 128, 128), 8, 4, 16, 7


@dataclass(frozen=True)
class Tile:
    key: str
    text: str  # the caption (several in lines), else the label
    picture: Image.Image | None
    fault: str  # why there is no picture
    size: str  # of the picture as stored: '500 x 375'


@dataclass(frozen=True)
class Look:
    """How samples are read."""

    caption: str | tuple[str, ...]  # as a source of the config has it: txt, json:<field>; or several
    max_pixels: int
    side: int  # of a tile, pixels


def read_tiles(
    url: str, look: Look, start: int, samples: int, seed: int | None, cache_dir: str | None
) -> tuple[list[Tile], int]:
    """(the tiles, number of samples in the shard).

    Args:
        url: of the shard, or a path.
        start: number of the first sample.
        samples: at most so many: the next ones, with `seed` drawn at random from there on.
    """
    with opened(url, cache_for([url], cache_dir)) as tar:
        listing = list_members(tar)
        found = list(group(listing.names))
        require(bool(found), f"{masked(url)} holds no sample ({listing.cut or 'an empty archive'})")
        require(start < len(found), f"--start {start}: the shard has the samples 0 to {len(found) - 1}")
        numbers = np.arange(start, len(found))
        if seed is not None:
            numbers = np.random.default_rng(seed).permutation(numbers)
        return [read_tile(tar, listing, *found[i], look) for i in numbers[:samples]], len(found)


def read_tile(tar: bytes, listing: Listing, key: str, sample: dict[str, int], look: Look) -> Tile:
    def member(suffix: str, most_bytes: int) -> bytes | None:
        number = sample.get(suffix)
        if number is None or listing.sizes[number] > most_bytes:
            return None
        return listing.data(tar, number)

    def caption(rule: CaptionRule) -> str:
        note = member(rule.suffix, rule.max_bytes)
        try:
            return rule.pick(note) if note is not None else ""
        except CaptionError as error:
            return f"[{error}]"

    text = "\n".join(filter(None, map(caption, caption_rules(look.caption))))
    label = member("cls", MAX_LABEL_BYTES)
    if label is not None:
        text = f"{text} [label {label.decode('utf-8', 'backslashreplace').strip()}]".strip()
    data = next((member(suffix, MAX_PICTURE_BYTES) for suffix in IMAGE_SUFFIXES if suffix in sample), b"")
    try:
        pixels = decode(data or b"", look.max_pixels, at_least=(look.side, look.side))
    except BadSample as bad:
        return Tile(key, text, None, str(bad) if data else "no picture", "")
    picture, (height, width, _) = Image.fromarray(pixels), picture_size(data)
    picture.thumbnail((look.side, look.side))
    return Tile(key, text, picture, "", f"{width} x {height}")


# --- PNG --------------------------------------------------------------------------------------------------------------


def draw_sheet(tiles: list[Tile], columns: int, side: int) -> bytes:
    font = load_font()
    columns = min(columns, len(tiles))
    height = side + (LINES + 1) * LINE_PIXELS
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * (side + MARGIN) + MARGIN, rows * (height + MARGIN) + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    letters = max(8, side // LETTER_PIXELS)
    for number, tile in enumerate(tiles):
        left = MARGIN + number % columns * (side + MARGIN)
        top = MARGIN + number // columns * (height + MARGIN)
        if tile.picture is None:
            draw.rectangle((left, top, left + side - 1, top + side - 1), GREY)
            draw_text(draw, (left + 4, top + 4), wrapped(tile.fault, letters - 1, LINES), "white", font)
        else:
            width, tall = tile.picture.size
            sheet.paste(tile.picture, (left + (side - width) // 2, top + (side - tall) // 2))
        draw_text(draw, (left, top + side + 2), [shown(tile.key, letters)], "gray", font)
        draw_text(draw, (left, top + side + 2 + LINE_PIXELS), wrapped(tile.text, letters, LINES), "black", font)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def load_font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    try:
        return ImageFont.truetype("DejaVuSans.ttf", 12)
    except OSError:
        return ImageFont.load_default(12)


def wrapped(text: str, letters: int, lines: int) -> list[str]:
    return textwrap.wrap(shown(text, 4 * letters * lines), letters, max_lines=lines, placeholder=" ...")


def draw_text(draw: ImageDraw.ImageDraw, place: tuple[int, int], lines: list[str], colour: str, font) -> None:
    left, top = place
    for number, line in enumerate(lines):
        position = (left, top + number * LINE_PIXELS)
        try:
            draw.text(position, line, colour, font)
        except UnicodeEncodeError:  # Pillow built without FreeType: its font has Latin letters only
            draw.text(position, line.encode("ascii", "replace").decode(), colour, font)


# --- HTML -------------------------------------------------------------------------------------------------------------

PAGE = """<!doctype html>
<html><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
body {{ font: 14px sans-serif; margin: 1em; }}
main {{ display: grid; grid-template-columns: repeat({columns}, {side}px); gap: 12px; }}
figure {{ margin: 0; overflow-wrap: anywhere; }}
.picture {{ width: {side}px; height: {side}px; display: flex; align-items: center; justify-content: center; }}
.broken {{ background: #808080; color: white; }}
.key {{ color: #808080; font-size: 12px; }}
</style></head>
<body><h1>{title}</h1><p>{note}</p><main>
{tiles}
</main></body></html>
"""


def write_page(tiles: list[Tile], title: str, note: str, columns: int, side: int) -> str:
    figures = "\n".join(figure(tile) for tile in tiles)
    title, note = html.escape(escaped(title)), html.escape(note)
    return PAGE.format(title=title, note=note, columns=columns, side=side, tiles=figures)


def figure(tile: Tile) -> str:
    if tile.picture is None:
        picture = f'<div class="picture broken">{html.escape(shown(tile.fault, 200))}</div>'
    else:
        buffer = io.BytesIO()
        tile.picture.save(buffer, "JPEG", quality=85)
        data = base64.b64encode(buffer.getvalue()).decode()
        picture = f'<div class="picture"><img alt="" src="data:image/jpeg;base64,{data}"></div>'
    key, text = html.escape(shown(f"{tile.key} {tile.size}", 300)), html.escape(tile.text)
    caption = f'<div class="key">{key}</div><bdi>{text}</bdi>'  # bdi: direction marks of a text end with it
    return f"<figure>{picture}<figcaption>{caption}</figcaption></figure>"
