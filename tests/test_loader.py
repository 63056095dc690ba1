import dataclasses
import gc
import json
import os
import pickle
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from loading import CPU, Copy, open_loader, pipeline, read, take, tokenize
from shards import picture, write_pairs, write_shard

from clipscale.data import source as source_module
from clipscale.data.pipeline import Pipeline, Share
from clipscale.data.pixels.decode import decode
from clipscale.data.shard import handles
from clipscale.errors import UserError


def by_position(batches: list[Copy]) -> dict[int, tuple]:
    return {
        int(position): (b.keys[i], b.images[i].numpy().tobytes(), tuple(b.tokens[i].tolist()), bool(b.valid[i]))
        for b in batches
        for i, position in enumerate(b.positions)
    }


def assert_equal(a: list[Copy], b: list[Copy]) -> None:
    for one, other in zip(a, b, strict=True):
        assert one.position == other.position
        assert one.keys == other.keys
        np.testing.assert_array_equal(one.positions, other.positions)
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.tokens, other.tokens)
        assert torch.equal(one.valid, other.valid)
        assert sorted(one.skips) == sorted(other.skips)


@pytest.fixture(scope="module")
def urls(tmp_path_factory) -> str:
    """8 shards of 25 pairs, three of them broken."""
    return write_pairs(tmp_path_factory.mktemp("pairs"), 8, 25, size=28, broken={3, 77, 150})


@pytest.fixture(scope="module")
def expected(urls) -> list[Copy]:
    """One thread, five batches of 96: two and a half epochs."""
    return read(pipeline(urls, 96), 5, 96, threads=1)


# --- what a batch holds -----------------------------------------------------------------------------------------------


def test_each_epoch_holds_each_sample_once(expected):
    keys = [slot[0] for _, slot in sorted(by_position(expected).items())]
    assert sorted(keys[:200]) == sorted(keys[200:400]) == [f"{i:06d}" for i in range(200)]
    assert keys[:200] != keys[200:400]
    assert [batch.position for batch in expected] == [0, 96, 192, 288, 384]


def test_picture_and_caption_belong_to_the_key(expected):
    batch = expected[0]
    for i in np.flatnonzero(batch.valid.numpy()):
        number = int(batch.keys[i])
        assert batch.tokens[i].tolist() == tokenize([f"number {number % 25} of shard {number // 25}"])[0].tolist()


def test_a_crop_of_the_whole_is_the_picture_itself(urls):
    pipe = pipeline(urls, 96, image_size=28, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))
    batch = read(pipe, 1, 96)[0]
    for i in np.flatnonzero(batch.valid.numpy()):
        pixels = decode(picture(int(batch.keys[i]), 28, 28), 10_000)
        np.testing.assert_array_equal(batch.images[i].permute(1, 2, 0).numpy(), pixels)


# --- threads, ranks, restarts and prefetching change nothing ----------------------------------------------------------


@pytest.mark.parametrize(("threads", "chunk", "ahead"), [(1, 96, 2), (2, 7, 1), (4, 64, 9), (4, 1, 3)])
def test_threads_chunks_and_prefetch_change_nothing(urls, expected, threads, chunk, ahead):
    assert_equal(read(pipeline(urls, 96), 5, 96, threads=threads, chunk=chunk, ahead=ahead), expected)


@pytest.mark.parametrize("world", [2, 4, 3])
@pytest.mark.parametrize("streams", [None, 8])
def test_ranks_read_the_batches_of_one(urls, world, streams):
    pipe = pipeline(urls, 96, streams=streams)
    alone = by_position(read(pipe, 3, 96))
    parts = [read(pipe, 3, 96, world=world, rank=rank) for rank in range(world)]
    together = [by_position(part) for part in parts]
    assert sum(map(len, together)) == len(alone) == 3 * 96
    assert {k: v for part in together for k, v in part.items()} == alone
    assert sorted(s for part in parts for b in part for s in b.skips) == sorted(
        s for b in read(pipe, 3, 96) for s in b.skips
    )


def test_starting_later_equals_going_there(urls, expected):
    assert_equal(read(pipeline(urls, 96), 2, 96, start=288), expected[3:])


def test_the_crop_follows_the_position(urls):
    pipe = pipeline(urls, 96, crop_scale=(0.2, 0.6))
    first, again = by_position(read(pipe, 5, 96)), by_position(read(pipe, 5, 96))
    assert first == again
    views: dict[str, set] = {}
    for key, pixels, _, valid in first.values():
        if valid:
            views.setdefault(key, set()).add(pixels)
    assert sum(len(view) == 1 for view in views.values()) < 5  # another epoch, another crop


