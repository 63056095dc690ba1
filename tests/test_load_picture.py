"""From a picture's bytes to its crop, in one call: against Pillow, against the parts, at smaller scales."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import MAX_PIXELS, draws, encode, photo
from PIL import Image
from shards import picture
from torchvision.transforms import RandomResizedCrop

from clipscale.config.data import Data
from clipscale.data.bad import BadSample
from clipscale.data.pixels.decode import (
    DRAWS_PER_SAMPLE,
    FOUR_CHANNEL_PIXELS,
    Decoding,
    center_square,
    crop_and_resize,
    decode,
    load_picture,
    random_crop,
)

# --- crop and resize --------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
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


@pytest.mark.parametrize("ratio", [(0.75, 4 / 3), (1.0, 3.0)])
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.9, 1.0)])
@pytest.mark.parametrize(("height", "width"), [(256, 340), (500, 200)])
def test_crops_are_spread_as_torchvisions(height, width, scale, ratio):
    ours = np.array([random_crop(height, width, row, scale, ratio) for row in draws(3000)])
    torch.manual_seed(0)
    pixels = torch.empty(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(pixels, list(scale), list(ratio)) for _ in range(3000)])
    for mine, other, length in zip(ours.T, theirs.T, (height, width, height, width), strict=True):
        levels = [0.05, 0.25, 0.5, 0.75, 0.95]
        np.testing.assert_allclose(np.quantile(mine, levels), np.quantile(other, levels), atol=0.04 * length)


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("side", [32, 224])
@pytest.mark.parametrize("box", [(0, 0, 200, 300), (13, 40, 150, 160), (3, 5, 32, 32), (0, 0, 1, 300), (10, 10, 1, 1)])
def test_resize_equals_pillow(box, side, channels):
    pixels = np.array(photo(200, 300, seed=4, noise=60))  # without antialiasing the noise would stay
    out = crop_and_resize(np.dstack([pixels, pixels])[:, :, :channels], box, side)
    assert out.shape == (3, side, side)
    assert out.dtype == torch.uint8
    top, left, height, width = box
    crop = Image.fromarray(pixels[top : top + height, left : left + width])
    reference = np.array(crop.resize((side, side), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert abs(out.numpy().astype(float) - reference).mean() <= 0.1


# --- bytes to crop ----------------------------------------------------------------------------------------------------

FILES = {
    "JPEG": lambda photo: encode(photo, "JPEG"),
    "JPEG, progressive": lambda photo: encode(photo, "JPEG", progressive=True),
    "JPEG, grey": lambda photo: encode(photo.convert("L"), "JPEG"),
    "JPEG, CMYK": lambda photo: encode(photo.convert("CMYK"), "JPEG"),
    "PNG": lambda photo: encode(photo, "PNG"),
    "PNG, palette": lambda photo: encode(photo.quantize(64), "PNG"),
    "PNG, 1 bit": lambda photo: encode(photo.convert("1"), "PNG"),
    "PNG, opaque": lambda photo: encode(photo.convert("RGBA"), "PNG"),
    "WebP": lambda photo: encode(photo, "WEBP"),
    "WebP, lossless": lambda photo: encode(photo, "WEBP", lossless=True),
}


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize(("height", "width"), [(150, 210), (700, 560)])
def test_every_kind_of_file_agrees_with_pillow_within_a_tenth_of_a_level(kind, height, width):
    assert (height * width > FOUR_CHANNEL_PIXELS) == (height == 700)  # both ways to decode
    data = FILES[kind](photo(height, width))
    for number, side in enumerate((96, 224)):
        how = Decoding(MAX_PIXELS, (0.5, 1.0))
        out = load_picture(data, draws(2)[number], how, side)
        top, left, h, w = box = random_crop(height, width, draws(2)[number], how.crop_scale, how.crop_ratio)
        crop = Image.open(io.BytesIO(data)).convert("RGB").crop((left, top, left + w, top + h))
        reference = np.array(crop.resize((side, side), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
        assert abs(out.numpy().astype(float) - reference).mean() <= 0.1
        torch.testing.assert_close(out, crop_and_resize(decode(data, MAX_PIXELS), box, side), rtol=0, atol=0)


def test_a_slot_is_written_to_and_nothing_beside_it():
    slots = torch.full((3, 3, 40, 40), 7, dtype=torch.uint8)
    for format in ("JPEG", "PNG"):
        data = picture(1, 90, 70, format)
        out = load_picture(data, draws(1)[0], Decoding(MAX_PIXELS), 40, slots[1])
        assert out.data_ptr() == slots[1].data_ptr()
        torch.testing.assert_close(slots[1], load_picture(data, draws(1)[0], Decoding(MAX_PIXELS), 40))
        assert slots[0].eq(7).all()
        assert slots[2].eq(7).all()


def test_a_picture_of_the_size_wanted_is_not_resampled():
    for format in ("PNG", "JPEG"):
        data = encode(photo(48, 48), format)
        out = load_picture(data, None, Decoding(MAX_PIXELS), 48)
        np.testing.assert_array_equal(out.permute(1, 2, 0).numpy(), decode(data, MAX_PIXELS))


def test_without_draws_the_middle_is_taken():
    data = encode(photo(60, 90), "JPEG")
    expected = crop_and_resize(decode(data, MAX_PIXELS), center_square(60, 90), 32)
    torch.testing.assert_close(load_picture(data, None, Decoding(MAX_PIXELS), 32), expected, rtol=0, atol=0)


def test_a_broken_picture_is_refused_and_its_slot_left_alone():
    slot = torch.full((3, 16, 16), 7, dtype=torch.uint8)
    for data, cap, cause in (
        (picture(0, 50, 50)[:300], MAX_PIXELS, "broken picture"),
        (picture(0, 50, 50), 2000, "too many pixels"),
    ):
        with pytest.raises(BadSample, match=cause):
            load_picture(data, draws(1)[0], Decoding(cap), 16, slot)
    assert slot.eq(7).all()


def test_settings_come_from_the_configuration():
    data = Data(max_pixels=5, crop_scale=(0.2, 0.3), crop_ratio=(1.0, 2.0), exif="apply", scaled_decode=True)
    assert Decoding.of(data) == Decoding(5, (0.2, 0.3), (1.0, 2.0), "apply", True)
    assert Decoding.of(Data()) == Decoding(Data().max_pixels)


# --- decoded at 1/2, 1/4, 1/8 -----------------------------------------------------------------------------------------


def drafted(data: bytes, reduction: int) -> np.ndarray:
    """Pillow's own decode at 1/reduction."""
    with Image.open(io.BytesIO(data)) as draft:
        draft.draft(None, (draft.width // reduction, draft.height // reduction))
        return np.array(draft)


@pytest.mark.parametrize(("height", "width"), [(512, 768), (513, 771), (601, 450), (64, 2000)])
def test_a_picture_is_decoded_as_small_as_will_do(height, width):
    data = encode(photo(height, width, noise=10), "JPEG")
    for want in ((height, width), (height // 2 + 1, 1), (height // 2, width // 2), (100, 100), (60, 60), (1, 1)):
        fits = max(k for k in (1, 2, 4, 8) if k == 1 or (k * want[0] <= height and k * want[1] <= width))
        pixels = decode(data, MAX_PIXELS, at_least=want)
        assert pixels.shape == (-(-height // fits), -(-width // fits), 3)
        np.testing.assert_array_equal(pixels, drafted(data, fits))


@pytest.mark.parametrize("size", range(1, 24))
def test_a_tiny_picture_is_never_decoded_at_another_eighth(size):
    """Where 3/8 rounds to as many pixels as 1/2 does, it must not be taken for it."""
    data = encode(photo(size, size), "JPEG", subsampling=0)
    for want in range(1, size + 1):
        fits = max((k for k in (2, 4, 8) if size >= 8 and k * want <= size), default=1)
        pixels = decode(data, MAX_PIXELS, at_least=(want, want))
        assert pixels.shape == (-(-size // fits), -(-size // fits), 3)
        if size % 8 == 0:
            np.testing.assert_array_equal(pixels, drafted(data, fits))


def test_other_formats_have_one_size():
    for format in ("PNG", "WEBP"):
        assert decode(picture(0, 64, 64, format), MAX_PIXELS, at_least=(8, 8)).shape == (64, 64, 3)


@pytest.mark.parametrize(
    ("height", "width", "side", "reduction"),
    [
        (447, 600, 224, 1),
        (448, 448, 224, 2),
        (895, 900, 224, 2),
        (896, 1000, 224, 4),
        (1800, 1792, 224, 8),
    ],
)
def test_a_crop_twice_the_side_is_decoded_smaller(height, width, side, reduction):
    """Within 1.5 levels on average of the picture decoded in full, with noise of +-10 levels a pixel."""
    data = encode(photo(height, width, noise=10), "JPEG", quality=95)
    full = load_picture(data, None, Decoding(MAX_PIXELS), side).float()
    small = load_picture(data, None, Decoding(MAX_PIXELS, scaled=True), side).float()
    assert ((full - small).abs().mean() == 0) == (reduction == 1)
    assert (full - small).abs().mean() <= 1.5
    pixels = drafted(data, reduction)
    assert min(pixels.shape[:2]) >= side
    middle = crop_and_resize(pixels, center_square(*pixels.shape[:2]), side).float()
    assert (middle - small).abs().mean() <= 1.0


@settings(max_examples=60, deadline=None)
@given(st.integers(20, 200), st.integers(20, 200), st.integers(4, 32), st.integers(0, 50))
def test_a_scaled_crop_shows_the_same_part(height, width, side, row):
    """A ramp in each direction tells where a pixel came from: within one pixel of the smaller picture."""
    down = np.broadcast_to(np.linspace(20, 235, height)[:, None], (height, width))
    right = np.broadcast_to(np.linspace(20, 235, width)[None], (height, width))
    ramps = np.stack([down, right, np.full((height, width), 128.0)], axis=2).round().astype(np.uint8)
    data = encode(Image.fromarray(ramps), "JPEG", quality=98, keep_rgb=True, subsampling=0)
    scale = (0.3, 1.0)
    full = load_picture(data, draws(51)[row], Decoding(MAX_PIXELS, scale), side).float()
    small = load_picture(data, draws(51)[row], Decoding(MAX_PIXELS, scale, scaled=True), side).float()
    h, w = random_crop(height, width, draws(51)[row], scale, (0.75, 4 / 3))[2:]
    reduction = max(k for k in (1, 2, 4, 8) if k == 1 or k * side <= min(h, w))
    for channel, length in ((0, height), (1, width)):
        assert (full[channel] - small[channel]).abs().mean() <= 2 + reduction * 215 / length
