"""Bytes of one picture -> uint8 [3, S, S], or a `BadSample` that names the cause.

    image_3SS = load_picture(data, draws, Decoding.of(config.data), side=224)      # a random crop: what training sees
    image_3SS = load_picture(data, None, Decoding.of(config.data), side=224)       # the middle of it, decoded alike
    pixels_HW3 = decode(data, max_pixels=50_000_000)                               # the whole picture
    height, width, kind = picture_size(data)                                       # its header only: 3 us

The format comes from the magic bytes, never from the name. simplejpeg decodes every JPEG (libjpeg-turbo, strict, CMYK
too), Pillow PNG and WebP; the resize is torch's antialiased bicubic on uint8, within 0.1 grey levels of Pillow's. Of an
animation the first picture is taken. JPEGs of odd chroma subsampling (4:4:1, 4:1:0) are refused, for simplejpeg does
not read them. A header that promises more than `max_pixels` is refused before anything is decoded; below it a picture
takes 3 bytes of memory a pixel, 9 if it is a progressive JPEG, up to 17 if it is CMYK, PNG or WebP.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Literal, NamedTuple

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from PIL import Image
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from clipscale.config.data import Data
from clipscale.data.bad import BadSample
from clipscale.data.pixels.formats import jpeg_scans, orientation, plain_png, png_size, sniff, turned, webp_size

CROP_TRIES = 10
DRAWS_PER_SAMPLE = 4 * CROP_TRIES
MAX_SCANS = 100  # of a progressive JPEG; each goes over the whole picture, and ten are usual
FOUR_CHANNEL_PIXELS = 2**18  # as far as the faster end of `crop_and_resize` outweighs a quarter more to decode into

Box = tuple[int, int, int, int]  # top, left, height, width
Exif = Literal["ignore", "apply"]


@dataclass(frozen=True)
class Decoding:
    """How a picture becomes a training sample; `Data` explains each."""

    max_pixels: int
    crop_scale: tuple[float, float] = (0.9, 1.0)
    crop_ratio: tuple[float, float] = (0.75, 4 / 3)
    exif: Exif = "ignore"
    scaled: bool = False

    @classmethod
    def of(cls, data: Data) -> Decoding:
        return cls(data.max_pixels, data.crop_scale, data.crop_ratio, data.exif, data.scaled_decode)


class _Header(NamedTuple):
    kind: str
    height: int
    width: int
    colorspace: str  # of a JPEG


def load_picture(
    data: bytes, draws: np.ndarray | None, settings: Decoding, side: int, out_3SS: torch.Tensor | None = None
) -> torch.Tensor:
    """A JPEG, PNG or WebP file -> uint8 [3, side, side], cropped and resized.

    Args:
        draws: DRAWS_PER_SAMPLE numbers in [0, 1) for the random crop, or None for the largest square in the middle.
        out_3SS: contiguous uint8 in host memory to write to; default: fresh memory.

    Raises:
        BadSample: as `decode`.
    """
    header = _read_header(data, settings.max_pixels)
    turn = orientation(data, header.kind) if settings.exif == "apply" else 1
    height, width = (header.width, header.height) if turn >= 5 else (header.height, header.width)
    if draws is None:
        box = center_square(height, width)
    else:
        box = random_crop(height, width, draws, settings.crop_scale, settings.crop_ratio)
    reduction = _reduction(box[2:], (side, side)) if settings.scaled and header.kind == "JPEG" else 1
    layout = "RGBX" if height * width <= FOUR_CHANNEL_PIXELS * reduction**2 else "RGB"
    pixels = turned(_decode(data, header, reduction, layout), turn)
    if reduction > 1:
        box = _scaled_box(box, (height, width), pixels.shape[:2])
    return crop_and_resize(pixels, box, side, out_3SS)


def decode(
    data: bytes, max_pixels: int, *, exif: Exif = "ignore", at_least: tuple[int, int] | None = None
) -> np.ndarray:
    """A JPEG, PNG or WebP file -> uint8 [H, W, 3], RGB; transparency lies on white.

    Args:
        exif: "apply" turns the picture as its EXIF says; "ignore" takes the pixels as they lie.
        at_least: (height, width) that will do: a JPEG comes at 1/2, 1/4 or 1/8 where neither side falls below it.

    Raises:
        BadSample: another format, a truncated or corrupt picture, a header above `max_pixels`.
    """
    header = _read_header(data, max_pixels)
    turn = orientation(data, header.kind) if exif == "apply" else 1
    reduction = 1
    if at_least is not None and header.kind == "JPEG":
        reduction = _reduction((header.height, header.width), at_least[::-1] if turn >= 5 else at_least)
    return np.require(turned(_decode(data, header, reduction, "RGB"), turn), requirements=["C", "W"])


def picture_size(data: bytes) -> tuple[int, int, str]:
    """(height, width, 'JPEG', 'PNG' or 'WEBP') from the header, as the pixels lie: EXIF is not asked.

    Raises:
        BadSample: another format, a header that makes no sense.
    """
    header = _read_header(data, None)
    return header.height, header.width, header.kind


# --- decoding ---------------------------------------------------------------------------------------------------------


def refusing(function: Callable) -> Callable:
    """Whatever a decoder raises on hostile bytes (ValueError, OSError, SyntaxError, struct.error, ...) -> BadSample."""

    @wraps(function)
    def guarded(*args):
        try:
            return function(*args)
        except BadSample:
            raise
        except Image.DecompressionBombError as error:  # Pillow's own limit, which it keeps for WebP
            raise BadSample("too many pixels", str(error)) from error
        except Exception as error:
            raise BadSample("broken picture", f"{type(error).__name__}: {error}") from error

    return guarded


@refusing
def _read_header(data: bytes, max_pixels: int | None) -> _Header:
    kind, colorspace = sniff(data), ""
    if kind == "JPEG":
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    elif kind == "PNG":
        height, width = png_size(data)
    elif kind == "WEBP":
        height, width = webp_size(data)
    else:
        raise BadSample("not JPEG, PNG or WebP", f"first bytes {data[:8]!r}")
    if height < 1 or width < 1:
        raise BadSample("broken picture", f"{width} x {height} pixels")
    if max_pixels is not None and height * width > max_pixels:
        raise BadSample("too many pixels", f"{width} x {height} > {max_pixels}")
    return _Header(kind, height, width, colorspace)


@refusing
def _decode(data: bytes, header: _Header, reduction: int, layout: str) -> np.ndarray:
    """uint8 [H, W, 3] or, of a JPEG and with layout RGBX, [H, W, 4], whose last channel means nothing."""
    if header.kind == "JPEG":
        return _decode_jpeg(data, header, reduction, layout)
    if header.kind == "PNG":
        return _decode_png(data, header)
    with WebPImageFile(io.BytesIO(data)) as image:
        return _on_white(_of_size(image, header))


def _decode_jpeg(data: bytes, header: _Header, reduction: int, layout: str) -> np.ndarray:
    if (scans := jpeg_scans(data)) > MAX_SCANS:
        raise BadSample("broken picture", f"{scans} scans")
    cmyk = header.colorspace in ("CMYK", "YCCK")
    size = -(-header.height // reduction), -(-header.width // reduction)
    pixels = simplejpeg.decode_jpeg(
        data,
        colorspace="CMYK" if cmyk else layout,
        min_height=size[0],  # simplejpeg takes the smallest N/8 that reaches this: N = 8 / reduction
        min_width=size[1],
        strict=True,
    )
    assert pixels.shape[:2] == size
    if cmyk:  # written inverted, as Adobe does and Pillow expects
        inks = Image.frombuffer("CMYK", size[::-1], pixels, "raw", "CMYK;I", 0, 1)
        return np.asarray(inks.convert("RGB"))
    return pixels


def _decode_png(data: bytes, header: _Header) -> np.ndarray:
    with PngImageFile(io.BytesIO(plain_png(data))) as image:
        _of_size(image, header)
        key = image.info.get("transparency")
        if key is None or image.mode == "P":
            return _on_white(image)
        del image.info["transparency"]  # the one grey or colour that is clear, in the file's own bits
        depth = data[24]
        if depth == 16 and image.mode != "RGB":
            clear_HW1 = (np.asarray(image) == key)[:, :, None]
        else:  # Pillow keeps the upper 8 bits of 16-bit colours
            key = np.atleast_1d(key) >> 8 if depth == 16 else np.atleast_1d(key) * (255 // (2**depth - 1))
            clear_HW1 = (np.asarray(image.convert("RGB")) == key).all(axis=2, keepdims=True)
        return np.where(clear_HW1, np.uint8(255), _on_white(image))


def _of_size(image: Image.Image, header: _Header) -> Image.Image:
    if image.size != (header.width, header.height):
        raise BadSample(
            "broken picture", f"two sizes: {header.width} x {header.height}, {image.width} x {image.height}"
        )
    return image


def _on_white(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip at 255
        return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
    if image.mode in ("RGBA", "LA") or "transparency" in image.info:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema()[0] < 255:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))


def _reduction(have: tuple[int, int], want: tuple[int, int]) -> int:
    """The largest of 8, 4, 2, 1 by which `have` can be divided and not fall below `want`."""
    if max(have) < 8:  # where other eighths round to the same size
        return 1
    return next((k for k in (8, 4, 2) if k * want[0] <= have[0] and k * want[1] <= have[1]), 1)


# --- crop and resize --------------------------------------------------------------------------------------------------


def random_crop(height: int, width: int, draws: np.ndarray, scale: Sequence[float], ratio: Sequence[float]) -> Box:
    """The box of a random resized crop (Szegedy et al., arXiv 1409.4842), as torchvision's RandomResizedCrop draws it.

    Args:
        draws: DRAWS_PER_SAMPLE numbers in [0, 1).
        scale: share of the picture's area, from and to.
        ratio: width over height, from and to; drawn log-uniformly.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for start in range(0, DRAWS_PER_SAMPLE, 4):  # mostly the first four will do: no more of them become Python floats
        area_draw, ratio_draw, top_draw, left_draw = draws[start : start + 4].tolist()
        area = height * width * (scale[0] + (scale[1] - scale[0]) * area_draw)
        aspect = math.exp(low + (high - low) * ratio_draw)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(top_draw * (height - h + 1)), int(left_draw * (width - w + 1)), h, w
    w = min(width, max(1, round(height * ratio[1])))  # none fits: the middle, with the aspect ratio clipped
    h = min(height, max(1, round(width / ratio[0])))
    return (height - h) // 2, (width - w) // 2, h, w


