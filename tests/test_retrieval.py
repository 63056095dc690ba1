"""clipscale/eval/retrieval.py against CLIP_benchmark's metrics and a computation of its own."""

from __future__ import annotations

import importlib
import io
import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from shards import picture, write_shard
from spawn import run_ranks
from tiny import MODEL, tiny_config

from clipscale.cli import main
from clipscale.config import Retrieval
from clipscale.config.data import Data, SourceSettings
from clipscale.config.load import load_config
from clipscale.data.pixels.decode import Decoding
from clipscale.data.source import open_source
from clipscale.data.tokenize import build_tokenizer
from clipscale.dist import World
from clipscale.errors import UserError
from clipscale.eval import retrieval
from clipscale.eval.retrieval import RetrievalResult, evaluate_retrieval, first_places
from clipscale.eval.view import View
from clipscale.towers import Towers, build_towers
from clipscale.training.trainer import train

WORDS = ["red", "blue", "green", "circle", "star", "ring", "heart", "moon", "cross", "on sand", "on grass"]
CAPTIONS = [
    [f"{WORDS[(i * 7 + j * 3) % 11]} {WORDS[(i + j * 5) % 11]} {i}" for j in range(1 + i % 5)] for i in range(23)
]


def towers_of(seed: int = 1) -> Towers:
    """Weights with some spread, so that neighbours differ."""
    towers = build_towers(MODEL, seed=seed)
    with torch.no_grad():
        for parameter in towers.encoder_parameters():
            parameter.mul_(3)
    return towers


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """23 pictures with one to five captions: as CLIP_benchmark's wds layout has them, and as a list in JSON."""
    root = tmp_path_factory.mktemp("retrieval")
    for name, note in (
        ("txt", lambda texts: {"txt": ("\n".join(texts) + "\n").encode()}),
        ("json", lambda texts: {"json": json.dumps({"captions": texts}).encode()}),
    ):
        samples = [(f"{i:03}", {"jpg": picture(i, 16, 20), **note(texts)}) for i, texts in enumerate(CAPTIONS)]
        write_shard(root / f"{name}-0.tar", samples[:9])
        write_shard(root / f"{name}-1.tar", samples[9:])
    return root


def evaluate(rank: int, size: int, urls: str, caption: str = "txt", batch: int = 4) -> RetrievalResult:
    settings = SourceSettings(urls, caption=caption)
    return evaluate_retrieval(
        towers_of(),
        open_source("retrieval", settings, Data(), need="pairs"),
        build_tokenizer(None, 8),
        World(rank, size, rank, torch.device("cpu")),
        batch=batch,
        text_chunk=5,
        view=View(16, Decoding(max_pixels=10_000)),
        threads=1,
    )


class Pictures(torch.utils.data.Dataset):
    """(picture as open_clip prepares it, its captions)."""

    def __len__(self) -> int:
        return len(CAPTIONS)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, list[str]]:
        prepare = open_clip.image_transform(16, is_train=False)
        return prepare(Image.open(io.BytesIO(picture(i, 16, 20)))), CAPTIONS[i]


