"""Bytes of one picture -> uint8 [3, S, S], or a `BadSample` that names the cause.

    pixels = decode(data, max_pixels=90_000_000)                   # uint8 [H, W, 3]
    box = random_crop(h, w, draws, scale=(0.9, 1.0), ratio=(3/4, 4/3))
    image_3SS = crop_and_resize(pixels, box, side=224)

The format comes from the magic bytes, never from the name. JPEG goes to simplejpeg, PNG, WebP and odd JPEGs (CMYK) to
Pillow; the resize is torch's antialiased bicubic on uint8, within 0.05 grey levels of Pillow's. A header that promises
more than `max_pixels` is refused before anything is decoded.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

CAUSES = ("cannot be read", "not JPEG, PNG or WebP", "broken picture", "too many pixels", "caption is not UTF-8")
CROP_TRIES = 10
DRAWS_PER_SAMPLE = 4 * CROP_TRIES

_PILLOW = {"JPEG": JpegImageFile, "PNG": PngImageFile, "WEBP": WebPImageFile}  # not Image.open, whose limit warns

Box = tuple[int, int, int, int]  # top, left, height, width


class BadSample(Exception):
    """This sample is left out of its batch. `cause` is one of CAUSES."""

    def __init__(self, cause: str, detail: str = "") -> None:
        assert cause in CAUSES
        super().__init__(f"{cause}: {detail}" if detail else cause)
        self.cause = cause


def decode(data: bytes, max_pixels: int) -> np.ndarray:
    """A JPEG, PNG or WebP file -> uint8 [H, W, 3], RGB; transparency lies on white.

    Raises:
        BadSample: another format, a truncated or corrupt picture, a header above `max_pixels`.
    """
    kind = sniff(data)
    if kind is None:
        raise BadSample("not JPEG, PNG or WebP", f"first bytes {data[:8]!r}")
    try:
        if kind == "JPEG":
            height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
            _check_size(height, width, max_pixels)
            if colorspace not in ("CMYK", "YCCK"):
                return simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True)
        return _decode_with_pillow(data, kind, max_pixels)
    except BadSample:
        raise
    except Image.DecompressionBombError as error:  # Pillow's own limit, which it keeps for WebP
        raise BadSample("too many pixels", str(error)) from error
    except Exception as error:  # decoders raise ValueError, OSError, SyntaxError, struct.error, ... on hostile bytes
        raise BadSample("broken picture", f"{type(error).__name__}: {error}") from error


def sniff(data: bytes) -> str | None:
    """'JPEG', 'PNG', 'WEBP' or None, from the magic bytes."""
    if data[:3] == b"\xff\xd8\xff":
        return "JPEG"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "PNG"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    return None


def random_crop(height: int, width: int, draws: np.ndarray, scale: Sequence[float], ratio: Sequence[float]) -> Box:
    """The box of a random resized crop (Szegedy et al., arXiv 1409.4842), as torchvision's RandomResizedCrop draws it.

    Args:
        draws: DRAWS_PER_SAMPLE numbers in [0, 1).
        scale: share of the picture's area, from and to.
        ratio: width over height, from and to; drawn log-uniformly.
    """
    for area_draw, ratio_draw, top_draw, left_draw in draws.reshape(CROP_TRIES, 4):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * area_draw)
        aspect = math.exp(math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * ratio_draw)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(top_draw * (height - h + 1)), int(left_draw * (width - w + 1)), h, w
    w = min(width, max(1, round(height * ratio[1])))  # none fits: the middle, with the aspect ratio clipped
    h = min(height, max(1, round(width / ratio[0])))
    return (height - h) // 2, (width - w) // 2, h, w


def center_square(height: int, width: int) -> Box:
    """The largest square in the middle: what evaluation looks at (short side to S, then the middle S x S)."""
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side, side


def crop_and_resize(pixels_HW3: np.ndarray, box: Box, side: int) -> torch.Tensor:
    """uint8 [H, W, 3] -> uint8 [3, side, side], antialiased bicubic."""
    top, left, height, width = box
    crop = torch.from_numpy(pixels_HW3[top : top + height, left : left + width]).permute(2, 0, 1)[None]
    if (height, width) == (side, side):
        return crop[0]
    return F.interpolate(crop, (side, side), mode="bicubic", antialias=True)[0]


def _check_size(height: int, width: int, max_pixels: int) -> None:
    if height * width > max_pixels:
        raise BadSample("too many pixels", f"{width} x {height} > {max_pixels}")


def _decode_with_pillow(data: bytes, kind: str, max_pixels: int) -> np.ndarray:
    with _PILLOW[kind](io.BytesIO(data)) as image:
        _check_size(image.height, image.width, max_pixels)
        if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip at 255
            return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        return np.array(image.convert("RGB"))
