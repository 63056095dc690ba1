"""Shards to measure on: synthetic photographs that cost a decoder what ImageNet's do, with captions and JSON.

    urls = photo_shards("cache/bench", samples=8192)       # made once, the same bytes every time
    jpeg = photo(17)                                       # 341 x 256, quality 95, 4:2:0, about 41 KB

41 KB is the mean of ImageNet photos at short side 256 and quality 95. Each picture is two regions with an edge between
them, with colours, soft light and noise over all scales of their own; how much of it differs from picture to picture.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from clipscale.counter import fold, uniform
from clipscale.data.shard.writer import ShardWriter
from clipscale.pool import cores

MEAN_BYTES = 41_000  # of a photo, within 3 %
_VERSION = 1  # of what `photo` and `tiny` give; other bytes, another number
_SHORT, _LONG = 256, 341
_FIELD = 1024
_DETAIL, _DETAIL_SPREAD = 36.0, 1.6
_PER_SHARD = {"photos": 512, "tiny": 10_000}
_AHEAD = 256  # pictures made ahead of the one that is written
_TEXT = (
    "a the on in of with and under near beside red blue green yellow white black old small large wooden stone bright "
    "dark quiet busy city street river mountain beach forest garden kitchen table chair window door bridge boat car "
    "train bicycle dog cat horse bird child woman man people crowd player painter market flowers tree sky clouds "
    "sunset morning night rain snow winter summer photo painting portrait view house church tower castle lamp clock "
    "book cup plate fruit bread cake coffee bottle hat coat shoes umbrella ball guitar camera phone screen sign wall "
    "floor grass sand water wave rock hill road field fence farm sheep cow duck fish plane station museum festival "
    "standing sitting walking running holding looking playing wearing riding flying during behind across between"
)
_WORDS = _TEXT.split()


def photo_shards(folder: str | Path, samples: int) -> str:
    """Shards of `samples` photos, made where they are not there yet; returns their URL pattern."""
    return _shards(Path(folder), "photos", samples, photo)


def tiny_shards(folder: str | Path, samples: int) -> str:
    """The same with pictures of 16 x 16: for what does not depend on the pixels."""
    return _shards(Path(folder), "tiny", samples, lambda number: _tiny_pictures()[number % 256])


def photo(number: int, short: int = _SHORT, long: int = _LONG) -> bytes:
    """Picture `number`, as the bytes of a JPEG file; `short` and `long`: its sides in pixels."""
    draws = uniform(fold(0, "photo", number), np.arange(24))
    height, width = (short, long) if draws[0] < 0.75 else (long, short)

    def window(field: np.ndarray, top: float, left: float) -> np.ndarray:
        y, x = int(top * (_FIELD - height)), int(left * (_FIELD - width))
        return field[y : y + height, x : x + width]

    fields = _fields()
    detail = _DETAIL * np.exp(_DETAIL_SPREAD * (draws[1] - 0.5))
    here = window(fields.shape, *draws[2:4]) > 1.5 * (draws[4] - 0.5)
    texture = np.where(here, window(fields.light, *draws[5:7]), window(fields.blue, *draws[7:9]) * (0.3 + draws[9]))
    light = texture * detail + window(fields.shape, *draws[10:12]) * 20
    pixels = np.where(here[:, :, None], 70 + 110 * draws[12:15], 70 + 110 * draws[15:18]).astype(np.float32)
    pixels += light[:, :, None]
    pixels[:, :, 0] += window(fields.red, *draws[18:20]) * detail * 0.2
    pixels[:, :, 2] += window(fields.blue, *draws[20:22]) * detail * 0.2
    return _jpeg(np.clip(pixels, 0, 255).astype(np.uint8))


def caption(number: int) -> str:
    """10 to 20 common words."""
    draws = uniform(fold(0, "caption", number), np.arange(21))
    return " ".join(_WORDS[int(draw * len(_WORDS))] for draw in draws[1 : 11 + int(11 * draws[0])])


class _Fields(NamedTuple):
    """Noise [1024, 1024] of mean 0 and variance 1, whose edges fit together."""

    light: np.ndarray
    red: np.ndarray
    blue: np.ndarray
    shape: np.ndarray  # smooth: its contours are the edges


@lru_cache(maxsize=1)
def _fields() -> _Fields:
    return _Fields(
        *(_noise(name, fall) for name, fall in (("light", 1.25), ("red", 1.25), ("blue", 1.25), ("shape", 2)))
    )


def _noise(name: str, fall: float) -> np.ndarray:
    """Amplitude 1 / frequency^fall at random phases; photographs have a fall a little above 1."""
    frequency = np.hypot(np.fft.fftfreq(_FIELD)[:, None], np.fft.rfftfreq(_FIELD)[None, :])
    frequency[0, 0] = np.inf
    phase = uniform(fold(0, "noise", name), np.arange(frequency.size)).reshape(frequency.shape)
    field = np.fft.irfft2(frequency**-fall * np.exp(2j * np.pi * phase), s=(_FIELD, _FIELD))
    return (field / field.std()).astype(np.float32)


@lru_cache(maxsize=1)
def _tiny_pictures() -> list[bytes]:
    pixels = uniform(fold(0, "tiny"), np.arange(256 * 2 * 2 * 3)).reshape(256, 2, 2, 3)
    return [_jpeg((picture * 256).astype(np.uint8).repeat(8, 0).repeat(8, 1)) for picture in pixels]


def _jpeg(pixels_HW3: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels_HW3).save(buffer, "JPEG", quality=95, subsampling="4:2:0")
    return buffer.getvalue()


def _shards(folder: Path, kind: str, samples: int, picture: Callable[[int], bytes]) -> str:
    """A shard that has its name is whole, and so is a set whose last shard has it."""
    place = folder / f"{kind}-{samples}-v{_VERSION}"
    shards = -(-samples // _PER_SHARD[kind])
    if not (place / f"{kind}-{shards - 1:04d}.tar").is_file():
        with ShardWriter(place / kind, samples_per_shard=_PER_SHARD[kind]) as writer:
            for number, jpeg in enumerate(_made_ahead(picture, samples)):
                facts = {"key": f"{number:09d}", "status": "success", "caption": caption(number)}
                writer.write(f"{number:09d}", {"jpg": jpeg, "txt": facts["caption"], "json": facts})
    return f"{place}/{kind}-{{0000..{shards - 1:04d}}}.tar"


def _made_ahead(picture: Callable[[int], bytes], samples: int) -> Iterator[bytes]:
    """picture(0), picture(1), ... by threads, for NumPy and the encoder release the GIL."""
    picture(0)  # fills the caches before the threads ask for them
    with ThreadPoolExecutor(cores()) as pool:
        for start in range(0, samples, _AHEAD):
            yield from pool.map(picture, range(start, min(samples, start + _AHEAD)))
