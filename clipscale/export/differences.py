"""How far transformers' own processor is from open_clip's transform and tokenizer, over many pictures and captions.

    measure(processor, 224, 77, towers.preprocess)
    # 'over 1,000 pictures, 712 have values that differ by a level (of 256) or more, 40 by more than 3, up to 83. ...'

The pictures are drawn, of many sizes and aspects, a fifth of them grey, with a palette or transparent; a half of the
captions holds what the web does to text.
"""

from __future__ import annotations

import random

import numpy as np
import open_clip
import torch
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image
from torch import Tensor
from transformers import CLIPProcessor

from clipscale.config import Preprocess

SAMPLES = 1000  # pictures, and captions
_WORDS = "a photo of the large red dog, and its small boat on 2 old stairs; isn't it? (BLUE-ish) No. 17"
_ODD = (
    *(
        "&amp;",
        "&lt;b&gt;",
        "&#39;s",
        "cafÃ©",
        "â€œquotedâ€\u009d",
        "ﬁne",
        "İstanbul",
        "e\u0301te\u0301",
        "naïve",
        "日本語",
    ),
    *("😀", "½", "\u00a0", "\t", "\n", "\u200b", "<end_of_text>", "<|endoftext|>", "№5", "ﾊﾝｶｸ", "…", "O’Neil"),
)


def measure(processor: CLIPProcessor, side: int, context_length: int, preprocess: Preprocess) -> str:
    """What differs, in a sentence."""
    pictures, captions = _pictures(), _captions()
    exact = open_clip.image_transform(side, is_train=False, mean=preprocess.mean, std=preprocess.std)
    scale = 255 * torch.tensor(preprocess.std)[:, None, None]
    levels = []
    for picture in pictures:
        theirs = processor.image_processor(picture, return_tensors="pt")["pixel_values"][0]
        levels.append(round(((theirs - exact(picture)) * scale).abs().max().item()))
    tokenizer, alike = SimpleTokenizer(context_length=context_length), []
    for caption in captions:
        ids = processor.tokenizer(caption, truncation=True, max_length=context_length)["input_ids"]
        alike.append(ids == _used(tokenizer([caption])[0], tokenizer.eot_token_id))
    plain, odd = alike[::2], alike[1::2]
    return (
        f"over {len(levels):,} pictures, {sum(level > 0 for level in levels):,} have values that differ by a level (of "
        f"256) or more, {sum(level > 3 for level in levels):,} by more than 3, up to {max(levels)}. Of {len(plain):,} "
        f"plain captions {plain.count(False):,} give other ids, of {len(odd):,} with odd characters "
        f"{odd.count(False):,}."
    )


def _used(ids: Tensor, end: int) -> list[int]:
    """Without the padding behind the end."""
    found = ids.tolist()
    return found[: found.index(end) + 1]


def _pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    pictures = []
    for number in range(SAMPLES):
        width, height = (int(each) for each in rng.integers(40, 320, 2))
        coarse = rng.integers(0, 256, (max(2, height // 8), max(2, width // 8), 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        pictures.append(picture.convert(("L", "P", "RGBA")[number % 3]) if number % 5 == 0 else picture)
    return pictures


def _captions() -> list[str]:
    draw = random.Random(0)
    captions = []
    for number in range(SAMPLES):
        words = draw.choices(_WORDS.split(), k=draw.randint(1, 20))
        if number % 2:
            words.insert(draw.randrange(len(words) + 1), draw.choice(_ODD))
        captions.append(" ".join(words))
    return captions
