import io
import random
import struct
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from shards import picture

from clipscale.counter import uniform
from clipscale.data.decode import (
    CAUSES,
    DRAWS_PER_SAMPLE,
    BadSample,
    center_square,
    crop_and_resize,
    decode,
    random_crop,
)

MAX_PIXELS = 10_000_000


def encode(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def image(height: int = 40, width: int = 60, mode: str = "RGB", seed: int = 0) -> Image.Image:
    return Image.open(io.BytesIO(picture(seed, height, width, "PNG"))).convert(mode)


def with_pillow(data: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(data)).convert("RGB"))


# --- decode against Pillow --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"progressive": True}, {"quality": 30, "optimize": True}])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_jpeg_equals_pillow(mode, options):
    for height, width in ((1, 1), (7, 3), (33, 65), (120, 160)):
        data = encode(image(height, width, mode, seed=height), "JPEG", **options)
        np.testing.assert_array_equal(decode(data, MAX_PIXELS), with_pillow(data))


@pytest.mark.parametrize(
    ("mode", "format"),
    [("CMYK", "JPEG"), ("RGB", "PNG"), ("L", "PNG"), ("1", "PNG"), ("P", "PNG"), ("RGB", "WEBP"), ("L", "WEBP")],
)
def test_the_rest_equals_pillow(mode, format):
    data = encode(image(mode=mode), format)
    pixels = decode(data, MAX_PIXELS)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, with_pillow(data))


def test_lossless_pictures_come_back_as_they_were():
    original = np.array(image())
    for options in ({"format": "PNG"}, {"format": "WEBP", "lossless": True}):
        np.testing.assert_array_equal(decode(encode(image(), **options), MAX_PIXELS), original)


@pytest.mark.parametrize(("mode", "format"), [("RGBA", "PNG"), ("LA", "PNG"), ("RGBA", "WEBP")])
def test_transparency_lies_on_white(mode, format):
    clear = image(mode=mode)
    clear.putalpha(Image.fromarray(np.linspace(0, 255, 60, dtype=np.uint8)[None].repeat(40, 0)))
    pixels = decode(encode(clear, format, **({"lossless": True} if format == "WEBP" else {})), MAX_PIXELS).astype(float)
    alpha = np.linspace(0, 255, 60).astype(np.uint8)[None, :, None] / 255
    expected = alpha * np.array(clear.convert("RGBA"))[:, :, :3] + (1 - alpha) * 255
    assert abs(pixels - expected)[:, 1:].max() <= 1.5
    assert (pixels[:, 0] == 255).all()


def test_a_transparent_palette_entry_lies_on_white():
    data = encode(Image.fromarray(np.eye(8, dtype=np.uint8), "L").convert("P"), "PNG", transparency=0)
    pixels = decode(data, MAX_PIXELS)
    assert (pixels[~np.eye(8, dtype=bool)] == 255).all()
    assert (pixels[np.eye(8, dtype=bool)] == 1).all()


def test_sixteen_bit_grey_keeps_its_tones():
    tones = np.arange(0, 65_536, 16, dtype=np.uint16).reshape(64, 64)
    pixels = decode(encode(Image.fromarray(tones), "PNG"), MAX_PIXELS)
    np.testing.assert_array_equal(pixels, (tones >> 8).astype(np.uint8)[:, :, None].repeat(3, 2))


def test_the_first_frame_of_an_animation_is_taken():
    frames = [image(seed=seed) for seed in range(3)]
    data = encode(frames[0], "WEBP", lossless=True, save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(decode(data, MAX_PIXELS), np.array(frames[0]))


# --- what is refused --------------------------------------------------------------------------------------------------


def cause_of(data: bytes, max_pixels: int = MAX_PIXELS) -> str:
    with pytest.raises(BadSample) as bad:
        decode(data, max_pixels)
    assert bad.value.cause in CAUSES
    return bad.value.cause


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"


@pytest.mark.parametrize(
    "data", [b"", b"\xff", EPS, b"GIF89a" + bytes(50), encode(image(), "GIF"), encode(image(), "BMP")]
)
def test_other_formats_are_refused_by_their_first_bytes(data):
    assert cause_of(data) == "not JPEG, PNG or WebP"


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_truncated_pictures_are_refused(format):
    data = picture(1, 64, 64, format)
    for share in (0.1, 0.5, 0.9):
        assert cause_of(data[: max(16, int(len(data) * share))]) == "broken picture"


def test_flipped_bits_in_a_jpeg_are_refused_or_change_the_picture_only():
    """Nothing but BadSample comes out; most flips are noticed."""
    data, chance, refused = picture(2, 96, 96), random.Random(0), 0
    for _ in range(200):
        broken = bytearray(data)
        for _ in range(8):
            broken[chance.randrange(2, len(data))] ^= 1 << chance.randrange(8)
        try:
            assert decode(bytes(broken), MAX_PIXELS).shape[2] == 3
        except BadSample:
            refused += 1
    assert refused > 100


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(
        [picture(1, 24, 24, format) for format in ("JPEG", "PNG", "WEBP")] + [encode(image(mode="CMYK"), "JPEG")]
    ),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=6)), min_size=1, max_size=5),
)
def test_hostile_bytes_give_pixels_or_bad_sample(data, changes):
    broken = bytearray(data)
    for place, new in changes:
        start = int(place * len(broken))
        broken[start : start + len(new)] = new
    try:
        pixels = decode(bytes(broken), 1_000_000)
    except BadSample:
        return
    assert pixels.ndim == 3
    assert pixels.shape[2] == 3
    assert pixels.dtype == np.uint8


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    pixels = zlib.compress(bytes(100_000))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


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


