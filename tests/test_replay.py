import os
from collections import Counter
from pathlib import Path

import pytest
import torch
from loading import CPU, open_loader, pipeline, read, take
from shards import write_pairs

from clipscale.config.data import AugmentSettings
from clipscale.data.load.replay import Disk, Held, handed_over
from clipscale.data.load.shape import StepShape
from clipscale.data.load.workers import LoaderError
from clipscale.data.pixels.augment import Augment
from clipscale.data.source import Sample, Source


@pytest.fixture(scope="module")
def urls(tmp_path_factory) -> str:
    """4 shards of 25 pairs, one of them broken."""
    return write_pairs(tmp_path_factory.mktemp("pairs"), 4, 25, size=28, broken={33})


# --- inputs that are there already ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 7, 10, 11, 100])
def test_chunks_are_the_inputs_in_order(size):
    inputs = torch.arange(20).view(10, 2)
    for walk in (Held(inputs, size).first, Held(inputs, size).again):
        found = list(walk(CPU))
        assert [start for start, _ in found] == list(range(0, 10, size))
        assert torch.equal(torch.cat([chunk for _, chunk in found]), inputs)
        assert all(len(chunk) == size for _, chunk in found[:-1])


def test_no_inputs_no_chunks():
    assert list(Held(torch.empty(0, 3), 4).first(CPU)) == []


@pytest.mark.gpu
@pytest.mark.parametrize("size", [64, 333, 1000, 4000])
def test_on_a_gpu_chunks_come_from_pinned_memory(size):
    device = torch.device("cuda")
    inputs = torch.randint(0, 256, (1000, 3, 16, 16), dtype=torch.uint8).pin_memory()
    for walk in (Held(inputs, size).first, Held(inputs, size).again):
        kept = []
        for start, chunk in walk(device):
            torch.cuda._sleep(1_000_000)  # the consumer is slow, and still nothing is overwritten under its hands
            kept.append((start, chunk.clone()))
        assert torch.equal(torch.cat([chunk for _, chunk in kept]).cpu(), inputs)


def test_a_small_tensor_reaches_a_gpu_from_pinned_memory():
    """From other memory the copy waits for all that the GPU has to do."""
    calls = []

    class Recorded:
        is_cuda = False

        def contiguous(self):
            return self

        def pin_memory(self):
            calls.append("pinned")
            return self

        def to(self, device, **options):
            calls.append(options)

    handed_over(Recorded(), torch.device("cuda"))
    assert calls == ["pinned", {"non_blocking": True}]
    assert handed_over(torch.arange(3), CPU).tolist() == [0, 1, 2]


@pytest.mark.gpu
@pytest.mark.parametrize("tier", ["gpu", "host", "recompute"])
def test_changed_pictures_wait_for_no_gpu(urls, tier):
    device, change = torch.device("cuda"), Augment(AugmentSettings(0.5, (0.4, 0.4, 0.4, 0.1), grayscale=0.2), 0)
    loader = open_loader(pipeline(urls, 40), 40, tier=tier, chunk=9, device=device, change=change)
    for _ in range(3):
        images = next(loader).images
        torch.cuda.set_sync_debug_mode("error")
        try:
            passes = [torch.cat([part.clone() for _, part in walk(device)]) for walk in (images.first, images.again)]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(*passes)
    loader.close()


# --- the tiers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tier", ["host", "disk", "recompute"])
@pytest.mark.parametrize(("chunk", "ahead"), [(100, 3), (9, 3), (1, 5)])
def test_every_tier_shows_the_same_pictures_twice(urls, tmp_path, tier, chunk, ahead):
    """`read` walks both passes and compares them."""
    expected = read(pipeline(urls, 40), 4, 40)
    found = read(pipeline(urls, 40), 4, 40, tier=tier, folder=str(tmp_path), chunk=chunk, ahead=ahead)
    assert [batch.chain() for batch in found] == [batch.chain() for batch in expected]
    assert sum(len(batch.skips) for batch in found) == sum(len(batch.skips) for batch in expected) == 2
    assert not os.listdir(tmp_path)


@pytest.mark.gpu
def test_the_gpu_tier_and_the_others_on_a_gpu(urls, tmp_path):
    device, expected = torch.device("cuda"), read(pipeline(urls, 40), 4, 40)
    for tier in ("gpu", "host", "disk", "recompute"):
        loader = open_loader(pipeline(urls, 40), 40, tier=tier, folder=str(tmp_path), chunk=9, device=device)
        for wanted in expected:
            batch = next(loader)
            for walk in (batch.images.first, batch.images.again):
                images = torch.cat([images.clone() for _, images in walk(device)])
                assert torch.equal(images.cpu(), wanted.images)
        loader.close()


