import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from clipscale import counter
from clipscale.config.data import AugmentSettings
from clipscale.counter_torch import draw, uniform
from clipscale.data.pixels import augment
from clipscale.data.pixels.augment import Augment, gray, jitter, rotate_hue
from clipscale.towers.tower import Tower, normalise_pixels

ALL = AugmentSettings(flip=0.5, color_jitter=(0.4, 0.3, 0.5, 0.1), color_jitter_prob=0.8, grayscale=0.3)
NAMES = ("brightness", "contrast", "saturation", "hue")
ADJUST = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)
TORCHVISIONS_HUE = 1e-3  # levels: it works in float32 inside, whatever comes


def images(number: int, side: int = 9, seed: int = 0) -> torch.Tensor:
    out = torch.randint(0, 256, (number, 3, side, side), dtype=torch.uint8, generator=torch.manual_seed(seed))
    out[::3, 1] = out[::3, 0]  # some pixels with two equal channels, or three
    out[::6, 2] = out[::6, 0]
    return out


# --- the draws --------------------------------------------------------------------------------------------------------


def test_a_picture_depends_on_seed_and_position_alone():
    pixels, positions = images(24), torch.arange(10**12, 10**12 + 24)
    whole = Augment(ALL, 3)(pixels, positions)
    for size in (1, 5, 24):
        parts = [Augment(ALL, 3)(pixels[i : i + size], positions[i : i + size]) for i in range(0, 24, size)]
        torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=0)
    order = torch.randperm(24, generator=torch.manual_seed(0))
    torch.testing.assert_close(Augment(ALL, 3)(pixels[order], positions[order]), whole[order], rtol=0, atol=0)
    assert not torch.equal(Augment(ALL, 4)(pixels, positions), whole)
    assert not torch.equal(Augment(ALL, 3)(pixels, positions + 1), whole)


def test_more_pictures_than_are_taken_at_once(monkeypatch):
    pixels, positions = images(23), torch.arange(23)
    whole = Augment(ALL, 0)(pixels, positions)
    monkeypatch.setattr(augment, "AT_ONCE", 5)
    torch.testing.assert_close(Augment(ALL, 0)(pixels, positions), whole, rtol=0, atol=0)


# --- each operation against torchvision -------------------------------------------------------------------------------


def test_gray_is_torchvisions():
    x = images(12).double()
    torch.testing.assert_close(gray(x), 255 * tv.rgb_to_grayscale(x / 255), rtol=0, atol=1e-9)


@pytest.mark.parametrize("shift", [-0.5, -0.31, -0.05, 0.0, 0.02, 0.25, 0.5])
def test_hue_is_torchvisions(shift):
    x = images(60, seed=int(100 * abs(shift))).double()
    expected = 255 * tv.adjust_hue(x / 255, shift)
    torch.testing.assert_close(
        rotate_hue(x, torch.full((60,), shift).double()), expected, rtol=0, atol=TORCHVISIONS_HUE
    )
    torch.testing.assert_close(rotate_hue(x.float(), torch.full((60,), shift)).double(), expected, rtol=0, atol=5e-3)


@pytest.mark.parametrize("operation", range(3))
@pytest.mark.parametrize("factor", [0.0, 0.4, 1.0, 1.7])
def test_each_factor_is_torchvisions(operation, factor):
    x = images(12, seed=operation).double()
    factors = torch.ones(12, 3).double()
    factors[:, operation] = factor
    out = jitter(x, factors, torch.zeros(12), torch.rand(12, 4))
    expected = torch.stack([255 * ADJUST[operation](picture / 255, factor) for picture in x])
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-9)


