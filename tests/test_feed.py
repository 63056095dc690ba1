"""What feeds a run: repeats in a batch, the account of masked samples, augmentation and replay by the config."""

from __future__ import annotations

import json
import os
import signal
from types import SimpleNamespace

import pytest
import torch
from shards import picture, write_pairs, write_shard
from tiny import tiny_config

from clipscale.config.data import Replay
from clipscale.data.load.shape import StepShape
from clipscale.data.load.workers import LoaderError
from clipscale.data.tokenize import caption_hashes
from clipscale.dist import World
from clipscale.errors import UserError
from clipscale.training import feed
from clipscale.training.feed import _require_equal, plan_replay
from clipscale.training.trainer import Trainer, train

CPU = torch.device("cpu")
ALONE = World(0, 1, 0, CPU)


def rows(folder, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (folder / "run" / name).read_text().splitlines()]


def test_hashes_tell_captions_apart():
    tokens = torch.randint(0, 49_408, (20_000, 12), generator=torch.Generator().manual_seed(0))
    tokens[:, 6:] = 0
    distinct = len({tuple(row) for row in tokens.tolist()})
    assert len(set(caption_hashes(tokens).tolist())) == distinct
    assert torch.equal(caption_hashes(tokens[::7]), caption_hashes(tokens)[::7])
    swapped = tokens.clone()
    swapped[:, [0, 1]] = tokens[:, [1, 0]]
    same = tokens[:, 0] == tokens[:, 1]
    assert torch.equal(caption_hashes(swapped) == caption_hashes(tokens), same)


def test_captions_and_pairs_that_occur_twice_are_in_the_metrics(tmp_path):
    """Eight samples an epoch, batches of twelve: four pairs come twice in each; a third of the captions are one."""
    samples = [
        (f"{i:03d}", {"jpg": picture(i, 16, 16), "txt": b"the same" if i < 3 else f"number {i}".encode()})
        for i in range(8)
    ]
    urls = str(write_shard(tmp_path / "a.tar", samples))
    words = ("train.global_batch=12", "train.samples=60", "data.allow_repeats=true", "run.log_every_steps=2")
    train(tiny_config(tmp_path, urls, *words))
    found = rows(tmp_path)
    assert [row["step"] for row in found if "repeated_captions" in row] == [2, 4, 5]  # the logged ones, and the last
    assert [row["step"] for row in found if "repeated_pairs" in row] == [2, 4, 5]
    for row in (found[1], found[3], found[4]):
        assert row["repeated_pairs"] == 4
        assert row["repeated_captions"] == 12 - 6  # the six captions of the epoch are all there


def test_ranks_that_see_other_data_are_refused():
    same = {"seed": 1, "content": {"mine": "abc"}}
    _require_equal([same, dict(same)])
    with pytest.raises(UserError, match=r"rank 2 sees other data than rank 0: content is \{'mine': 'xyz'\}, not"):
        _require_equal([same, same, {"seed": 1, "content": {"mine": "xyz"}}])


def test_masked_samples_do_not_count_as_repeated_captions(tmp_path):
    urls = write_pairs(tmp_path / "data", 2, 8, size=16, broken={0, 1, 2, 8, 9})
    train(tiny_config(tmp_path, urls, "train.global_batch=16", "train.samples=16", "data.max_bad_fraction=0.9"))
    assert [row["repeated_captions"] for row in rows(tmp_path)] == [0]
    assert [row["masked_samples"] for row in rows(tmp_path)] == [5]


def test_the_table_of_causes_is_told_before_the_run_stops(tmp_path, capsys):
    good = write_pairs(tmp_path / "good", 2, 8, size=16)
    bad = write_pairs(tmp_path / "bad", 2, 8, size=16, broken=range(10))
    words = (f"data.sources.other.urls={bad}", "data.allow_repeats=true", "train.samples=64")
    with pytest.raises(UserError, match=r"samples could not be used \(other: broken picture: \d+\)"):
        train(tiny_config(tmp_path, good, *words))
    assert "other: broken picture" in (tmp_path / "run" / "run.log").read_text()