# --- masked slots -----------------------------------------------------------------------------------------------------


def test_a_broken_picture_masks_its_slot_and_no_other(urls, tmp_path):
    clean_urls = write_pairs(tmp_path, 8, 25, size=28)
    no_words = pipeline(urls, 100).tokenize([""])[0]
    for broken, clean in zip(read(pipeline(urls, 100), 4, 100), read(pipeline(clean_urls, 100), 4, 100), strict=True):
        assert broken.keys == clean.keys
        assert clean.valid.all()
        assert not clean.skips
        masked = [i for i, key in enumerate(broken.keys) if int(key) in (3, 77, 150)]
        assert (~broken.valid).nonzero().ravel().tolist() == masked
        assert not broken.images[masked].any()
        assert all(torch.equal(broken.tokens[i], no_words) for i in masked)
        assert torch.equal(broken.images[broken.valid], clean.images[broken.valid])
        assert torch.equal(broken.tokens[broken.valid], clean.tokens[broken.valid])
        told = {(skip.position, skip.key, skip.shard) for skip in broken.skips}
        shard = [f"{int(broken.keys[i]) // 25:04d}.tar" for i in masked]
        assert told == {
            (int(broken.positions[i]), broken.keys[i], str(Path(urls).with_name(name)))
            for i, name in zip(masked, shard, strict=True)
        }
        assert {(skip.source, skip.cause) for skip in broken.skips} <= {("mine", "broken picture")}
    assert len([skip for batch in read(pipeline(urls, 100), 4, 100) for skip in batch.skips]) == 6  # 3 in each epoch


def test_nothing_remains_of_the_batch_before_in_a_masked_slot(tmp_path):
    """Buffers are used again."""
    everything_broken = write_pairs(tmp_path, 1, 8, broken=range(8))
    for batch in read(pipeline(everything_broken, 8), 4, 8):
        assert not batch.valid.any()
        assert not batch.images.any()
        assert len(batch.skips) == 8


