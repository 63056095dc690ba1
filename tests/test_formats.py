"""What a file's header says, and files that are out to do harm."""

import io
import random
import subprocess
import sys
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import (
    MAX_PIXELS,
    chunk,
    draws,
    encode,
    exif,
    image,
    jpeg_header,
    photo,
    png_head,
    png_header,
    webp_header,
)
from PIL import Image, ImageOps
from shards import picture

from clipscale.data.bad import MASK_CAUSES, BadSample
from clipscale.data.pixels.decode import (
    MAX_SCANS,
    Decoding,
    crop_and_resize,
    decode,
    load_picture,
    picture_size,
    random_crop,
)

# --- size -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(41, 300), (300, 41), (1, 1)])
@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("PNG", {}),
        ("WEBP", {}),
        ("WEBP", {"lossless": True}),
        ("WEBP", {"exif": b"Exif\0\0II*\0"}),
        ("WEBP", {"save_all": True}),
    ],
)
def test_the_size_is_pillows(format, options, height, width):
    if "save_all" in options:
        options = {**options, "append_images": [image(height, width, seed=2)]}
    data = encode(image(height, width), format, **options)
    assert picture_size(data) == (height, width, format)
    assert Image.open(io.BytesIO(data)).size == (width, height)


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_the_size_of_other_jpegs(mode):
    assert picture_size(encode(image(30, 50, mode), "JPEG")) == (30, 50, "JPEG")


def test_the_size_needs_no_whole_file():
    for format in ("PNG", "WEBP"):
        assert picture_size(picture(0, 300, 200, format)[:40]) == (300, 200, format)
    jpeg = picture(0, 300, 200)
    assert picture_size(jpeg[: jpeg.index(b"\xff\xda") + 14]) == (300, 200, "JPEG")


@pytest.mark.parametrize("data", [b"", b"GIF89a" + bytes(50), *(picture(0, 9, 9, f)[:16] for f in ("JPEG", "PNG"))])
def test_a_header_that_makes_no_sense_is_refused(data):
    with pytest.raises(BadSample):
        picture_size(data)


def test_a_picture_without_pixels_is_refused():
    for data in (png_header(0, 10), png_header(10, 0), jpeg_header(10, 0), jpeg_header(0, 10)):
        assert cause_of(data) == "broken picture"
        with pytest.raises(BadSample, match="broken picture"):
            picture_size(data)


