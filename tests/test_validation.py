"""clipscale/eval/validation.py against a computation of its own."""

from __future__ import annotations

import io

import numpy as np
import open_clip
import pytest
import torch
import webdataset
from PIL import Image
from shards import picture, write_pairs, write_shard
from spawn import run_ranks
from tiny import MODEL

from clipscale.config import Loss, Validation
from clipscale.config.data import Data, SourceSettings
from clipscale.data.pixels.decode import Decoding
from clipscale.data.source import open_source
from clipscale.data.tokenize import build_tokenizer
from clipscale.dist import World
from clipscale.errors import UserError
from clipscale.eval.validation import ValidationResult, evaluate_validation
from clipscale.eval.view import View
from clipscale.towers import build_towers

BATCH = 6


def evaluate(rank: int, size: int, urls: str, samples: int) -> ValidationResult:
    return evaluate_validation(
        build_towers(MODEL, seed=1),
        open_source("validation", SourceSettings(urls), Data(), need="pairs"),
        build_tokenizer(None, 8),
        World(rank, size, rank, torch.device("cpu")),
        Validation(batch=BATCH, samples=samples),
        Loss(tile=4),
        chunk=4,
        view=View(16, Decoding(max_pixels=10_000)),
        threads=1,
    )


@pytest.fixture(scope="module")
def urls(tmp_path_factory) -> str:
    return write_pairs(tmp_path_factory.mktemp("data"), 2, 10, size=16)


def reference(urls: str, batches: int) -> tuple[float, float]:
    """(loss, image accuracy) with webdataset's reader, open_clip's model and its ClipLoss."""
    towers = build_towers(MODEL, seed=1)
    model = towers.model.eval()
    tokenizer = open_clip.SimpleTokenizer(context_length=8)
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    losses, hits = [], []
    for k in range(batches):
        part = samples[k * BATCH : (k + 1) * BATCH]
        pixels = np.stack([np.asarray(Image.open(io.BytesIO(sample["jpg"])).convert("RGB")) for sample in part])
        mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
        images = (torch.from_numpy(pixels / 255 - np.array(mean)) / torch.tensor(std)).permute(0, 3, 1, 2).float()
        with torch.no_grad():
            image = model.encode_image(images, normalize=True)
            text = model.encode_text(tokenizer([sample["txt"].decode() for sample in part]), normalize=True)
            losses.append(open_clip.ClipLoss()(image, text, model.logit_scale.exp()).item())
        hits.append(((image @ text.T).argmax(1) == torch.arange(BATCH)).float().mean().item())
    return float(np.mean(losses)), float(np.mean(hits))


def test_it_is_open_clips_loss_over_whole_batches(urls):
    found = evaluate(0, 1, urls, samples=20)
    loss, accuracy = reference(urls, batches=3)  # the last two pairs do not fill a batch
    assert found.pairs == 18
    assert found.loss == pytest.approx(loss, rel=1e-5)
    assert found.image_accuracy == pytest.approx(accuracy, abs=1e-6)


def test_at_most_so_many_samples(urls):
    assert evaluate(0, 1, urls, samples=13).pairs == 12
    assert evaluate(0, 1, urls, samples=4).pairs == 4  # the only batch may be smaller


def test_pictures_that_cannot_be_decoded_are_left_out_and_counted(tmp_path, urls):
    urls = write_pairs(tmp_path, 2, 10, size=16, broken={*range(6), 13})
    found = evaluate(0, 1, urls, samples=20)  # nothing of the first batch is left, five pairs of the third
    assert (found.pairs, found.bad) == (11, 7)
    whole = evaluate(0, 1, write_pairs(tmp_path / "whole", 2, 10, size=16), samples=20)
    assert found.loss == pytest.approx(whole.loss, rel=0.2)  # no batch without a pair drags the mean to zero
    with pytest.raises(UserError, match="none of the 18 pictures of 'validation' can be decoded"):
        evaluate(0, 1, write_pairs(tmp_path / "none", 2, 10, size=16, broken=set(range(20))), samples=20)


def test_captions_that_repeat_another_of_their_batch_are_counted(tmp_path):
    """Four of the first six are one caption, two of the second, none of the third; on two ranks as well."""
    texts = [b"same"] * 4 + [b"x", b"y", b"a", b"a", *(b"number %d" % i for i in range(10))]
    samples = [(f"{i:02}", {"jpg": picture(i, 16, 16), "txt": text}) for i, text in enumerate(texts)]
    urls = str(write_shard(tmp_path / "a.tar", samples))
    assert evaluate(0, 1, urls, samples=18).repeated_captions == 4
    assert [found.repeated_captions for found in run_ranks(evaluate, 2, urls, 18)] == [4, 4]


def test_ranks_share_the_work_and_agree(urls):
    wanted = evaluate(0, 1, urls, samples=20)
    for found in run_ranks(evaluate, 2, urls, 20):
        assert found.pairs == wanted.pairs
        assert found.loss == pytest.approx(wanted.loss, rel=1e-6)
        assert found.image_accuracy == wanted.image_accuracy
