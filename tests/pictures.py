"""Picture files for the tests of decoding: photos with detail, PNGs of any depth, EXIF, hostile headers."""

import io
import struct
import zlib

import numpy as np
from PIL import Image
from shards import picture

from clipscale.counter import uniform
from clipscale.data.pixels.decode import DRAWS_PER_SAMPLE

MAX_PIXELS = 10_000_000
PNG_START = b"\x89PNG\r\n\x1a\n"


def encode(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def image(height: int = 40, width: int = 60, mode: str = "RGB", seed: int = 0) -> Image.Image:
    return Image.open(io.BytesIO(picture(seed, height, width, "PNG"))).convert(mode)


def photo(height: int, width: int, seed: int = 0, noise: int = 40) -> Image.Image:
    """A smooth picture with detail as fine as its pixels."""
    detail = np.random.default_rng(seed).integers(-noise, noise + 1, (height, width, 3))
    return Image.fromarray(np.clip(np.array(image(height, width, seed=seed)) + detail, 0, 255).astype(np.uint8))


def with_pillow(data: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(data)).convert("RGB"))


def draws(number: int) -> np.ndarray:
    return uniform(5, np.arange(number * DRAWS_PER_SAMPLE)).reshape(number, DRAWS_PER_SAMPLE)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_head(width: int, height: int, depth: int = 8, colour: int = 2, interlaced: int = 0) -> bytes:
    return PNG_START + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced))


def png(rows: np.ndarray, depth: int, colour: int, *before: bytes) -> bytes:
    """A PNG of rows as they lie in the file, uint8 [H, bytes of a row]; `before`: chunks between header and pixels."""
    height, width = len(rows), rows.shape[1] * 8 // (depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour])
    lines = b"".join(b"\0" + row.tobytes() for row in rows)
    pixels = chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    return png_head(width, height, depth, colour) + b"".join(before) + pixels


def interlaced_png(pixels: np.ndarray) -> bytes:
    """Adam7, which Pillow reads and does not write."""
    passes = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
    parts = [pixels[top::down, left::right] for top, left, down, right in passes]
    lines = b"".join(b"\0" + row.tobytes() for part in parts for row in part if row.size)
    head = png_head(pixels.shape[1], pixels.shape[0], interlaced=1)
    return head + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def png_header(width: int, height: int) -> bytes:
    return png_head(width, height) + chunk(b"IDAT", zlib.compress(bytes(100_000))) + chunk(b"IEND", b"")


def jpeg_header(width: int, height: int) -> bytes:
    data = bytearray(picture(0, 16, 16))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def webp_header(width: int, height: int) -> bytes:
    data = bytearray(encode(image(16, 16), "WEBP", lossless=True))
    start = data.index(b"VP8L") + 9
    bits = int.from_bytes(data[start : start + 4], "little") >> 28 << 28
    data[start : start + 4] = (bits | (width - 1) | (height - 1) << 14).to_bytes(4, "little")
    return bytes(data)


def exif(orientation: int, order: str = "<", form: int = 3) -> bytes:
    """A TIFF directory of three tags, the orientation as SHORT (3) or LONG (4) among them."""
    value = struct.pack(order + "HH", orientation, 0) if form == 3 else struct.pack(order + "I", orientation)
    entry = struct.pack(order + "HHI", 0x0112, form, 1) + value
    other = struct.pack(order + "HHII", 0x0100, 4, 1, 6)
    start = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "IH", 8, 3)
    return b"Exif\0\0" + start + other + entry + other + bytes(4)
