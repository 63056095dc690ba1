"""Page-locking the loader's memory, and the buffers that pictures take where CUDA refuses it."""

import os
import threading

import pytest
import torch
from loading import CPU, open_loader, pipeline, read, take
from shards import write_pairs

from clipscale.data.load import staging
from clipscale.data.load.blocks import Blocks
from clipscale.data.load.replay import Chunk
from clipscale.data.load.shape import StepShape
from clipscale.data.load.staging import Staging

SHAPE = StepShape(slots=10, chunk=3, side=4, ahead=3)


@pytest.fixture(scope="module")
def urls(tmp_path_factory) -> str:
    """4 shards of 25 pairs, one of them broken."""
    return write_pairs(tmp_path_factory.mktemp("pairs"), 4, 25, size=28, broken={33})


@pytest.fixture
def no_gpu(monkeypatch):
    """Memory is handed out as on a machine with a GPU, and is plain."""
    monkeypatch.setattr(staging, "page_locked", lambda *shape: torch.empty(*shape, dtype=torch.uint8))
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)


def refuse(self: Blocks) -> None:
    raise RuntimeError("CUDA error: operation not supported")


@pytest.mark.parametrize("mode", ["inline", "process"])
def test_every_page_is_there_before_memory_is_page_locked(urls, monkeypatch, no_gpu, mode):
    """Else one thread fetches them all."""
    found = []

    def pin(self: Blocks) -> None:
        found.append((os.fstat(self.file).st_blocks * 512, self.layout.total_bytes))

    monkeypatch.setattr(Blocks, "pin", pin)
    monkeypatch.setattr(Blocks, "unpin", lambda self: found.append("unpin"))
    open_loader(pipeline(urls, 40), 40, mode=mode, pin=True).close()
    (there, wanted), end = found
    assert there >= wanted > 0
    assert end == "unpin"


def test_pages_are_fetched_by_several_threads():
    meeting, filled = threading.Barrier(2, timeout=30), []

    class Part:
        def numpy(self):
            return self

        def fill(self, value: int) -> None:
            meeting.wait()  # one thread alone would wait for ever
            filled.append(value)

    blocks = Blocks.__new__(Blocks)
    blocks._memory = type("Memory", (), {"split": lambda self, size: [Part(), Part()]})()
    blocks.fault_in(threads=2)
    assert filled == [0, 0]


def chunks(pictures: torch.Tensor, log: list) -> list[Chunk]:
    """Of three pictures each, that say when they are taken and freed."""
    for start in range(0, len(pictures), 3):
        log.append(f"take {start}")
        yield Chunk(start, pictures[start : start + 3], lambda start=start: log.append(f"free {start}"))


def test_the_next_chunk_is_under_way_while_one_is_used(no_gpu):
    pictures, log = torch.randint(0, 256, (10, 3, 4, 4), dtype=torch.uint8), []
    way = Staging(SHAPE)
    for _ in range(2):
        log.clear()
        found = []
        for start, data, free in way.through(chunks(pictures, log)):
            log.append(f"use {start}")
            assert any(data.data_ptr() == buffer.data_ptr() for buffer in way._buffers)
            found.append(data.clone())
            free()
        assert torch.equal(torch.cat(found), pictures)
        assert log == [
            *("take 0", "take 3", "use 0", "free 0", "take 6", "use 3", "free 3"),
            *("take 9", "use 6", "free 6", "use 9", "free 9"),
        ]
    assert list(way.through(iter(()))) == []
    way.close()


def test_a_buffer_is_not_filled_before_it_is_free(no_gpu):
    """A GPU still copies from the chunk before the one in hand, as `to_device` has it."""
    pictures = torch.arange(10, dtype=torch.uint8)[:, None, None, None].expand(10, 3, 4, 4).contiguous()
    way, held = Staging(SHAPE), None
    for start, data, free in way.through(chunks(pictures, [])):
        if held is not None:
            way._thread.submit(int).result()  # every copy that was begun has ended
            assert torch.equal(held.data, pictures[held.start : held.start + len(held.data)])
            held.free()
        held = Chunk(start, data, free)
    way.close()


@pytest.mark.parametrize("tier", ["host", "disk", "recompute"])
def test_where_memory_cannot_be_page_locked_the_pictures_are_the_same(urls, tmp_path, monkeypatch, no_gpu, told, tier):
    expected = read(pipeline(urls, 40), 4, 40)
    monkeypatch.setattr(Blocks, "pin", refuse)
    loader = open_loader(pipeline(urls, 40), 40, tier=tier, folder=str(tmp_path), chunk=9, pin=True)
    (line,) = told
    assert "cannot be page-locked: RuntimeError: CUDA error: operation not supported" in line
    assert "3 buffers of 9 pictures" in line
    ways = {buffer.data_ptr() for buffer in loader.staging._buffers}
    assert ways >= {images.data_ptr() for _, images in next(loader).images.first(CPU)}
    next(next(loader).images.first(CPU))  # a walk that is left in the middle
    assert [take(loader).chain() for _ in range(2)] == [batch.chain() for batch in expected[2:]]
    loader.close()


@pytest.mark.gpu
@pytest.mark.parametrize("tier", ["gpu", "host", "disk", "recompute"])
def test_cuda_itself_refuses_and_the_pictures_are_the_same(urls, tmp_path, monkeypatch, told, tier):
    """Memory that is page-locked already is refused; what CUDA remembers of it must not end the next kernel."""
    device, expected = torch.device("cuda"), read(pipeline(urls, 40), 3, 40)
    make = Blocks.make

    def locked(layout) -> Blocks:
        blocks = make(layout)
        blocks.pin()
        return blocks

    monkeypatch.setattr(Blocks, "make", locked)
    loader = open_loader(pipeline(urls, 40), 40, tier=tier, folder=str(tmp_path), chunk=9, device=device)
    assert torch.ones(3, device=device).sum().item() == 3
    assert "cannot be page-locked" in told[0]
    for wanted in expected:
        batch = next(loader)
        for walk in (batch.images.first, batch.images.again):
            kept = []
            for _, images in walk(device):
                torch.cuda._sleep(1_000_000)  # the consumer is slow, and still nothing is overwritten under its hands
                kept.append(images.clone())
            assert torch.equal(torch.cat(kept).cpu(), wanted.images)
    blocks = loader._blocks
    loader.staging.close()
    loader.staging = None  # so that `close` unlocks what was locked above
    assert blocks.images.is_pinned()
    loader.close()
