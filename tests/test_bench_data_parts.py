"""The pieces of `clipscale bench data`, each against something that is not ours."""

import io
import subprocess
import sys
import tarfile
import time

import numpy as np
import open_clip
import pytest
import torch
import webdataset
from PIL import Image
from shards import picture, write_shard
from torch.utils.data import DataLoader

from clipscale.bench.common.processes import cpu_seconds, descendants, memory, settle
from clipscale.bench.common.stopwatch import Stopwatch
from clipscale.bench.common.turns import Supplier, take_turns
from clipscale.bench.data import photos, transport
from clipscale.bench.data.baseline import Baseline, Parts, baseline_loader, pipeline, transform

# --- photos -----------------------------------------------------------------------------------------------------------


def test_photos_are_as_large_as_those_of_imagenet():
    jpegs = [photos.photo(number) for number in range(200)]
    sizes = np.array([len(jpeg) for jpeg in jpegs])
    assert abs(sizes.mean() / photos.MEAN_BYTES - 1) < 0.03
    assert sizes.std() / sizes.mean() > 0.15, "photographs differ"
    shapes = set()
    for jpeg in jpegs[:20]:
        image = Image.open(io.BytesIO(jpeg))
        shapes.add(image.size)
        assert image.mode == "RGB"
        reference = io.BytesIO()
        image.save(reference, "JPEG", quality=95, subsampling="4:2:0")
        assert image.quantization == Image.open(reference).quantization
        assert image.layer == Image.open(reference).layer, "how the colours are sampled"
    assert shapes == {(341, 256), (256, 341)}


def test_shards_are_made_once_and_read_by_webdataset(tmp_path, monkeypatch):
    monkeypatch.setitem(photos._PER_SHARD, "photos", 4)
    urls = photos.photo_shards(tmp_path, samples=6)
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples] == [f"{number:09d}" for number in range(6)]
    for number, sample in enumerate(samples):
        assert 10 <= len(sample["txt"].split()) <= 20
        assert sample["json"]["caption"] == sample["txt"] == photos.caption(number)
    monkeypatch.setattr(photos, "photo", lambda number: pytest.fail("made again"))
    assert photos.photo_shards(tmp_path, samples=6) == urls
    with tarfile.open(next(tmp_path.rglob("photos-0001.tar"))) as tar:
        assert tar.getnames() == [f"00000000{n}.{suffix}" for n in (4, 5) for suffix in ("jpg", "txt", "json")]


def test_tiny_pictures(tmp_path):
    samples = list(webdataset.WebDataset(photos.tiny_shards(tmp_path, 20), shardshuffle=False).decode("pil"))
    assert {sample["jpg"].size for sample in samples} == {(16, 16)}
    assert len({sample["jpg"].tobytes() for sample in samples}) == 20


# --- the recipe -------------------------------------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path):
    """Two shards of 6 samples; the last of each has no caption."""
    urls = []
    for shard in range(2):
        samples = []
        for i in range(6):
            number = 6 * shard + i
            sample = {"jpg": picture(number, 40, 50), "txt": f"number {number}".encode(), "json": b"{}"}
            if i == 5:
                del sample["txt"]
            samples.append((f"{number:03d}", sample))
        urls.append(str(write_shard(tmp_path / f"{shard}.tar", samples)))
    return urls


def expected(number: int) -> tuple[Image.Image, torch.Tensor]:
    image = Image.open(io.BytesIO(picture(number, 40, 50))).convert("RGB")
    return image, open_clip.get_tokenizer("ViT-B-32")([f"number {number}"])[0]


def test_transform_is_open_clips():
    image, _ = expected(3)
    whole = open_clip.image_transform(32, is_train=True)
    for seed in range(5):
        torch.manual_seed(seed)
        wanted = whole(image)
        got = {}
        for pixels in ("float32", "uint8"):
            torch.manual_seed(seed)
            crop, convert = transform(pixels, 32)
            got[pixels] = convert(crop(image))
        assert torch.equal(got["float32"], wanted)
        assert got["uint8"].dtype == torch.uint8
        mean, std = (torch.tensor(open_clip.constants.__dict__[f"OPENAI_DATASET_{x}"]) for x in ("MEAN", "STD"))
        again = (got["uint8"].float() / 255 - mean[:, None, None]) / std[:, None, None]
        torch.testing.assert_close(again, wanted)


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_the_baseline_gives_what_webdataset_gives(shards, workers):
    """Every sample with a caption, with open_clip's pixels where the crop is the whole picture."""
    settings = Baseline(workers, batch=5, image_size=32, sample_shuffle=4, sample_shuffle_initial=2)
    batches = iter(baseline_loader(shards, settings))
    seen = {}
    for _ in range(12):
        images, tokens = next(batches)
        assert images.shape == (5, 3, 32, 32)
        assert images.dtype == torch.float32
        seen |= {tuple(row.tolist()): image for row, image in zip(tokens, images, strict=True)}
    del batches
    wanted = {tuple(expected(number)[1].tolist()): number for number in range(12) if number % 6 != 5}
    assert seen.keys() == wanted.keys()
    for row, image in seen.items():
        middle = open_clip.image_transform(32, is_train=False)(expected(wanted[row])[0])
        assert (image - middle).abs().mean() < 0.3, "another crop of the same picture"


