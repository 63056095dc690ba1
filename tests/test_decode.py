"""Every format and mode that is read, against Pillow; crop and resize are in test_load_picture.py."""

import io
import struct

import numpy as np
import pytest
import simplejpeg
from pictures import MAX_PIXELS, chunk, encode, image, interlaced_png, photo, png, with_pillow
from PIL import Image

from clipscale.data.pixels.decode import decode, picture_size


@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"progressive": True}, {"quality": 30, "optimize": True}])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_jpeg_equals_pillow(mode, options):
    for height, width in ((1, 1), (7, 3), (33, 65), (120, 160)):
        data = encode(image(height, width, mode, seed=height), "JPEG", **options)
        np.testing.assert_array_equal(decode(data, MAX_PIXELS), with_pillow(data))


@pytest.mark.parametrize("subsampling", ["444", "422", "420", "440", "411"])
def test_every_chroma_subsampling_equals_pillow(subsampling):
    data = simplejpeg.encode_jpeg(np.array(photo(61, 83)), colorsubsampling=subsampling)
    np.testing.assert_array_equal(decode(data, MAX_PIXELS), with_pillow(data))


def test_every_colorspace_of_jpeg_equals_pillow():
    cmyk = encode(photo(61, 83).convert("CMYK"), "JPEG", quality=90)
    adobe = cmyk.index(b"Adobe")
    ycck = bytearray(cmyk)
    ycck[adobe + 11] = 2  # its four channels now count as YCCK
    files = [cmyk, bytes(ycck), cmyk[: adobe - 4] + cmyk[adobe + 12 :], encode(photo(61, 83), "JPEG", keep_rgb=True)]
    assert [simplejpeg.decode_jpeg_header(data)[2] for data in files] == ["CMYK", "YCCK", "CMYK", "RGB"]
    for data in files:
        np.testing.assert_array_equal(decode(data, MAX_PIXELS), with_pillow(data))


@pytest.mark.parametrize(
    ("mode", "format"),
    [("CMYK", "JPEG"), ("RGB", "PNG"), ("L", "PNG"), ("1", "PNG"), ("P", "PNG"), ("RGB", "WEBP"), ("L", "WEBP")],
)
def test_the_rest_equals_pillow(mode, format):
    data = encode(image(mode=mode), format)
    pixels = decode(data, MAX_PIXELS)
    assert pixels.dtype == np.uint8
    assert pixels.flags.writeable
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


@pytest.mark.parametrize(("colour", "channels"), [(2, 3), (4, 2), (6, 4)])
def test_sixteen_bits_a_channel_are_cut_to_their_upper_eight(colour, channels):
    tones = np.random.default_rng(0).integers(0, 65_536, (9, 7, channels), dtype=np.uint16)
    data = png(tones.astype(">u2").view(np.uint8).reshape(9, -1), 16, colour)
    colours = np.broadcast_to(tones[:, :, :3] if channels > 2 else tones[:, :, :1], (9, 7, 3)) >> 8
    alpha = tones[:, :, -1:] / 65_535 if colour >= 4 else 1.0
    expected = alpha * colours + (1 - alpha) * 255
    assert abs(decode(data, MAX_PIXELS) - expected).max() <= (1.5 if colour >= 4 else 0)


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_few_bits_a_pixel_equal_pillow(depth):
    rows = np.random.default_rng(depth).integers(0, 256, (5, depth), dtype=np.uint8)  # 8 pixels a row
    palette = chunk(b"PLTE", np.random.default_rng(1).integers(0, 256, 3 * 2**depth, dtype=np.uint8).tobytes())
    alpha = chunk(b"tRNS", np.random.default_rng(2).integers(0, 256, 2**depth, dtype=np.uint8).tobytes())
    for data in (png(rows, depth, 0), png(rows, depth, 3, palette)):
        assert picture_size(data) == (5, 8, "PNG")
        np.testing.assert_array_equal(decode(data, MAX_PIXELS), with_pillow(data))
    data = png(rows, depth, 3, palette, alpha)
    clear = Image.open(io.BytesIO(data)).convert("RGBA")
    white = Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear)
    np.testing.assert_array_equal(decode(data, MAX_PIXELS), np.array(white.convert("RGB")))


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_the_grey_that_is_clear_lies_on_white(depth):
    """The tRNS chunk of a grey PNG names a value in the file's own bits (PNG specification, 11.3.2.1)."""
    values = np.arange(16).reshape(2, 8) % 2 ** min(depth, 4)
    key = int(values[1, 3])
    if depth == 16:
        rows, stored_key, shown = (values * 4369).astype(">u2").view(np.uint8), key * 4369, values * 17
    else:
        bits = values[:, :, None] >> np.arange(depth)[::-1] & 1
        rows, stored_key, shown = np.packbits(bits.reshape(2, -1), axis=1), key, values * (255 // (2**depth - 1))
    data = png(rows, depth, 0, chunk(b"tRNS", struct.pack(">H", stored_key)))
    expected = np.where(values == key, 255, shown)
    np.testing.assert_array_equal(decode(data, MAX_PIXELS), expected[:, :, None].repeat(3, 2))


@pytest.mark.parametrize("depth", [8, 16])
def test_the_colour_that_is_clear_lies_on_white(depth):
    colours = np.random.default_rng(0).integers(0, 256, (6, 5, 3))
    key = colours[2, 3]
    expected = np.where((colours == key).all(axis=2, keepdims=True), 255, colours)
    stored = (colours * 257).astype(">u2").view(np.uint8) if depth == 16 else colours.astype(np.uint8)
    clear = struct.pack(">HHH", *(key * 257 if depth == 16 else key).tolist())
    data = png(stored.reshape(6, -1), depth, 2, chunk(b"tRNS", clear))
    np.testing.assert_array_equal(decode(data, MAX_PIXELS), expected)


@pytest.mark.parametrize("options", [{"format": "PNG"}, {"format": "WEBP", "lossless": True}])
def test_the_first_frame_of_an_animation_is_taken(options):
    frames = [image(seed=seed) for seed in range(3)]
    data = encode(frames[0], **options, save_all=True, append_images=frames[1:])
    assert Image.open(io.BytesIO(data)).n_frames == 3
    np.testing.assert_array_equal(decode(data, MAX_PIXELS), np.array(frames[0]))


def test_an_interlaced_png_equals_pillow():
    data = interlaced_png(np.array(photo(13, 11)))
    np.testing.assert_array_equal(decode(data, MAX_PIXELS), np.array(photo(13, 11)))
    np.testing.assert_array_equal(decode(data, MAX_PIXELS), with_pillow(data))
