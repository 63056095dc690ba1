import random
import time
from concurrent.futures import ThreadPoolExecutor

import open_clip
import pytest
import torch

from clipscale.data import tokenize as tokenize_module
from clipscale.data.tokenize import build_tokenizer


@pytest.fixture(scope="module")
def reference():
    return open_clip.SimpleTokenizer(context_length=77)


CAPTIONS = [
    "",
    "a photo of a cat",
    "Ünïcode: 猫が好き 😂😂",
    "a &amp; b <end_of_text> c",
    "words " * 200,
    "it's 1,000 x 2.5\n\tfine \0",
    "supercalifragilisticexpialidocious " * 30,
]


def test_equals_open_clip(reference):
    tokens = build_tokenizer(None, 77)(CAPTIONS)
    assert tokens.dtype == torch.int64
    assert tokens.shape == (len(CAPTIONS), 77)
    assert torch.equal(tokens, reference(CAPTIONS))
    assert torch.equal(build_tokenizer("ViT-B-32", 16)(CAPTIONS), reference(CAPTIONS, context_length=16))


def test_a_full_word_cache_changes_nothing(reference, monkeypatch):
    monkeypatch.setattr(tokenize_module, "_CACHED_WORDS", 5)
    tokenize = build_tokenizer(None, 77)
    for _ in range(2):
        assert torch.equal(tokenize(CAPTIONS), reference(CAPTIONS))
    cache = tokenize_module._WordCache()
    for i in range(50):
        cache[str(i)] = "x"
    assert len(cache) == 5


def test_threads_share_one_tokenizer(reference):
    tokenize = build_tokenizer(None, 77)
    words = [f"word{i} {'abc' * (i % 7)} {i}" for i in range(200)]
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(tokenize, [words] * 8):
            assert torch.equal(found, reference(words))


def test_a_hostile_caption_takes_no_minutes():
    caption = "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=60_000))
    start = time.process_time()
    build_tokenizer(None, 77)([caption])
    assert time.process_time() - start < 10  # 70 s if it were not cut