def test_every_order_of_the_four_is_torchvisions():
    orders = list(itertools.permutations(range(4)))
    x = images(len(orders), side=16, seed=5).double()
    chance = torch.Generator().manual_seed(1)
    factors = 0.5 + torch.rand(len(orders), 3, generator=chance, dtype=torch.float64)
    shift = torch.rand(len(orders), generator=chance, dtype=torch.float64) - 0.5
    numbers = torch.tensor(orders).argsort(dim=1) / 4  # operation -> its turn
    out = jitter(x, factors, shift, numbers)
    for picture, order, mine, row, turn in zip(x, orders, out, factors, shift, strict=True):
        expected = picture / 255
        for operation in order:
            expected = ADJUST[operation](expected, (*row.tolist(), turn.item())[operation])
        torch.testing.assert_close(mine, 255 * expected, rtol=0, atol=TORCHVISIONS_HUE)
    other_order = jitter(x, factors, shift, numbers.flip(0))
    assert (out - other_order).abs().amax((1, 2, 3)).gt(0.1).sum() >= 20  # all but the grey ones see a difference


def test_one_picture_through_the_whole_module_is_torchvisions():
    """The draws, read from counter.py, put through torchvision."""
    pixels, positions, seed = images(40, side=12, seed=2), np.arange(1000, 1040), 9
    out = Augment(ALL, seed)(pixels, torch.from_numpy(positions))
    keys = counter.draw(counter.fold(seed, "augment"), positions)
    flip, chosen, colourless, *strengths = counter.uniform(keys[:, None], np.arange(11)[None]).T
    for i, picture in enumerate(pixels):
        expected = picture.float() / 255
        if flip[i] < ALL.flip:
            expected = tv.horizontal_flip(expected)
        if chosen[i] < ALL.color_jitter_prob:
            values = [1 - s + 2 * s * u[i] for s, u in zip(ALL.color_jitter[:3], strengths[:3], strict=True)]
            values.append(ALL.color_jitter[3] * (2 * strengths[3][i] - 1))
            for operation in np.argsort([u[i] for u in strengths[4:]]):
                expected = ADJUST[operation](expected, values[operation])
        if colourless[i] < ALL.grayscale:
            expected = tv.rgb_to_grayscale(expected, 3)
        torch.testing.assert_close(out[i], 255 * expected, rtol=0, atol=5e-3)


# --- the draws are spread as torchvision's and open_clip's ------------------------------------------------------------


def test_shares_are_as_asked():
    pixels, positions = images(4000, side=4, seed=3), torch.arange(4000)
    pixels[:, 0, 0, 0], pixels[:, 1, 0, 0] = 255, 0
    flipped = Augment(AugmentSettings(flip=0.3), 0)(pixels, positions)
    assert flipped.dtype == torch.uint8
    moved = (flipped != pixels).flatten(1).any(1)
    assert torch.equal(flipped[moved], pixels[moved].flip(3))
    assert moved.float().mean().item() == pytest.approx(0.3, abs=0.03)
    colourless = Augment(AugmentSettings(grayscale=0.2), 0)(pixels, positions)
    assert (colourless[:, 0] == colourless[:, 1]).flatten(1).all(1).float().mean().item() == pytest.approx(
        0.2, abs=0.03
    )
    jittered = Augment(AugmentSettings(color_jitter=(0.4, 0, 0, 0), color_jitter_prob=0.6), 0)(pixels, positions)
    touched = (jittered != pixels).flatten(1).any(1)
    assert touched.float().mean().item() == pytest.approx(0.6, abs=0.03)


@pytest.mark.parametrize("operation", range(4))
@pytest.mark.parametrize("strength", [0.1, 0.4, 1.5])
def test_strengths_are_spread_as_torchvisions(operation, strength):
    """The same settings, our draws against those of torchvision's ColorJitter."""
    strength = strength / 3 if operation == 3 else strength
    strengths = [0.0] * 4
    strengths[operation] = strength
    ours = Augment(AugmentSettings(color_jitter=tuple(strengths), color_jitter_prob=1.0), 0)
    numbers = torch.arange(augment._DRAWS)
    factors, shift = ours._strengths(uniform(draw(7, torch.arange(5000))[:, None], numbers[None]))
    ours = shift if operation == 3 else factors[:, operation]
    theirs = v2.ColorJitter(**{NAMES[operation]: strength})
    theirs = torch.tensor([theirs.make_params([])[f"{NAMES[operation]}_factor"] for _ in range(5000)])
    levels = torch.tensor([0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0])
    torch.testing.assert_close(
        ours.quantile(levels), theirs.quantile(levels), rtol=0, atol=0.04 * float(theirs.max() - theirs.min())
    )


