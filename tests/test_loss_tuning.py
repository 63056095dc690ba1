"""How a tile shape is chosen, and remembered. Stand-ins for the GPU: what a shape's kernel takes is made up."""

import json
import multiprocessing
from types import SimpleNamespace

import pytest
import torch
import triton
from triton.runtime.errors import OutOfResources

from clipscale.loss import engines, tuning
from clipscale.loss.tuning import INTERPRETED, candidates, tuned

CAPABILITIES = [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]


class OnGPU:
    """Operands [rows, width] as the tuner sees them."""

    device = torch.device("cuda")

    def __init__(self, rows, width=768):
        self.shape = (rows, width)

    def __len__(self):
        return self.shape[0]


@pytest.fixture(autouse=True)
def gpu(monkeypatch, tmp_path):
    """An H200 whose kernels take the milliseconds that the test puts into `gpu.times`, by shape; 1 otherwise."""
    fake = SimpleNamespace(times={}, timed=[], path=tmp_path / "clipscale" / "kernels.json")

    def do_bench(visit, return_mode):
        assert return_mode == "median"
        shape = visit()
        fake.timed.append(shape)
        time = fake.times.get(shape, 1.0)
        if isinstance(time, Exception):
            raise time
        return time

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CLIPSCALE_TUNE", raising=False)
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(triton.testing, "do_bench", do_bench)
    return fake


def choose(kernel="gradient", rows=4096, columns=4096, width=768, precision="fp16"):
    return tuned(kernel, OnGPU(rows, width), OnGPU(columns, width), precision, lambda shape: shape)


def restart():
    tuning._chosen.clear()


HOPPER = candidates("fp16", (9, 0))


@pytest.mark.parametrize("fastest", HOPPER)
def test_the_fastest_is_chosen_once(gpu, fastest):
    gpu.times[fastest] = 0.5
    assert choose() == fastest
    assert gpu.timed == list(HOPPER), "every candidate, once"
    gpu.times[fastest] = 2.0
    assert choose() == fastest
    restart()
    assert choose() == fastest, "a restart remembers"
    assert len(gpu.timed) == len(HOPPER)


def test_what_a_choice_depends_on(gpu, monkeypatch):
    assert choose(rows=4096) == choose(rows=4000)
    assert len(gpu.timed) == len(HOPPER), "a few masked pairs are no reason to tune again"
    for other in ({"kernel": "logsumexp"}, {"rows": 5000}, {"columns": 100}, {"width": 512}, {"precision": "bf16"}):
        before = len(gpu.timed)
        choose(**other)
        assert len(gpu.timed) == before + len(HOPPER), other
    for name, value in ((torch.cuda, "get_device_name"), (tuning, "_source_hash")):
        before = len(gpu.timed)
        monkeypatch.setattr(name, value, lambda *_: "another")
        choose()
        assert len(gpu.timed) == before + len(HOPPER), value


def test_a_shape_that_does_not_run_is_left_out(gpu, caplog):
    reasons = [OutOfResources(300_000, 232_448, "shared memory"), RuntimeError("Triton Error [CUDA]: invalid argument")]
    reasons += [RuntimeError("PassManager::run failed"), KeyError("maxnreg")]
    assert len(reasons) == len(HOPPER) - 1
    gpu.times = dict(zip(HOPPER, reasons, strict=False))
    assert choose() == HOPPER[-1]
    assert "is left out: out of resource: shared memory" in caplog.text
    assert "is left out: Triton Error [CUDA]: invalid argument" in caplog.text
    gpu.times[HOPPER[-1]] = OutOfResources(300_000, 232_448, "shared memory")
    with pytest.raises(RuntimeError, match=r"none of the loss kernel's shapes runs .*NVIDIA H200.*engine='torch'"):
        choose(kernel="logsumexp")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
        torch.AcceleratorError("CUDA error: misaligned address"),
        RuntimeError("Triton Error [CUDA]: unspecified launch failure"),
    ],
)
def test_a_fault_of_the_device_is_not_left_out(gpu, error, caplog):
    """After it every shape would fail, and the message would be of the last."""
    gpu.times[HOPPER[1]] = error
    with pytest.raises(RuntimeError, match=r"gradient fp16 .*Shape\(.* failed while it was timed, and not bec") as told:
        choose()
    assert str(error) in str(told.value)
    assert "left out" not in caplog.text
    assert gpu.timed == [*HOPPER[:2]]