def test_the_disk_tier_writes_what_it_is_given_and_reads_that(urls, tmp_path, monkeypatch):
    """A byte that flips on the disk is seen in pass 2: nothing is kept in memory beside the file."""
    loader = open_loader(pipeline(urls, 40), 40, tier="disk", folder=str(tmp_path), chunk=9)
    batch = next(loader)
    first = torch.cat([images.clone() for _, images in batch.images.first(CPU)])
    file = loader.tier._file.fileno()
    os.pwrite(file, bytes([os.pread(file, 1, 17)[0] ^ 255]), 17)
    again = torch.cat([images.clone() for _, images in batch.images.again(CPU)])
    assert (first != again).sum() == 1
    assert os.fstat(file).st_size == first.numel()
    loader.close()


def test_recomputing_notices_a_shard_that_changed_between_the_passes(tmp_path):
    loader = open_loader(pipeline(write_pairs(tmp_path, 1, 40), 40), 40, tier="recompute", chunk=8, ahead=3)
    batch = next(loader)
    for _ in batch.images.first(CPU):
        pass
    shard = tmp_path / "0000.tar"
    os.truncate(shard, shard.stat().st_size // 2)
    with pytest.raises(
        LoaderError, match=r"replay.kind=recompute: slots .* cannot be read a second time \(cannot be re"
    ):
        for _ in batch.images.again(CPU):
            pass
    loader.close()


@pytest.mark.parametrize("tier", ["host", "disk", "recompute"])
def test_a_second_pass_that_is_not_walked_holds_nothing_up(urls, tmp_path, tier):
    expected = read(pipeline(urls, 40), 4, 40)
    loader = open_loader(pipeline(urls, 40), 40, tier=tier, folder=str(tmp_path), chunk=9)
    for _ in next(loader).images.first(CPU):
        pass
    partly = next(loader).images
    for _ in partly.first(CPU):
        pass
    next(partly.again(CPU))
    next(loader)
    assert take(loader).chain() == expected[3].chain()
    loader.close()


@pytest.mark.parametrize("tier", ["host", "disk", "recompute"])
@pytest.mark.parametrize("walk", ["first", "again"])
def test_walks_that_are_left_in_the_middle_cost_no_blocks(urls, tmp_path, tier, walk):
    """More of them than there are blocks."""
    loader = open_loader(pipeline(urls, 40), 40, tier=tier, folder=str(tmp_path), chunk=9)
    kept = []
    for step in range(12):
        images = next(loader).images
        if walk == "again":
            list(images.first(CPU))
        kept.append(getattr(images, walk)(CPU))
        next(kept[-1])
        if step % 2:  # the others end when the run does
            kept.clear()
    assert take(loader).chain() == read(pipeline(urls, 40), 1, 40, start=12 * 40)[0].chain()
    loader.close()


def test_a_full_disk_is_an_error_at_once(tmp_path):
    free = os.statvfs(tmp_path)
    pictures = free.f_bavail * free.f_frsize // (3 * 224 * 224) * 2
    with pytest.raises(OSError, match=r"No space left|File too large"):
        Disk(StepShape(pictures, 16, 224, ahead=3), str(tmp_path), pin=False)
    assert not list(Path(tmp_path).iterdir())


@pytest.mark.parametrize("which", ["first", "second"])
def test_recomputing_needs_only_what_the_first_pass_could_read(tmp_path, monkeypatch, which):
    """A masked slot has no part in the loss: a server that is well again by the second pass does not end the run."""
    readings: Counter[tuple[int, int]] = Counter()
    really_read = Source.read

    def read_once(self: Source, shard: int, index: int, *draw: float) -> Sample:
        readings[shard, index] += 1
        if (shard, index) == (0, 7) and readings[shard, index] == {"first": 1, "second": 2}[which]:
            raise OSError("503 Service Unavailable")
        return really_read(self, shard, index, *draw)

    monkeypatch.setattr(Source, "read", read_once)
    pipe = pipeline(write_pairs(tmp_path, 2, 20, broken={33}), 40)
    loader = open_loader(pipe, 40, tier="recompute", chunk=8, threads=1)
    batch = next(loader)
    first = torch.cat([images.clone() for _, images in batch.images.first(CPU)])
    if which == "first":
        again = torch.cat([images.clone() for _, images in batch.images.again(CPU)])
        assert (~batch.valid).sum() == 2
        assert (first != again).flatten(1).any(1).sum() == 1
        assert torch.equal(first[batch.valid], again[batch.valid])
    else:
        with pytest.raises(LoaderError, match=r"a second time \(cannot be read: 503 Service"):
            list(batch.images.again(CPU))
    loader.close()
