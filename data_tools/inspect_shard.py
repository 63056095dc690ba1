"""Look into a shard: a contact sheet of its pictures with their captions, as PNG or as a page of HTML.

    python data_tools/inspect_shard.py data/train-0000.tar --output sheet.png
    python data_tools/inspect_shard.py https://host/set/00000.tar --output sheet.html --samples 100 --seed 1

Keys and captions may be hostile: in HTML everything is escaped, pictures are encoded anew, and the page may load and
run nothing. A picture that the loader cannot decode is a grey tile with the cause.
"""

import argparse
import base64
import html
import io
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from clipscale.config_data import Data, Fetch
from clipscale.data.bad import BadSample
from clipscale.data.fetch.cache import ShardCache
from clipscale.data.fetch.urls import expand_urls, is_local, masked
from clipscale.data.pixels.decode import decode, picture_size
from clipscale.data.shard.captions import CaptionError, CaptionRule
from clipscale.data.shard.judge import IMAGE_SUFFIXES, MAX_PICTURE_BYTES
from clipscale.data.shard.labels import MAX_LABEL_BYTES
from clipscale.data.shard.select import group
from clipscale.data.shard.tar import Listing, list_members
from clipscale.errors import require
from clipscale.files import whole_file
from clipscale.shardkit.checks import opened
from clipscale.shardkit.commands import natural, positive, run, shown

EXAMPLES = """\
examples:
  python data_tools/inspect_shard.py data/train-0000.tar --output sheet.png
      its first 24 samples
  python data_tools/inspect_shard.py data/train-0000.tar --output sheet.html --samples 100 --seed 1
      100 drawn at random; one file that any browser shows, whatever the language of the captions
  python data_tools/inspect_shard.py data/train-0000.tar --output sheet.png --start 5000 --samples 8 --columns 4

PNG letters are DejaVu Sans where the system has it, else Pillow's own: letters that the font lacks (Chinese,
Devanagari, emoji, ...) show as boxes. HTML shows them all.
exit status: 0 the sheet was written; 2 wrong arguments, or a shard that cannot be read.
"""
GREY, MARGIN, LINES, LINE_PIXELS, LETTER_PIXELS = (128, 128, 128), 8, 4, 16, 7


@dataclass(frozen=True)
class Tile:
    key: str
    text: str  # the caption, else the label
    picture: Image.Image | None
    fault: str  # why there is no picture
    size: str  # of the picture as stored: '500 x 375'


def read_tiles(arguments: argparse.Namespace) -> tuple[list[Tile], int]:
    """(the tiles, number of samples in the shard)."""
    urls = expand_urls(arguments.shard)
    require(len(urls) == 1, f"{masked(arguments.shard)!r} names {len(urls)} shards: give one")
    cache = None if is_local(urls[0]) else ShardCache(arguments.cache_dir, None, Fetch(), allow_pipe=False)
    with opened(urls[0], cache) as tar:
        listing = list_members(tar)
        samples = list(group(listing.names))
        require(bool(samples), f"{masked(urls[0])} holds no sample ({listing.cut or 'an empty archive'})")
        require(
            arguments.start < len(samples),
            f"--start {arguments.start}: the shard has the samples 0 to {len(samples) - 1}",
        )
        numbers = np.arange(arguments.start, len(samples))
        if arguments.seed is not None:
            numbers = np.random.default_rng(arguments.seed).permutation(numbers)
        return [read_tile(tar, listing, *samples[i], arguments) for i in numbers[: arguments.samples]], len(samples)


def read_tile(tar: bytes, listing: Listing, key: str, sample: dict[str, int], arguments: argparse.Namespace) -> Tile:
    def member(suffix: str, most_bytes: int) -> bytes | None:
        number = sample.get(suffix)
        if number is None or listing.sizes[number] > most_bytes:
            return None
        return listing.data(tar, number)

    rule = CaptionRule.of(arguments.caption)
    note, label = member(rule.suffix, rule.max_bytes), member("cls", MAX_LABEL_BYTES)
    try:
        text = rule.pick(note) if note is not None else ""
    except CaptionError as error:
        text = f"[{error}]"
    if label is not None:
        text = f"{text} [label {label.decode('utf-8', 'backslashreplace').strip()}]".strip()
    data = next((member(suffix, MAX_PICTURE_BYTES) for suffix in IMAGE_SUFFIXES if suffix in sample), b"")
    try:
        pixels = decode(data or b"", arguments.max_pixels, at_least=(arguments.tile, arguments.tile))
    except BadSample as bad:
        return Tile(key, text, None, str(bad) if data else "no picture", "")
    picture, (height, width, _) = Image.fromarray(pixels), picture_size(data)
    picture.thumbnail((arguments.tile, arguments.tile))
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
    return PAGE.format(title=html.escape(title), note=html.escape(note), columns=columns, side=side, tiles=figures)


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


# --- command line -----------------------------------------------------------------------------------------------------


def inspect_shard(arguments: argparse.Namespace) -> int:
    kind = arguments.output.suffix.lower()
    require(kind in (".png", ".html"), f"--output {str(arguments.output)!r}: must end in .png or .html")
    tiles, samples = read_tiles(arguments)
    broken = sum(tile.picture is None for tile in tiles)
    note = f"{len(tiles)} of {samples:,} samples" + (f", {broken} without a picture" if broken else "")
    if kind == ".png":
        data = draw_sheet(tiles, arguments.columns, arguments.tile)
    else:
        data = write_page(tiles, masked(arguments.shard), note, arguments.columns, arguments.tile).encode()
    with whole_file(arguments.output, "wb") as file:
        file.write(data)
    print(f"{arguments.output}: {note}")
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="inspect_shard.py",
        description="A contact sheet of a shard's samples with their captions or labels.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("shard", metavar="SHARD", help="path or URL (through the cache)")
    add("--output", type=Path, required=True, metavar="FILE", help="ends in .png or .html")
    add("--samples", type=positive, default=24, metavar="N", help="default: 24")
    add("--start", type=natural, default=0, metavar="N", help="number of the first sample, default: 0")
    add("--seed", type=natural, metavar="N", help="draw samples at random, from --start on")
    add("--columns", type=positive, default=6, metavar="N", help="default: 6")
    add("--tile", type=positive, default=224, metavar="PIXELS", help="side of a tile, default: 224")
    add("--caption", default="txt", metavar="WHERE", help="a member's suffix, or json:<field>; default: txt")
    add("--max-pixels", type=positive, default=Data.max_pixels, metavar="N", help="default: %(default)s")
    add("--cache-dir", metavar="DIR", help="copies of remote shards; default: the user's cache folder")
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    return run("inspect_shard.py", lambda: inspect_shard(arguments), left="nothing was written")


if __name__ == "__main__":
    sys.exit(main())
