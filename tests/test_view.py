"""clipscale/eval/view.py against open_clip's own transform, number for number."""

from __future__ import annotations

import dataclasses
import io
import itertools
import random
import warnings
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from pictures import MAX_PIXELS, encode, exif, image, jpeg_header, photo, png_header
from PIL import Image
from shards import picture

from clipscale.config import Preprocess
from clipscale.config.load import load_config
from clipscale.data.bad import BadSample
from clipscale.data.pixels.decode import Decoding, load_picture
from clipscale.errors import UserError
from clipscale.eval.view import View
from clipscale.towers import build_towers

INSTALLED = Path(np.__file__).parents[1]  # photographs that come with other packages
DEFAULT = Preprocess()
PHOTOS = [
    INSTALLED / "sklearn/datasets/images/china.jpg",
    INSTALLED / "sklearn/datasets/images/flower.jpg",
    INSTALLED / "matplotlib/mpl-data/sample_data/grace_hopper.jpg",
]


def theirs(data: bytes, side: int, preprocess: Preprocess = DEFAULT) -> torch.Tensor:
    """ImageFolder's loader and open_clip's transform, before mean and std: uint8 [3, S, S]."""
    steps = image_transform_v2(PreprocessCfg(size=side, **dataclasses.asdict(preprocess)), is_train=False)
    found = Image.open(io.BytesIO(data)).convert("RGB")
    for step in steps.transforms[:-2]:  # the last two: ToTensor, which divides by 255, and Normalize
        found = step(found)
    return torch.from_numpy(np.array(found).transpose(2, 0, 1))


def ours(data: bytes, side: int, preprocess: Preprocess = DEFAULT) -> torch.Tensor:
    return View(side, Decoding(MAX_PIXELS), preprocess)(data)


def same(data: bytes, side: int, preprocess: Preprocess = DEFAULT) -> bool:
    found = ours(data, side, preprocess)
    assert found.dtype == torch.uint8
    assert found.is_contiguous()
    return torch.equal(found, theirs(data, side, preprocess))


def test_sizes_and_aspects():
    """240 drawn ones, odd and even, larger and smaller than S, some ten times as long as wide."""
    drawn, unequal = random.Random(3), []
    for number in range(240):
        short = drawn.randint(8, 120)
        long = min(400, int(short * drawn.choice([1, 1, 4 / 3, 1.5, drawn.uniform(1, 3), drawn.uniform(3, 10)])))
        height, width = (short, long) if number % 2 else (long, short)
        kind = ("JPEG", "PNG", "WEBP")[number % 3]
        if not same(encode(photo(height, width, seed=number), kind), side := drawn.choice([16, 32, 33, 64, 97])):
            unequal.append((height, width, kind, side))
    assert not unequal


def test_photographs_at_the_sides_that_models_have():
    whole = [Image.open(path).convert("RGB") for path in PHOTOS if path.exists()]
    drawn, seen = random.Random(5), 0
    for photograph, side in itertools.product(whole, (224, 256, 336)):
        assert same(encode(photograph, "JPEG", quality=90), side)
        for _ in range(3):
            width, height = (drawn.randint(60, size) for size in photograph.size)
            left, top = drawn.randint(0, photograph.width - width), drawn.randint(0, photograph.height - height)
            part = photograph.crop((left, top, left + width, top + height))
            assert same(encode(part, "JPEG", quality=drawn.randint(60, 100), subsampling=drawn.randint(0, 2)), side)
            seen += 1
    assert seen == 9 * len(whole)


def modes() -> dict[str, bytes]:
    """A file of each kind that pictures come in."""
    rgba, grey16 = image(45, 67, "RGBA"), np.arange(45 * 67, dtype=np.uint16).reshape(45, 67) * 21
    rgba.putalpha(Image.fromarray((np.arange(45 * 67) % 256).astype(np.uint8).reshape(45, 67)))
    palette = image(45, 67).quantize(17)
    files = {f"{mode} {kind}": encode(image(45, 67, mode), kind) for mode in ("RGB", "L") for kind in ("JPEG", "PNG")}
    files |= {"CMYK JPEG": encode(image(45, 67, "CMYK"), "JPEG"), "CMYK TIFF": encode(image(45, 67, "CMYK"), "TIFF")}
    files |= {f"RGBA {kind}": encode(rgba, kind) for kind in ("PNG", "WEBP", "TIFF")}
    files |= {"LA PNG": encode(rgba.convert("LA"), "PNG"), "1 PNG": encode(image(45, 67, "1"), "PNG")}
    files |= {"P PNG": encode(palette, "PNG"), "P with one clear": encode(palette, "PNG", transparency=3)}
    files["P with alphas"] = encode(palette, "PNG", transparency=bytes(range(0, 170, 10)))
    files["RGB with a clear colour"] = encode(image(45, 67), "PNG", transparency=(10, 20, 30))
    files["L with a clear grey"] = encode(image(45, 67, "L"), "PNG", transparency=100)
    files["I;16 PNG"] = encode(Image.fromarray(grey16), "PNG")
    files |= {f"RGB {kind}": encode(image(45, 67), kind) for kind in ("BMP", "TIFF", "PPM", "GIF")}
    files["lossless WEBP"] = encode(image(45, 67), "WEBP", lossless=True)
    files["progressive JPEG"] = encode(photo(45, 67), "JPEG", progressive=True)
    files["animated WEBP"] = encode(
        image(45, 67), "WEBP", save_all=True, append_images=[image(45, 67, seed=1)], duration=9
    )
    return files