@pytest.mark.parametrize("tier", ["host", "disk", "recompute"])
def test_a_run_is_the_same_in_every_tier(tmp_path, tier):
    urls = write_pairs(tmp_path / "data", 4, 8, size=16, broken={3})
    losses = []
    for kind in ("auto", tier):
        folder = tmp_path / f"{kind}"
        folder.mkdir()
        words = (f"replay.kind={kind}", f"replay.dir={tmp_path}/replay", "data.max_bad_fraction=0.5")
        train(tiny_config(folder, urls, *words))
        losses.append([row["loss"] for row in rows(folder)])
    assert losses[0] == losses[1]
    assert f"replay tier {tier}" in (tmp_path / tier / "run" / "run.log").read_text()


def test_a_step_that_fits_nowhere_is_refused_before_the_first(tmp_path):
    urls = write_pairs(tmp_path / "data", 4, 8, size=16)
    with pytest.raises(UserError, match=r"replay.kind=auto: .* replay.host_bytes allows 1,000 bytes"):
        train(tiny_config(tmp_path, urls, "replay.host_bytes=1000"))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_what_little_memory_costs_is_in_the_log(tmp_path):
    """Seven blocks of three pictures: three that wait, four of the six that are wanted ahead."""
    urls = write_pairs(tmp_path / "data", 4, 8, size=16)
    words = ("replay.kind=host", f"replay.host_bytes={7 * 3 * 3 * 16 * 16}", "data.prefetch_steps=2")
    train(tiny_config(tmp_path, urls, *words))
    log = (tmp_path / "run" / "run.log").read_text()
    assert "4 chunks of pictures are decoded ahead, not 6, for want of memory: replay.host_bytes allows 16,128" in log


def test_nodes_of_several_sizes_take_one_decision(monkeypatch):
    """Two ranks here, one there: what does not fit on one node is refused on both, or one would wait for the other."""
    enough, too_little = (Replay(kind="host", host_bytes=n) for n in (40_000, 20_000))
    shape, plans = StepShape(slots=8, chunk=4, side=16, ahead=2), []
    for host in ("crowded", "roomy"):
        monkeypatch.setattr(feed.socket, "gethostname", lambda host=host: host)
        world = SimpleNamespace(device=CPU, gather=lambda mine: [("crowded", mine[1])] * 2 + [("roomy", mine[1])])
        plans.append(plan_replay(enough, shape, world))
        with pytest.raises(UserError, match=r"replay.host_bytes allows 20,000 bytes"):
            plan_replay(too_little, shape, world)
    assert plans[0] == plans[1]


def test_augmentation_changes_the_run_and_both_passes_agree(tmp_path):
    urls = write_pairs(tmp_path / "data", 4, 8, size=16)
    words = ("data.augment.flip=0.5", "data.augment.color_jitter=[0.4,0.4,0.4,0.1]", "data.augment.grayscale=0.2")
    words = (*words, "gradcache.keep_bytes=0")  # both passes see every chunk
    trainer = Trainer(tiny_config(tmp_path, urls, *words), ALONE)
    plain = Trainer(tiny_config(tmp_path, urls, f"run.dir={tmp_path}/plain", words[-1]), ALONE)
    batch, unchanged = next(trainer.feed.loader), next(plain.feed.loader)
    first = torch.cat([images.clone() for _, images in batch.images.first(CPU)])
    again = torch.cat([images.clone() for _, images in batch.images.again(CPU)])
    raw = torch.cat([images.clone() for _, images in unchanged.images.first(CPU)])
    assert torch.equal(first, again)
    assert first.dtype == torch.float32
    assert (first - raw).abs().amax((1, 2, 3)).gt(1).any()
    trainer.close()
    plain.close()


@pytest.mark.timeout(120)
def test_training_with_a_loader_process_that_dies_is_one_line_and_not_a_hang(tmp_path):
    urls = write_pairs(tmp_path / "data", 4, 8, size=16)
    trainer = Trainer(tiny_config(tmp_path, urls, "data.loader=process", "train.samples=100000"), ALONE)
    trainer.towers.model.train()
    trainer.step(next(trainer.feed.loader))
    os.kill(trainer.feed.loader.workers.pid, signal.SIGKILL)
    with pytest.raises(LoaderError, match="was killed by SIGKILL") as died:
        trainer.run()
    assert "\n" not in str(died.value)
    trainer.close()