# --- costs ------------------------------------------------------------------------------------------------------------


def test_all_off_gives_the_pixels_untouched():
    pixels = images(3)
    for off in (
        AugmentSettings(),
        AugmentSettings(color_jitter=(0.4, 0.4, 0.4, 0.1), color_jitter_prob=0.0),
    ):
        assert Augment(off, 0)(pixels, torch.arange(3)) is pixels


def test_pictures_that_no_draw_hits_keep_every_bit():
    pixels = images(50)
    out = Augment(AugmentSettings(color_jitter=(0.4, 0.4, 0.4, 0.1), color_jitter_prob=0.5), 1)(
        pixels, torch.arange(50)
    )
    same = (out == pixels).flatten(1).all(1)
    assert 10 < same.sum() < 40


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_asked_for(dtype):
    pixels, positions = images(8), torch.arange(8)
    out = Augment(ALL, 0)(pixels, positions, dtype)
    assert out.dtype == dtype
    torch.testing.assert_close(out, Augment(ALL, 0)(pixels, positions).to(dtype), rtol=0, atol=0)
    assert out.min() >= 0
    assert out.max() <= 255


def test_nothing_asks_for_a_value_on_the_host():
    """Tensors without values: whatever needs one of them (item, a mask as an index, nonzero) raises."""
    out = Augment(ALL, 0)(images(200).to("meta"), torch.arange(200, device="meta"))
    assert out.shape == (200, 3, 9, 9)
    with pytest.raises(RuntimeError, match="meta"):
        out[out > 0].sum().item()


@pytest.mark.gpu
def test_on_a_gpu_nothing_waits_and_the_draws_are_the_same():
    pixels, positions = images(200, side=32), torch.arange(200)
    device_pixels, device_positions = pixels.cuda(), positions.cuda()
    module = Augment(ALL, 0)
    module(device_pixels, device_positions)
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = module(device_pixels, device_positions)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(out.cpu(), module(pixels, positions), rtol=0, atol=5e-3)


# --- the tower's pixel preparation ------------------------------------------------------------------------------------

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normalisation_is_torchvisions(dtype):
    pixels = images(5)
    expected = tv.normalize(pixels.to(dtype) / 255, MEAN, STD)
    for given_as in (torch.uint8, torch.float32, torch.bfloat16):  # bf16 holds 0..255 exactly
        out = normalise_pixels(MEAN, STD)(pixels.to(given_as), dtype)
        assert out.dtype == dtype
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-12)


def test_under_autocast_the_tower_is_fed_in_its_dtype_and_says_the_same():
    seen = []
    encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten())
    encoder[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].dtype))
    prepare = normalise_pixels(MEAN, STD)
    pixels = images(4)
    plain = Tower("image", encoder, lambda x, dtype: prepare(x, torch.float32), torch.bfloat16)(pixels)
    ours = Tower("image", encoder, prepare, torch.bfloat16)(pixels)
    assert seen == [torch.float32, torch.bfloat16]
    torch.testing.assert_close(ours, plain, rtol=0, atol=0)


def test_augmented_pixels_go_into_the_tower():
    encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten())
    tower = Tower("image", encoder, normalise_pixels(MEAN, STD))
    pixels, positions = images(4), torch.arange(4)
    whole = tower(pixels)
    torch.testing.assert_close(tower(Augment(AugmentSettings(), 0)(pixels, positions)), whole, rtol=0, atol=0)
    untouched = Augment(AugmentSettings(grayscale=1e-12), 0)(pixels, positions)
    assert untouched.dtype == torch.float32
    torch.testing.assert_close(tower(untouched), whole, rtol=0, atol=1e-6)