@pytest.mark.parametrize("fate", ["deleted", "cut", "a folder"])
def test_a_shard_that_goes_after_indexing_is_masked(tmp_path, fate):
    pipe = pipeline(write_pairs(tmp_path, 4, 20), 80)
    victim = tmp_path / "0002.tar"
    if fate == "cut":
        os.truncate(victim, victim.stat().st_size // 2)
    else:
        victim.unlink()
        if fate == "a folder":
            victim.mkdir()
    batch = read(pipe, 1, 80)[0]
    lost = [skip for skip in batch.skips if skip.cause == "cannot be read"]
    assert len(lost) == len(batch.skips) == (~batch.valid).sum()
    assert {skip.shard for skip in lost} == {str(victim)}
    assert len(lost) == 20
    assert all(("changed since" in skip.detail) == (fate != "deleted") for skip in lost)
    assert all(40 <= int(skip.key) < 60 for skip in lost)


@pytest.mark.parametrize("fate", ["deleted", "damaged"])
def test_an_index_that_goes_while_running_is_masked(tmp_path, fate):
    pipe = pipeline(write_pairs(tmp_path, 2, 10), 20)
    sidecar = Path(pipe.sources[0].shards[1].sidecar)
    sidecar.unlink() if fate == "deleted" else sidecar.write_bytes(sidecar.read_bytes()[:300])
    batch = read(pipe, 1, 20)[0]
    assert len(batch.skips) == 10
    assert {(skip.cause, Path(skip.shard).name) for skip in batch.skips} == {("cannot be read", "0001.tar")}
    assert batch.valid.sum() == 10


def test_a_caption_that_changes_unnoticed_after_indexing_is_masked(tmp_path):
    pipe = pipeline(write_pairs(tmp_path, 1, 4), 4)
    shard = tmp_path / "0000.tar"
    before = shard.stat()
    shard.write_bytes(shard.read_bytes().replace(b"number 2 of", b"number \xff of"))
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    batch = read(pipe, 1, 4)[0]
    assert [(skip.key, skip.cause) for skip in batch.skips] == [("000002", "caption is not UTF-8")]


# --- epochs and repeats -----------------------------------------------------------------------------------------------


def test_drop_leaves_out_the_remainder(tmp_path):
    pipe = pipeline(write_pairs(tmp_path, 3, 15, size=8), 20, epoch_boundary="drop")
    keys = [key for batch in read(pipe, 4, 20) for key in batch.keys]
    assert len(set(keys[:40])) == len(set(keys[40:])) == 40


def test_a_mixture_keeps_its_shares_and_each_source_its_epochs(tmp_path):
    sources = {
        "a": (write_pairs(tmp_path / "a", 2, 12, size=8), 1.0),
        "b": (write_pairs(tmp_path / "b", 3, 20, size=8), 3.0),
        "off": ("nowhere.tar", 0.0),
    }
    pipe = pipeline(sources, 32)
    assert [source.name for source in pipe.sources] == ["a", "b"]
    source, epoch, shard, index = pipe.locate(np.arange(10_000))
    assert np.bincount(source).tolist() == [2500, 7500]
    for i, samples in enumerate((24, 60)):
        seen = Counter(zip(epoch[source == i], shard[source == i], index[source == i], strict=True))
        assert max(seen.values()) == 1
        assert all(n == samples for e, n in Counter(e for e, _, _ in seen).items() if e < epoch[source == i].max())


# --- hostile members --------------------------------------------------------------------------------------------------


class Exploding:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_nothing_is_unpickled(tmp_path):
    marker = tmp_path / "exploded"
    bomb = pickle.dumps(Exploding(marker))
    suffixes = ("pkl", "pickle", "pyd", "pth", "seg.pyd", "PKL", "cls")
    samples = [
        (f"{i:03d}", {"jpg": picture(i, 16, 16), "txt": b"caption", **dict.fromkeys(suffixes, bomb)}) for i in range(4)
    ]
    write_shard(tmp_path / "hostile.tar", samples)
    write_shard(tmp_path / "worse.tar", [("a", {"jpg": bomb, "txt": b"caption"})])
    batch = read(pipeline(f"{tmp_path}/*.tar", 5, max_refused_fraction=1), 1, 5)[0]
    assert batch.valid.sum() == 4
    assert [skip.cause for skip in batch.skips] == ["not JPEG, PNG or WebP"]
    assert not marker.exists()
    pickle.loads(bomb)  # the control: this is what an unpickled member would have done
    assert marker.exists()


# --- what build_pipeline refuses --------------------------------------------------------------------------------------


def as_saved(pipe: Pipeline) -> dict:
    return json.loads(json.dumps(pipe.identity()))


def test_a_resume_goes_on_in_the_recorded_order(urls):
    recorded = as_saved(pipeline(urls, 96, streams=6, block_shards=2))
    for changed in ({}, {"streams": 4}, {"block_shards": 3}):  # config may have changed: the record counts
        pipe = pipeline(urls, 96, recorded=recorded, **changed)
        assert as_saved(pipe) == recorded
    assert as_saved(pipeline(urls, 48, recorded=recorded)) == recorded
    with pytest.raises(UserError, match=r"train\.global_batch=64 is not divisible by the 6 streams"):
        pipeline(urls, 64, recorded=recorded)


def test_a_resume_at_another_batch_keeps_the_epoch_and_its_limits(urls):
    recorded = as_saved(pipeline(urls, 96, epoch_boundary="drop", streams=1))
    assert recorded["epoch_length"] == {"mine": 192}
    pipe = pipeline(urls, 80, epoch_boundary="drop", recorded=recorded)
    assert pipe.orders[0].epoch_length == 192
    with pytest.raises(UserError, match="has 192 usable samples an epoch, fewer than its 200"):
        pipeline(urls, 200, epoch_boundary="drop", recorded=recorded)


@pytest.mark.parametrize("samples", [15, 25])
def test_changed_content_is_refused_at_a_resume_unless_accepted(tmp_path, samples):
    recorded = as_saved(pipeline(write_pairs(tmp_path / "then", 2, 20), 20))
    now = write_pairs(tmp_path / "now", 2, samples)
    with pytest.raises(UserError, match=r"data are not those of the checkpoint \(.*content.*set data.accept_changes"):
        pipeline(now, 20, recorded=recorded)
    pipe = pipeline(now, 20, recorded=recorded, accept_changes=True)
    assert pipe.orders[0].epoch_length == 2 * samples  # all of what is there now
    assert len({key for batch in read(pipe, 5, 20) for key in batch.keys}) == 2 * samples


@pytest.mark.parametrize("change", [{"crop_scale": (0.5, 1.0)}, {"image_size": 32}])
def test_other_pixels_are_refused_at_a_resume(urls, change):
    recorded = as_saved(pipeline(urls, 96))
    with pytest.raises(UserError, match="not those of the checkpoint"):
        pipeline(urls, 96, recorded=recorded, **change)


# --- resources --------------------------------------------------------------------------------------------------------


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_open_files_are_bounded_and_threads_do_not_lose_them(urls, expected, monkeypatch):
    monkeypatch.setattr(handles, "_MAX_OPEN_FILES", 2)
    gc.collect()  # files that earlier tests let go of
    before = open_files()
    pipe = pipeline(urls, 96)
    assert_equal(read(pipe, 5, 96, threads=4), expected)  # descriptors are closed under the threads' hands
    assert open_files() <= before + 2 * 2
    pipe.sources[0].close()
    assert open_files() == before


def test_blocks_go_round(urls):
    """Five chunks a step, all held until pass 2, and three ahead."""
    loader = open_loader(pipeline(urls, 96), 96, chunk=20, ahead=3)
    places = set()
    for _ in range(9):
        places |= {images.data_ptr() for _, images in next(loader).images.first(CPU)}
    assert len(places) == 8
    loader.close()


def test_a_batch_that_is_not_walked_is_passed_over(urls, expected):
    loader = open_loader(pipeline(urls, 96), 96)
    next(loader)
    batch = next(loader)
    next(batch.images.first(CPU))  # one chunk of five
    for _ in next(loader).images.first(CPU):
        pass
    assert_equal([take(loader)], [expected[3]])
    loader.close()


def test_a_fault_of_ours_ends_the_run_and_does_not_hang(urls):
    def fail(_captions):
        raise RuntimeError("tokenizer")

    loader = open_loader(dataclasses.replace(pipeline(urls, 96), tokenize=fail), 96)
    with pytest.raises(RuntimeError, match="tokenizer"):
        take(loader)
    loader.close()


def test_close_gives_up_what_is_not_decoded(urls):
    def slow(captions):
        time.sleep(0.2)
        return tokenize(captions)

    pipe = dataclasses.replace(pipeline(urls, 192, allow_repeats=True), tokenize=slow)
    loader = open_loader(pipe, 192, threads=1, chunk=16, ahead=60)  # 72 jobs of 0.2 s
    start = time.monotonic()
    loader.close()
    assert time.monotonic() - start < 10


# --- little data, many ranks ------------------------------------------------------------------------------------------


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("shards", "per_shard", "world"), [(1, 12, 4), (2, 6, 4), (1, 1, 1), (1, 1, 4), (3, 1, 4), (5, 7, 2)]
)
def test_fewer_shards_or_samples_than_ranks(tmp_path, shards, per_shard, world):
    """Batches of twelve; what is short of that comes several times in each."""
    pipe = pipeline(write_pairs(tmp_path, shards, per_shard, size=28), 12, allow_repeats=True)
    parts = [read(pipe, 3, 12, world=world, rank=rank) for rank in range(world)]
    keys = [key for _, (key, *_) in sorted(by_position([b for part in parts for b in part]).items())]
    assert len(keys) == 36
    samples = shards * per_shard
    for epoch in range(36 // samples):
        assert len(set(keys[epoch * samples : (epoch + 1) * samples])) == samples


@pytest.mark.timeout(60)
def test_a_source_of_weight_0_is_not_even_opened(tmp_path):
    sources = {"mine": (write_pairs(tmp_path, 1, 8, size=28), 1.0), "off": ("no-such.tar", 0.0)}
    assert len(read(pipeline(sources, 8), 1, 8)[0].keys) == 8


@pytest.mark.parametrize("sources", [1, 2])
def test_a_rank_fetches_ahead_what_it_will_read_itself(tmp_path, monkeypatch, sources):
    """Ranks on other nodes have caches of their own. Half a block of these streams is no multiple of them."""
    per_shard = (9, 12)
    urls = {f"{n}": (write_pairs(tmp_path / f"{n}", 16, per_shard[n], size=8), 1.0) for n in range(sources)}
    pipe = pipeline(urls, 16, streams=4, block_shards=1, image_size=8)
    asked: set[tuple] = set()
    monkeypatch.setattr(source_module.Source, "remote", True)
    monkeypatch.setattr(
        source_module.Source, "prefetch", lambda self, shards: asked.update((self.name, s) for s in shards)
    )

    def shards_of(share: Share, steps: range) -> set[tuple]:
        positions = np.concatenate([share.positions(pipe, 16 * step) for step in steps])
        source, _, shard, _ = pipe.locate(positions)
        return {(pipe.sources[i].name, int(s)) for i, s in zip(source, shard, strict=True)}

    for rank in range(2):
        asked.clear()
        read(pipe, 4, 16, world=2, rank=rank, ahead=3, chunk=8)
        share, later = Share(16, 2, rank), max(1, pipe.horizon() // 16)
        assert shards_of(share, range(later, later + 4)) <= asked <= shards_of(share, range(later, later + 8))