def center_square(height: int, width: int) -> Box:
    """The largest square in the middle."""
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side, side


def crop_and_resize(pixels_HWC: np.ndarray, box: Box, side: int, out_3SS: torch.Tensor | None = None) -> torch.Tensor:
    """uint8 [H, W, 3], or [H, W, 4] of which the last channel is dropped -> uint8 [3, side, side], antialiased bicubic.

    Four channels go faster: a pixel is then one 32-bit number, and its colours are parted by shifts.
    """
    top, left, height, width = box
    crop = pixels_HWC[top : top + height, left : left + width]
    if (height, width) != (side, side):
        if min(crop.strides) < 0 or not crop.flags.writeable:  # turned, or Pillow's: torch wants neither
            crop = crop.copy()
        batch = torch.from_numpy(crop)[None].permute(0, 3, 1, 2)  # channels last, and so comes the result
        batch = F.interpolate(batch, (side, side), mode="bicubic", antialias=True)
        crop = batch.permute(0, 2, 3, 1)[0].numpy()
    out_3SS = torch.empty(3, side, side, dtype=torch.uint8) if out_3SS is None else out_3SS
    out = out_3SS.numpy()
    if crop.shape[2] == 4:
        packed = np.ascontiguousarray(crop).view("<u4")[:, :, 0]
        out[0], out[1], out[2] = packed, packed >> 8, packed >> 16
    else:
        out[...] = crop.transpose(2, 0, 1)
    return out_3SS


def _scaled_box(box: Box, full: tuple[int, int], scaled: tuple[int, int]) -> Box:
    """The box in the coordinates of the picture decoded smaller, rounded; no smaller than box / reduction."""
    height, width = (max(1, round(box[2 + axis] * scaled[axis] / full[axis])) for axis in (0, 1))
    top = min(round(box[0] * scaled[0] / full[0]), scaled[0] - height)
    left = min(round(box[1] * scaled[1] / full[1]), scaled[1] - width)
    return top, left, height, width
