"""`clipscale bench eval`: words, a tiny run, and what its clock counts."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import pytest
import tiny
import torch
from bench_words import eval_bench, printed_by
from PIL import Image

from clipscale.bench.eval.bench import COLUMNS, cells, markdown, summary
from clipscale.bench.eval.measure import HEIGHT, WIDTH, Round, _Watch, write_tree
from clipscale.cli import main


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """The JSON, its Markdown and the terminal's output of one run."""
    folder = tmp_path_factory.mktemp("bench")
    words = ["bench", "eval", "--models", "tiny", "--pictures", "12", "--batch", "5", "--threads", "1", "--rounds", "2"]
    words += ["--device", "cpu", "--output", str(folder), "--name", "tiny"]
    printed = printed_by(words, **{"clipscale.bench.eval.bench.model_config": lambda name: tiny.MODEL})
    return json.loads((folder / "tiny.json").read_text()), (folder / "tiny.md").read_text(), printed


def test_every_round_is_a_whole_evaluation(result):
    document, page, printed = result
    [row] = document["evals"]
    assert document["finished"]
    assert row["model"] == "tiny"
    assert len(row["rounds"]) == 2
    for loop, forward, alone in (one.values() for one in row["rounds"]):
        assert 0 < forward < loop
        assert alone > 0
    assert 0 < row["share_in_tower"]["median"] < 1
    assert row["decode_seconds"] > 0
    assert printed.count("pictures a second") == 2
    for cell in (*COLUMNS, *cells(row)):
        assert cell in page
        assert cell in printed
    assert "12 JPEGs of 500 x 375, 5 at once, 1 decoding thread." in page


def test_ratios_are_those_of_each_round():
    rounds = [Round(10.0, 9.0, 8.0), Round(20.0, 19.0, 20.0), Round(40.0, 36.0, 36.0)]
    found = summary(rounds, 100)
    assert found["share_in_tower"]["median"] == 0.9
    assert found["rate_to_tower_alone"]["median"] == 0.9
    assert found["pictures_per_second"]["median"] == 5.0
    assert found["tower_seconds_a_picture"]["median"] == 0.2


def test_the_clock_counts_the_pictures_and_the_tower():
    """Waiting for a batch is of the loop alone, and the walk over captions of neither."""

    def slow(inputs: torch.Tensor) -> torch.Tensor:
        time.sleep(0.05)
        return inputs

    slow.device = torch.device("cpu")
    watch = _Watch(SimpleNamespace(image=slow))
    for _ in watch.walk([1]):
        time.sleep(0.2)

    def batches():
        for number in range(2):
            time.sleep(0.05)
            yield torch.tensor(number)

    assert [int(watch.tower(batch)) for batch in watch.walk(batches())] == [0, 1]
    assert 0.1 <= watch.forward_seconds < watch.loop_seconds
    assert watch.loop_seconds >= 0.2
    assert watch.loop_seconds - watch.forward_seconds >= 0.1


def test_pictures_have_the_size_that_is_told(tmp_path):
    settings = write_tree(tmp_path, 3)
    files = sorted((tmp_path / "val").rglob("*.jpg"))
    sizes = [Image.open(file).size for file in files]
    assert {*map(frozenset, sizes)} == {frozenset((WIDTH, HEIGHT))}
    assert settings.folder == str(tmp_path / "val")
    assert len(files) == 3


def test_what_is_typed_arrives():
    plain = eval_bench()
    assert (plain.models, plain.pictures, plain.batch, plain.rounds) == (("ViT-B-32", "quickstart"), 1024, 256, 3)
    full = eval_bench("--models", "ViT-L-14, cifar10", "--pictures", "50k", "--threads", "16", "--name", "x")
    assert (full.models, full.pictures, full.threads, full.name) == (("ViT-L-14", "cifar10"), 51200, 16, "x")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--models ViT-B-32,", "--models=ViT-B-32,: an empty name"),
        ("--models ViT-B-33", "ViT-B-33"),
        ("--pictures 0", "--pictures=0: must be at least 1"),
        ("--batch 0", "--batch=0: must be a whole number of at least 1"),
        ("--device tpu", "--device=tpu: unknown"),
    ],
)
def test_a_mistake_is_one_line(capsys, words, line):
    assert main(["bench", "eval", *words.split()]) == 2
    err = capsys.readouterr().err
    assert line in err
    assert err.count("\n") == 1


def test_a_page_of_what_is_not_finished_says_so(result):
    document, _, _ = result
    assert "**Not finished**" in markdown({**document, "finished": False})
    assert "**Not finished**" not in markdown(document)