def test_a_full_device_is_no_fault_of_a_shape(gpu):
    gpu.times[HOPPER[1]] = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        choose()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a": 1}', '{"a": {"shape": [1]}}', '{"a": {}}'])
def test_a_damaged_file_is_said_and_replaced(gpu, content, caplog):
    gpu.path.parent.mkdir()
    gpu.path.write_text(content)
    gpu.times[HOPPER[2]] = 0.5
    assert choose() == HOPPER[2]
    assert "is not readable, loss kernels are tuned anew" in caplog.text
    restart()
    gpu.times.clear()
    assert choose() == HOPPER[2]


def test_a_cache_folder_that_cannot_be_written(gpu, caplog):
    gpu.path.parent.write_text("a file where the folder should be")
    gpu.times[HOPPER[1]] = 0.5
    assert choose() == HOPPER[1]
    assert "is not remembered" in caplog.text


def test_without_a_home_folder_kernels_are_tuned_and_not_remembered(gpu, caplog, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("os.getuid", lambda: 2**31 - 7)
    gpu.times[HOPPER[1]] = 0.5
    assert choose() == HOPPER[1]
    assert "is not remembered" in caplog.text


def test_the_first_rank_to_write_is_right_for_all(gpu):
    gpu.times[HOPPER[1]] = 0.5
    assert choose() == HOPPER[1]
    key = next(iter(json.loads(gpu.path.read_text())))
    assert tuning._remember(key, {HOPPER[2]: 0.4}) == HOPPER[1], "a rank that tuned at the same time and found another"


def remember(key, shape):
    tuning._remember(key, {shape: 1.0})


def test_ranks_that_write_together_lose_nothing(gpu):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=remember, args=(f"key {rank}", HOPPER[rank % 3])) for rank in range(16)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert {key: tuple(record["shape"]) for key, record in json.loads(gpu.path.read_text()).items()} == {
        f"key {rank}": HOPPER[rank % 3] for rank in range(16)
    }


def test_a_checkpoint_brings_the_choice_to_another_machine(gpu):
    """As JSON. It goes before what this machine's own file says."""
    gpu.times[HOPPER[1]] = 0.5
    choose()
    told = json.loads(json.dumps(engines.tuned_shapes()))
    gpu.times = {HOPPER[2]: 0.5}
    gpu.path.unlink()
    restart()
    assert choose() == HOPPER[2]
    restart()
    engines.adopt_shapes(told)
    assert choose() == HOPPER[1]


def test_tuning_can_be_switched_off(gpu, monkeypatch):
    monkeypatch.setenv("CLIPSCALE_TUNE", "0")
    gpu.times[HOPPER[1]] = 0.5
    assert choose() == HOPPER[0]
    assert not gpu.timed
    assert not gpu.path.exists()


def test_the_interpreter_has_nothing_to_tune(gpu):
    assert tuned("gradient", torch.ones(4, 8), torch.ones(4, 8), "fp32", None) is INTERPRETED


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("precision", ["fp16", "bf16", "tf32", "fp32"])
def test_candidates(precision, capability):
    shapes = candidates(precision, capability)
    assert len({*shapes}) == len(shapes) >= 2
    assert all(shape.rows % 16 == shape.columns % 16 == shape.depth % 16 == 0 for shape in shapes)
    # Consumer GPUs and those before Hopper have 100 KB of shared memory or little more, and no tensor descriptors.
    if capability[0] not in (9, 10):
        size = 2 if precision in ("fp16", "bf16") else 4
        for shape in shapes:
            assert not shape.descriptors
            assert shape.stages * shape.depth * (shape.rows + shape.columns) * size <= 99 * 1024