# --- EXIF -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("format", "options"), [("JPEG", {}), ("PNG", {}), ("WEBP", {"lossless": True})])
def test_exif_turns_a_picture_as_pillow_does(format, options, orientation):
    original = photo(24, 37)
    for tags in (exif(orientation), exif(orientation, ">"), exif(orientation, ">", form=4)):
        data = encode(original, format, exif=tags, **options)
        lying = Image.open(io.BytesIO(data))
        np.testing.assert_array_equal(decode(data, MAX_PIXELS), np.array(lying))
        pixels = decode(data, MAX_PIXELS, exif="apply")
        np.testing.assert_array_equal(pixels, np.array(ImageOps.exif_transpose(lying)))
        assert pixels.flags["C_CONTIGUOUS"]
        assert picture_size(data)[:2] == (24, 37)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_picture_is_cropped_in_its_turned_coordinates(orientation):
    data = encode(photo(120, 170), "JPEG", exif=exif(orientation))
    upright = np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    how = Decoding(MAX_PIXELS, (0.5, 0.9), exif="apply")
    box = random_crop(*upright.shape[:2], draws(1)[0], how.crop_scale, how.crop_ratio)
    for side in (32, 64):
        out = load_picture(data, draws(1)[0], how, side)
        torch.testing.assert_close(out, crop_and_resize(upright, box, side), rtol=0, atol=0)
    small = decode(data, MAX_PIXELS, exif="apply", at_least=(upright.shape[0] // 2, upright.shape[1] // 2))
    assert small.shape[:2] == (upright.shape[0] // 2, upright.shape[1] // 2)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["JPEG", "PNG", "WEBP"]), st.binary(max_size=40), st.integers(6, 60))
def test_exif_without_sense_harms_nothing(format, junk, cut):
    data = encode(image(3, 5), format, exif=exif(6)[:cut] + junk, lossless=True)
    assert decode(data, MAX_PIXELS).shape == (3, 5, 3)
    assert sorted(decode(data, MAX_PIXELS, exif="apply").shape) == [3, 3, 5]


def test_a_picture_without_exif_stays():
    for format in ("JPEG", "PNG", "WEBP"):
        data = picture(0, 20, 30, format)
        np.testing.assert_array_equal(decode(data, MAX_PIXELS, exif="apply"), decode(data, MAX_PIXELS))


# --- what is refused --------------------------------------------------------------------------------------------------


def cause_of(data: bytes, max_pixels: int = MAX_PIXELS) -> str:
    with pytest.raises(BadSample) as bad:
        decode(data, max_pixels)
    assert bad.value.cause in MASK_CAUSES
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


@settings(max_examples=100, deadline=None)
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


def test_a_file_of_two_minds_about_its_size_is_refused():
    png = picture(0, 20, 30, "PNG")
    with pytest.raises(BadSample, match="two sizes: 30 x 20, 5000 x 4000"):
        decode(png[:33] + png_head(5000, 4000)[8:] + png[33:], MAX_PIXELS)
    webp = bytearray(encode(image(20, 30), "WEBP", exif=exif(1)))
    webp[24:27] = (29 + 100).to_bytes(3, "little")  # the canvas of its VP8X header
    assert cause_of(bytes(webp)) == "broken picture"


def test_a_flipped_bit_among_the_pixels_of_a_png_is_refused():
    data, chance = picture(3, 60, 60, "PNG"), random.Random(0)
    start, end = data.index(b"IDAT") + 4, data.index(b"IEND") - 8
    for _ in range(100):
        broken = bytearray(data)
        broken[chance.randrange(start, end)] ^= 1 << chance.randrange(8)
        assert cause_of(bytes(broken)) == "broken picture"


def test_a_png_cut_at_any_byte_is_refused():
    data = picture(3, 20, 20, "PNG")
    for cut in range(8, len(data)):
        assert cause_of(data[:cut]) == "broken picture"


def test_a_jpeg_of_endless_scans_is_refused_at_once():
    data = encode(image(64, 64), "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    with pytest.raises(BadSample, match="broken picture: 20010 scans"):
        decode(data[:-2] + last * 20_000 + data[-2:], MAX_PIXELS)
    assert 5 <= data.count(b"\xff\xda") < MAX_SCANS // 5


def bombs() -> dict[str, tuple[bytes, str]]:
    """name -> (a file of at most 1 MB, what becomes of it: its shape or the cause)."""
    zeros, plain = zlib.compress(bytes(300_010_000), 9), picture(0, 20, 20, "PNG")
    head, body, end = plain[:33], plain[33:], chunk(b"IDAT", zeros) + chunk(b"IEND", b"")
    return {
        "zTXt": (head + 3 * chunk(b"zTXt", b"note\0\0" + zeros) + body, "(20, 20, 3)"),
        "iCCP": (head + chunk(b"iCCP", b"profile\0\0" + zeros) + body, "(20, 20, 3)"),
        "PNG of 3.6 gigapixels": (png_header(60_000, 60_000), "too many pixels"),
        "PNG of 100 megapixels": (png_head(10_000, 10_000) + end, "too many pixels"),
        "PNG with more pixels than its header says": (png_head(20, 20) + end, "(20, 20, 3)"),
        "JPEG of 4.2 gigapixels": (jpeg_header(65_000, 65_000), "too many pixels"),
        "WebP of 256 megapixels": (webp_header(16_000, 16_000), "too many pixels"),
        "APNG without sense": (head + 2 * chunk(b"acTL", b"\xff" * 8) + body, "(20, 20, 3)"),
        "EXIF without sense": (
            encode(image(20, 20, "CMYK"), "JPEG", exif=exif(6)[:30] + b"\xff" * 40),
            "(20, 20, 3)",
        ),
        "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not JPEG, PNG or WebP"),
    }


def test_hostile_files_cost_no_memory_and_say_nothing(tmp_path):
    files = list(bombs().items())
    for number, (_, (data, _)) in enumerate(files):
        assert len(data) <= 1_000_000
        (tmp_path / f"{number}.jpg").write_bytes(data)
    code = """
import pathlib, sys
from clipscale.data.pixels.decode import decode
from clipscale.data.bad import BadSample
def memory(field):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024
for number in range(int(sys.argv[2])):
    data = pathlib.Path(sys.argv[1], f"{number}.jpg").read_bytes()
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = memory("VmRSS")
    try:
        found = decode(data, 90_000_000, exif="apply").shape
    except BadSample as bad:
        found = bad.cause
    print(memory("VmHWM") - before, found, sep="|")
"""
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", code, str(tmp_path), str(len(files))],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stderr == ""
    for (name, (_, expected)), line in zip(files, done.stdout.splitlines(), strict=True):
        growth, found = line.split("|")
        assert found == expected, name
        assert int(growth) < 200_000_000, name


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