def test_the_baseline_goes_on_behind_a_broken_picture(tmp_path):
    samples = [(str(i), {"jpg": picture(i, 40, 50)[: 100 if i == 1 else None], "txt": b"words"}) for i in range(4)]
    path = str(write_shard(tmp_path / "x.tar", samples))
    settings = Baseline(0, batch=3, image_size=32, sample_shuffle=1, sample_shuffle_initial=1)
    images, _ = next(iter(baseline_loader([path], settings)))
    assert len(images) == 3


def test_buffers_are_full_after_the_filling_batches(tmp_path, monkeypatch):
    """Each sample out takes two in until then, and one in from there on."""
    samples = [(str(i), {"jpg": picture(i, 8, 8), "txt": b"words"}) for i in range(6)]
    path = str(write_shard(tmp_path / "x.tar", samples))
    settings = Baseline(0, batch=5, image_size=32, sample_shuffle=40, sample_shuffle_initial=10)
    read = []
    real = webdataset.tariterators.tar_file_expander

    def counting(*arguments, **options):
        for member in real(*arguments, **options):
            read.append(member.get("fname", "").endswith(".jpg"))
            yield member

    monkeypatch.setattr(webdataset.tariterators, "tar_file_expander", counting)
    batches = iter(pipeline([path], settings, Parts.of(settings)))
    for _ in range(Baseline(1, 5, sample_shuffle=40, sample_shuffle_initial=10).filling_batches + 3):
        next(batches)
    before = sum(read)
    for _ in range(10):
        next(batches)
    assert abs((sum(read) - before) - 50) <= 1


# --- processes --------------------------------------------------------------------------------------------------------

_BUSY = "import time\nwhile time.process_time() < {seconds}: pass\n"


class Child:
    """A process that runs some code, says so, and waits to be let go."""

    def __init__(self, code: str) -> None:
        command = [sys.executable, "-Suc", f"{code}\nprint('done')\ninput()"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.pid = self._process.pid
        self.said = []
        while (line := self._process.stdout.readline().strip()) != "done":
            assert line, "it failed"
            self.said.append(line)

    def end(self) -> None:
        self._process.communicate("\n", timeout=20)


def test_cpu_of_a_living_child_and_of_an_ended_one_are_counted_once():
    before = cpu_seconds()
    living, ended = Child(_BUSY.format(seconds=0.5)), Child(_BUSY.format(seconds=0.3))
    assert 0.8 <= cpu_seconds() - before < 1.1  # one of them twice: 1.1 or more
    ended.end()
    assert 0.8 <= cpu_seconds() - before < 1.1  # one of them twice: 1.1 or more
    living.end()
    assert 0.8 <= cpu_seconds() - before < 1.1  # one of them twice: 1.1 or more


def test_cpu_of_grandchildren_and_threads_is_counted():
    """A grandchild that has ended, and threads that have."""
    code = (
        "import subprocess, sys, threading, time\n"
        f"subprocess.run([sys.executable, '-Sc', {_BUSY.format(seconds=0.3)!r}])\n"
        "def work():\n"
        "    start = time.thread_time()\n"
        "    while time.thread_time() < start + 0.3: pass\n"
        "threads = [threading.Thread(target=work) for _ in range(2)]\n"
        "[thread.start() for thread in threads]; [thread.join() for thread in threads]\n"
    )
    before = cpu_seconds()
    child = Child(code)
    assert 0.88 <= cpu_seconds() - before < 1.2  # ended children are counted in ticks of 10 ms
    child.end()


def test_descendants_are_children_and_theirs():
    code = (
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'input()'], stdin=subprocess.PIPE)\n"
        "print(child.pid)"
    )
    child = Child(code)
    assert {child.pid, int(child.said[0])} <= set(descendants())
    child.end()
    assert child.pid not in descendants()