@pytest.mark.parametrize("mode", resize_modes := ["shortest", "longest", "squash"])
def test_modes_are_converted_before_the_resize(mode):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow has something to say of alphas in a palette
        found = {name: ours(data, 32, Preprocess(resize_mode=mode)) for name, data in modes().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = {name: theirs(data, 32, Preprocess(resize_mode=mode)) for name, data in modes().items()}
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_nothing(orientation):
    data = encode(photo(40, 70), "JPEG", exif=exif(orientation))
    assert same(data, 32)
    assert torch.equal(ours(data, 32), ours(encode(photo(40, 70), "JPEG"), 32))
    turned = View(32, Decoding(MAX_PIXELS, exif="apply"))(data)  # a setting of training
    assert torch.equal(turned, ours(data, 32))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("mode", resize_modes)
def test_the_models_own_preprocessing(mode, interpolation):
    drawn = random.Random(9)
    preprocess = Preprocess(resize_mode=mode, interpolation=interpolation, fill_color=drawn.randint(1, 255))
    for number in range(40):
        height, width = drawn.randint(5, 90), drawn.randint(5, 90)
        assert same(encode(photo(height, width, number), "PNG"), drawn.choice([16, 31, 48]), preprocess)


def test_mean_and_std_are_those_of_the_model(tmp_path):
    """From the file's bytes to what the first product takes: open_clip's numbers, to float32's rounding."""
    mean, std = (0.5, 0.4, 0.3), (0.5, 0.6, 0.7)
    words = [f"model.preprocess.mean={list(mean)}", f"model.preprocess.std={list(std)}", "model.name=null"]
    words += ["model.vision={image_size: 16, patch_size: 8, width: 32, layers: 1, head_width: 16}"]
    config = load_config([*words, "model.text={context_length: 8, width: 32, heads: 2, layers: 1}"])
    towers, data = build_towers(config.model), picture(0, 30, 50)
    wanted = open_clip.image_transform(16, is_train=False, mean=mean, std=std)(Image.open(io.BytesIO(data)))
    found = towers.image.prepare(View.of(config, towers)(data)[None], torch.float32)[0]
    torch.testing.assert_close(found, wanted, rtol=0, atol=5e-7)


def test_training_pixels_are_there_for_the_asking():
    clear = encode(Image.new("RGBA", (40, 40), (0, 0, 0, 0)), "PNG")
    as_training = View(20, Decoding(MAX_PIXELS), pixels="training")
    assert torch.equal(as_training(clear), torch.full((3, 20, 20), 255, dtype=torch.uint8))
    assert not ours(clear, 20).any()
    data = picture(3, 60, 90)
    assert torch.equal(as_training(data), load_picture(data, None, Decoding(MAX_PIXELS), 20))


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (b"", "broken picture"),
        (b"no picture at all", "broken picture"),
        (picture(0, 40, 40)[:300], "broken picture"),
        (picture(0, 40, 40, "PNG")[:90], "broken picture"),
        (png_header(60_000, 100), "broken picture"),
        (png_header(30_000, 600), "too many pixels"),
        (png_header(60_000, 60_000), "too many pixels"),
        (jpeg_header(60_000, 60_000), "too many pixels"),
        (encode(photo(40, 40), "JPEG", progressive=True) + b"\xff\xda" * 101, "broken picture"),
        (encode(photo(2, 90), "PNG"), "broken picture"),  # nothing is left of its height when 90 become 16
    ],
)
def test_what_cannot_be_decoded_has_a_cause(data, cause):
    preprocess = Preprocess(resize_mode="longest" if data[:8] == b"\x89PNG\r\n\x1a\n" else "shortest")
    with pytest.raises(BadSample) as error:
        ours(data, 16, preprocess)
    assert error.value.cause == cause


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("model.preprocess.std=[0.5, 0, 0.5]", r"model\.preprocess\.std=\[0\.5, 0\.0, 0\.5\] must be above 0"),
        ("model.preprocess.fill_color=256", r"fill_color=256 must lie between 0 and 255"),
        ("model.preprocess.resize_mode=crop", "shortest.*longest.*squash"),
        ("eval.pixels=pillow", "open_clip.*training"),
    ],
)
def test_settings_that_cannot_be_are_told(word, said):
    with pytest.raises(UserError, match=said):
        load_config(["quickstart", word])