def embedded() -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Pictures, captions and the caption's picture, by open_clip's encoders."""
    model = towers_of().model.eval()
    with torch.no_grad():
        images = model.encode_image(torch.stack([Pictures()[i][0] for i in range(23)]), normalize=True)
        lines = [text for texts in CAPTIONS for text in texts]
        texts = model.encode_text(open_clip.SimpleTokenizer(context_length=8)(lines), normalize=True)
    return images, texts, [i for i, texts in enumerate(CAPTIONS) for _ in texts]


def apart(batch: list[tuple[torch.Tensor, list[str]]]) -> tuple[torch.Tensor, list[list[str]]]:
    images, captions = zip(*batch, strict=True)
    return torch.stack(images), list(captions)


@pytest.mark.needs("clip_benchmark")
def test_recalls_equal_clip_benchmarks(place):
    benchmark = importlib.import_module("clip_benchmark.metrics.zeroshot_retrieval")
    loader = torch.utils.data.DataLoader(Pictures(), batch_size=6, collate_fn=apart)
    tokenizer = open_clip.SimpleTokenizer(context_length=8)
    theirs = benchmark.evaluate(towers_of().model.eval(), loader, tokenizer, "cpu", amp=False, recall_k_list=[1, 5, 10])
    found = evaluate(0, 1, f"{place}/txt-*.tar")
    for k in (1, 5, 10):
        assert found.text_to_image.recall[k] == pytest.approx(theirs[f"image_retrieval_recall@{k}"])
        assert found.image_to_text.recall[k] == pytest.approx(theirs[f"text_retrieval_recall@{k}"])
    assert 0 < found.text_to_image.recall[1] < found.text_to_image.recall[10] < 1  # else it says little


def test_ranks_equal_those_of_sorted_similarities(place):
    images, texts, owners = embedded()
    found = evaluate(0, 1, f"{place}/txt-*.tar")
    order = (texts @ images.T).argsort(dim=1, descending=True, stable=True)
    to_image = np.array([row.tolist().index(owner) for row, owner in zip(order, owners, strict=True)])
    order = (images @ texts.T).argsort(dim=1, descending=True, stable=True)
    to_text = np.array([next(n for n, t in enumerate(row.tolist()) if owners[t] == i) for i, row in enumerate(order)])
    for own, places in ((found.text_to_image, to_image), (found.image_to_text, to_text)):
        assert own.median_rank == np.median(places) + 1
        assert own.recall == {k: pytest.approx((places < k).mean()) for k in (1, 5, 10)}
    assert (found.pictures, found.captions, found.bad) == (23, sum(map(len, CAPTIONS)), 0)


def test_the_same_for_any_number_of_ranks_any_batch_and_either_layout(place):
    alone = evaluate(0, 1, f"{place}/txt-*.tar")
    assert evaluate(0, 1, f"{place}/json-*.tar", "json:captions", batch=100) == alone
    assert run_ranks(evaluate, 3, f"{place}/txt-*.tar") == [alone] * 3


def test_blocks_change_nothing(monkeypatch):
    """Similarities of few levels, so that there are ties, within and across blocks."""
    generator = torch.Generator().manual_seed(0)
    query, gallery = (torch.randint(-1, 2, (n, 3), generator=generator).float() for n in (50, 70))
    first = torch.randint(0, 65, (50,), generator=generator)
    last = first + torch.randint(1, 5, (50,), generator=generator)
    order = (query @ gallery.T).argsort(dim=1, descending=True, stable=True).tolist()
    wanted = [next(n for n, g in enumerate(row) if a <= g < b) for row, a, b in zip(order, first, last, strict=True)]
    for queries, at_once in ((1024, 8192), (7, 11), (50, 1)):
        monkeypatch.setattr(retrieval, "_QUERIES", queries)
        monkeypatch.setattr(retrieval, "_GALLERY", at_once)
        assert first_places(query, gallery, first, last).tolist() == wanted


def test_broken_pictures_are_left_out_with_their_captions(place, tmp_path):
    samples = [(f"{i}", {"jpg": picture(i, 16, 20), "txt": "\n".join(CAPTIONS[i]).encode()}) for i in range(6)]
    whole = evaluate(0, 1, str(write_shard(tmp_path / "0.tar", samples)))
    samples[3:3] = [("x", {"jpg": samples[0][1]["jpg"][:200], "txt": b"one\ntwo"})]
    found = evaluate(0, 1, str(write_shard(tmp_path / "1.tar", samples)))
    assert found == RetrievalResult(whole.image_to_text, whole.text_to_image, 6, whole.captions, bad=1)
    with pytest.raises(UserError, match="none of the 1 picture of 'retrieval' can be decoded"):
        evaluate(0, 1, str(write_shard(tmp_path / "2.tar", samples[3:4])))


def test_in_training_and_standalone(place, tmp_path, capsys):
    words = [f"eval.retrieval.urls={place}/txt-*.tar", f"eval.retrieval_sets.lists.urls={place}/json-*.tar"]
    words += ["eval.retrieval_sets.lists.caption=json:captions", "checkpoint.best=lists/text_to_image_r5"]
    config = tiny_config(tmp_path, f"{place}/txt-*.tar", *words, "train.samples=16")
    summary = train(config)
    row = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    scores = {key: value for key, value in row.items() if key.startswith("retrieval/")}
    assert {f"lists/{key.partition('/')[2]}": value for key, value in scores.items()}.items() <= row.items()
    assert (row["retrieval/pictures"], row["retrieval/captions"]) == (23, sum(map(len, CAPTIONS)))
    line = (
        f"image to text {row['retrieval/image_to_text_r1']:.3f} {row['retrieval/image_to_text_r5']:.3f}, text to image"
    )
    assert f"retrieval {line}" in summary[1]
    assert f"step 2/2  retrieval: {line}" in (tmp_path / "run/run.log").read_text()
    capsys.readouterr()
    assert main(["eval", "retrieval", f"{tmp_path}/run/best", "--json", f"{tmp_path}/{{dataset}}.json"]) == 0
    assert capsys.readouterr().out.startswith(
        f"step 2  retrieval/image_to_text_r1 {row['retrieval/image_to_text_r1']:.4f}  retrieval/image_to_text_r5 "
    )
    found = json.loads((tmp_path / "lists.json").read_text())
    assert (found["task"], found["dataset"]) == ("zeroshot_retrieval", "lists")
    assert found["metrics"]["image_retrieval_recall@5"] == row["lists/text_to_image_r5"]
    assert found["metrics"]["text_retrieval_recall@10"] == row["lists/image_to_text_r10"]


def test_settings():
    config = load_config(["quickstart", "eval.retrieval.urls=a.tar", "eval.retrieval.caption=json:x"])
    assert config.held_out(config.eval.retrieval) == SourceSettings("a.tar", caption="json:x", captions="whole")
    assert list(config.eval.evaluations()) == ["validation", "zeroshot", "retrieval"]
    for changes in ({"batch": 0}, {"every_steps": -1}, {"caption": "json:"}):
        with pytest.raises(UserError, match=r"eval\.retrieval\."):
            Retrieval(**changes)