def test_settle_waits_for_work_to_end():
    child = subprocess.Popen([sys.executable, "-uc", f"print()\n{_BUSY.format(seconds=1)}"], stdout=subprocess.PIPE)
    child.stdout.readline()
    settle(20)
    assert child.wait(0.5) == 0  # had it not been waited for, most of its second would be left
    child.stdout.close()
    start = time.monotonic()
    settle(20)
    assert time.monotonic() - start < 5


_GROWING = """
input()
block = bytearray(b"1") * (64 << 20)
print(flush=True)
input()
"""


def test_memory_of_a_process():
    """Of one that does nothing else. The shares of its libraries, 10 MB, change as other processes come and go."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-Suc", f"print(){_GROWING}"], **pipes, text=True) as child:
        child.stdout.readline()
        before = memory(child.pid)
        print(file=child.stdin, flush=True)
        child.stdout.readline()
        grown = [now - then for now, then in zip(memory(child.pid), before, strict=True)]
        print(file=child.stdin, flush=True)
    resident, proportional, private = (abs(size - (64 << 20)) for size in grown)
    assert resident < 1 << 20
    assert private < 1 << 20
    assert proportional < 10 << 20


# --- turns and stopwatch ----------------------------------------------------------------------------------------------


def test_a_turn_is_what_it_says():
    taken = []

    def take(name: str, seconds: float) -> int:
        taken.append(name)
        start = time.process_time()
        while time.process_time() < start + seconds:
            pass
        return 10

    entrants = [
        Supplier("fast", lambda: take("fast", 0.01), stride=3, ahead=4, filling=2, close=lambda: taken.append("x")),
        Supplier("slow", lambda: take("slow", 0.04)),
    ]
    field, turns = take_turns(entrants, rounds=2, seconds=0.1)
    assert [one.name for one in field] == ["fast", "slow"]
    assert taken.count("x") == 1
    timed = taken.index("slow") - 2 - 9  # but for what fills, and what may lie ready and a group behind it
    assert timed >= 3
    assert timed % 3 == 0
    for turn in turns["fast"]:
        assert turn.items % 30 == 0
        assert turn.wall_seconds >= 0.1
    ratio = [a.cpu_seconds / a.items / (b.cpu_seconds / b.items) for a, b in zip(*turns.values(), strict=True)]
    assert ratio == pytest.approx([0.25, 0.25], rel=0.2)
    assert all(turn.own_cpu_seconds == pytest.approx(turn.cpu_seconds, rel=0.1) for turn in turns["slow"])


def test_contestants_are_closed_when_one_fails():
    closed = []

    def fail() -> int:
        raise RuntimeError("no batch")

    with pytest.raises(RuntimeError, match="no batch"):
        take_turns(
            [Supplier("a", lambda: 1, close=lambda: closed.append("a")), Supplier("b", fail)],
            rounds=1,
            seconds=0.01,
        )
    assert closed == ["a"]


class Kitchen:
    def cook(self, watch_seconds: float) -> None:
        self.spend(watch_seconds)
        self.boil(2 * watch_seconds)
        self.spend(watch_seconds)

    def boil(self, seconds: float) -> None:
        self.spend(seconds)

    @staticmethod
    def spend(seconds: float) -> None:
        start = time.thread_time()
        while time.thread_time() < start + seconds:
            pass


def test_a_stopwatch_gives_each_its_own():
    watch, kitchen, boil = Stopwatch(), Kitchen(), Kitchen.boil
    with watch.inside(Kitchen, "boil", "boil"):
        watch.wrap("cook", kitchen.cook)(0.05)
    assert Kitchen.boil is boil
    assert watch.seconds == pytest.approx({"cook": 0.1, "boil": 0.1}, rel=0.1)


# --- transport --------------------------------------------------------------------------------------------------------


def test_transport_brings_the_batch_and_ends_its_processes():
    before = set(descendants())
    shape = (8, 3, 16, 16)
    for one in transport._suppliers(shape):
        assert [one.take() for _ in range(7)] == [1] * 7
        one.close()
    settle(10)
    assert set(descendants()) <= before


def test_blocks_hold_what_the_other_process_wrote(monkeypatch):
    read = []
    monkeypatch.setattr(transport, "_read", lambda images: read.append(images.clone()))
    one = transport._blocks((100, 3, 16, 16), read=True)
    for _ in range(5):
        one.take()
    one.close()
    assert all((images == 1).all() for images in read)
    assert [len(images) for images in read] == [100] * 5


def test_dataloader_sends_a_tensor():
    batch = next(iter(DataLoader(transport._Ready((4, 3, 8, 8), "tensor"), batch_size=None, num_workers=1)))
    assert batch.shape == (4, 3, 8, 8)
    assert batch.is_shared()
