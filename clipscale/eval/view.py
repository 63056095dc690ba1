"""One picture as evaluation sees it: by open_clip's own steps, so that the pixels are equal, or as training decodes it.

    view = View.of(config, towers)          # eval.pixels, model.preprocess and the image tower's side S
    image_3SS = view(data)                  # uint8 [3, S, S]

open_clip's steps are Pillow's: decode, as the file's bytes say what it is, and not turned by EXIF; convert("RGB") as
ImageFolder and webdataset do, which drops transparency and shows what lies beneath; resize, so that the short side is S
and the long side is cut to whole pixels; then the middle S x S. No other decoder or resize gives the same numbers:
torch's resize of uint8 is up to 3 levels away, Pillow's own `resize(box=...)` up to 11.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from PIL import Image

from clipscale.config import Config, Preprocess
from clipscale.data.bad import BadSample
from clipscale.data.pixels.decode import MAX_SCANS, Decoding, load_picture, refusing
from clipscale.towers import Towers

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "GIF")  # as Pillow names them


@dataclass(frozen=True)
class View:
    """Bytes of a picture -> uint8 [3, side, side]. Raises BadSample for what cannot be decoded."""

    side: int  # S
    decoding: Decoding
    preprocess: Preprocess = field(default_factory=Preprocess)
    pixels: Literal["open_clip", "training"] = "open_clip"

    @classmethod
    def of(cls, config: Config, towers: Towers) -> View:
        return cls(towers.image_size, Decoding.of(config.data), towers.preprocess, config.eval.pixels)

    def __call__(self, data: bytes) -> torch.Tensor:
        if self.pixels == "training":
            return load_picture(data, None, self.decoding, self.side)
        image = _fit(_decode(data, self.decoding.max_pixels), self.side, self.preprocess)
        return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())


@refusing
def _decode(data: bytes, max_pixels: int) -> Image.Image:
    """The first picture of the file, RGB."""
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        if image.width * image.height > max_pixels:
            raise BadSample("too many pixels", f"{image.width} x {image.height} > {max_pixels}")
        if image.format == "JPEG" and (scans := data.count(b"\xff\xda")) > MAX_SCANS:
            raise BadSample("broken picture", f"{scans} scans")
        image.load()
        image.info.pop("transparency", None)  # of no use to RGB, and Pillow would warn
        return image.convert("RGB")


@refusing
def _fit(image: Image.Image, side: int, preprocess: Preprocess) -> Image.Image:
    """`image`, RGB, as [side, side]: the steps of `open_clip.image_transform(is_train=False)` on Pillow's pictures."""
    width, height = image.size
    how = Image.Resampling[preprocess.interpolation.upper()]
    if preprocess.resize_mode == "squash":
        return image.resize((side, side), how)
    if preprocess.resize_mode == "longest":
        ratio = max(height / side, width / side)
        image = image.resize((round(width / ratio), round(height / ratio)), how)
        square = Image.new("RGB", (side, side), (preprocess.fill_color,) * 3)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return square
    short = min(width, height)
    image = image.resize((int(side * width / short), int(side * height / short)), how)
    left, top = round((image.width - side) / 2), round((image.height - side) / 2)
    return image.crop((left, top, left + side, top + side))