@pytest.mark.parametrize(
    "data",
    [png_header(60_000, 60_000), png_header(11_000, 10_000), jpeg_header(65_000, 65_000), webp_header(16_000, 16_000)],
)
def test_decompression_bombs_are_refused_by_their_header(data):
    tracemalloc.start()
    assert cause_of(data, max_pixels=90_000_000) == "too many pixels"
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_the_limit_is_the_last_size_that_passes():
    data = picture(0, 30, 40)
    assert decode(data, 1200).shape == (30, 40, 3)
    assert cause_of(data, 1199) == "too many pixels"
    assert cause_of(picture(0, 30, 40, "PNG"), 1199) == "too many pixels"
    assert cause_of(picture(0, 30, 40, "WEBP"), 1199) == "too many pixels"
    assert cause_of(encode(image(30, 40, "CMYK"), "JPEG"), 1199) == "too many pixels"


def test_threads_do_not_disturb_each_other_nor_the_warning_filters():
    import warnings

    files = [picture(i, 20 + i, 30, format) for i, format in enumerate(("JPEG", "PNG", "WEBP") * 10)]
    expected = [decode(data, MAX_PIXELS) for data in files]
    before = list(warnings.filters)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: [decode(data, MAX_PIXELS) for data in files], range(8)):
            for a, b in zip(found, expected, strict=True):
                np.testing.assert_array_equal(a, b)
    assert warnings.filters == before


# --- crop and resize --------------------------------------------------------------------------------------------------


def draws(number: int) -> np.ndarray:
    return uniform(5, np.arange(number * DRAWS_PER_SAMPLE)).reshape(number, DRAWS_PER_SAMPLE)


@settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 3000),
    st.integers(1, 3000),
    st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(sorted),
    st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)).map(sorted),
    st.lists(st.floats(0, 1, exclude_max=True), min_size=DRAWS_PER_SAMPLE, max_size=DRAWS_PER_SAMPLE),
)
def test_a_crop_lies_inside_the_picture(height, width, scale, ratio, numbers):
    top, left, h, w = random_crop(height, width, np.array(numbers), scale, ratio)
    assert 0 < h <= height - top
    assert 0 < w <= width - left
    assert top >= 0
    assert left >= 0


def test_crops_are_spread_as_asked():
    boxes = np.array([random_crop(300, 400, row, (0.2, 0.6), (0.9, 1.1)) for row in draws(4000)])
    top, left, h, w = boxes.T
    area, aspect = h * w / (300 * 400), w / h
    assert area.min() >= 0.19
    assert area.max() <= 0.61
    assert aspect.min() >= 0.89
    assert aspect.max() <= 1.11
    np.testing.assert_allclose(np.quantile(area, [0.1, 0.5, 0.9]), [0.24, 0.4, 0.56], atol=0.02)
    for start, room in ((top, 300 - h), (left, 400 - w)):
        place = start[room > 20] / room[room > 20]
        np.testing.assert_allclose(np.quantile(place, [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9], atol=0.04)
    square = np.array([random_crop(400, 400, row, (0.3, 0.3), (0.5, 2)) for row in draws(4000)])
    np.testing.assert_allclose(np.median(np.log(square[:, 3] / square[:, 2])), 0, atol=0.05)  # log-uniform: symmetric


@pytest.mark.parametrize(
    ("height", "width", "box"),
    [(10, 1000, (0, 493, 10, 13)), (1000, 10, (493, 0, 13, 10)), (1, 1, (0, 0, 1, 1)), (1, 1000, (0, 499, 1, 1))],
)
def test_a_picture_too_long_for_any_crop_gives_its_middle(height, width, box):
    for row in draws(20):
        assert random_crop(height, width, row, (0.9, 1.0), (0.75, 4 / 3)) == box


def test_narrow_ratios_never_give_an_empty_crop():
    for height, width in ((1, 50), (50, 1), (1, 1), (2, 3)):
        for ratio in ((0.1, 0.2), (5.0, 9.0)):
            _, _, h, w = random_crop(height, width, draws(1)[0], (0.9, 1.0), ratio)
            assert h >= 1
            assert w >= 1


def test_center_square():
    assert center_square(30, 50) == (0, 10, 30, 30)
    assert center_square(51, 30) == (10, 0, 30, 30)


@pytest.mark.parametrize("side", [32, 224])
@pytest.mark.parametrize("box", [(0, 0, 200, 300), (13, 40, 150, 160), (3, 5, 32, 32), (0, 0, 1, 300), (10, 10, 1, 1)])
def test_resize_equals_pillow(box, side):
    noise = np.random.default_rng(4).integers(-60, 61, (200, 300, 3))  # without antialiasing it would stay
    pixels = np.clip(np.array(image(200, 300, seed=4)) + noise, 0, 255).astype(np.uint8)
    out = crop_and_resize(pixels, box, side)
    assert out.shape == (3, side, side)
    assert out.dtype == torch.uint8
    top, left, height, width = box
    crop = Image.fromarray(pixels[top : top + height, left : left + width])
    reference = np.array(crop.resize((side, side), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert abs(out.numpy().astype(float) - reference).mean() <= 0.5


def test_a_whole_jpeg_through_both_paths_agrees_within_half_a_level():
    for seed in range(5):
        data = picture(seed, 150, 210)
        box = random_crop(150, 210, draws(5)[seed], (0.5, 1.0), (0.75, 4 / 3))
        out = crop_and_resize(decode(data, MAX_PIXELS), box, 96).numpy().astype(float)
        top, left, height, width = box
        crop = Image.open(io.BytesIO(data)).crop((left, top, left + width, top + height))
        reference = np.array(crop.resize((96, 96), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
        assert abs(out - reference).mean() <= 0.5
