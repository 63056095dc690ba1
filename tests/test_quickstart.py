"""The quickstart at small scale: it learns from its captions, and from nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clipscale.cli import main

pytestmark = pytest.mark.slow
CONFIG = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
CHANCE = 1 / 64


def quickstart(folder: Path, **shapes) -> dict:
    """The last row of metrics of a short run on a small shapes set."""
    place, run = folder / "shapes", folder / "run"
    words = [
        f"run.dir={run}",
        f"data.shapes.dir={place}",
        *(f"data.shapes.{key}={value}" for key, value in {"train_samples": 8000, **shapes}.items()),
        f"data.sources.shapes.urls={place}/train-*.tar",
        f"eval.zeroshot.urls={place}/test-*.tar",
        f"eval.zeroshot.classnames={place}/classnames.txt",
        f"eval.zeroshot.templates={place}/templates.txt",
        f"eval.validation.urls={place}/validation-*.tar",
        "eval.zeroshot.every_steps=0",
        "eval.validation.every_steps=0",
        "train.samples=20000",
        "train.global_batch=160",
        "gradcache.image_chunk=80",
        "gradcache.text_chunk=160",
        "optim.warmup_steps=13",
    ]
    assert main(["train", str(CONFIG), *words]) == 0
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])


@pytest.fixture(scope="module")
def with_captions(tmp_path_factory) -> dict:
    return quickstart(tmp_path_factory.mktemp("captions"))


def test_it_learns(with_captions):
    assert with_captions["zeroshot/top1"] > 6 * CHANCE
    assert with_captions["zeroshot/top5"] > 20 * CHANCE


def test_with_shuffled_captions_it_stays_at_chance(tmp_path, with_captions):
    row = quickstart(tmp_path, shuffle_captions="true")
    assert row["samples"] == with_captions["samples"]
    assert row["zeroshot/top1"] < 2 * CHANCE
